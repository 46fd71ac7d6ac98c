"""Requests generated from the OpenAPI document by schemathesis: no 5xx, and no response that is not documented."""

import collections
import contextlib
import gc
import os
import resource
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from tests.service.conftest import MakeHarness
from tests.service.harness import ServiceHarness
from tests.service.live_server import served
from tests.service.test_service_process import Process
from tests.soak_report import SoakReport
from trainyard.contract.status import Reason

schemathesis = pytest.importorskip("schemathesis", reason="schemathesis is not installed")

SEED = int(os.environ.get("TRAINYARD_SEED", "20261125"))
ROUND = 250
MIB = 1 << 20
ENDLESS = ("/stream",)
"""Streams of a job that never ends do not end; they have tests of their own."""

TOKEN = "a-token-of-the-test"


def jobs(rig: ServiceHarness) -> list[str]:
    """One that runs, one that failed, one that waits."""
    running, attempt = rig.running()
    for step in range(1, 30):
        attempt.metric(step)
    attempt.metric(30, loss=float("nan"))
    attempt.say("sample", step=3, prompt="p", text="t")
    rig.ship(attempt)
    rig.checkpoint(running, attempt, 10)
    rig.ship(attempt)
    failed, attempt = rig.running()
    rig.exit(attempt, "crashed", Reason.DATA_INVALID, step=0)
    return [running, failed, rig.submit(resources={"nproc_per_node": 2})]


def operations(rig: ServiceHarness) -> list[Any]:
    schema = schemathesis.openapi.from_dict(rig.app.openapi())
    found = [result.ok() for result in schema.get_all_operations()]
    return [operation for operation in found if not operation.path.endswith(ENDLESS)]


@st.composite
def requests(draw: st.DrawFn, known: list[Any], ids: list[str]) -> Any:
    """A request to any operation; most ask for a job that is there, some break the schema on purpose."""
    operation = draw(st.sampled_from(known))
    mode = draw(st.sampled_from(list(schemathesis.GenerationMode)))
    try:
        case = draw(operation.as_strategy(generation_mode=mode))
    except Exception as error:  # what takes no parameter cannot be broken
        if "negat" not in str(error).lower() and "Unsatisfiable" not in type(error).__name__:
            raise
        case = draw(operation.as_strategy(generation_mode=schemathesis.GenerationMode.POSITIVE))
    if "job_id" in (case.path_parameters or {}) and draw(st.integers(0, 4)):
        case.path_parameters["job_id"] = draw(st.sampled_from(ids))
    return case


def resident(pid: int) -> int:
    with open(f"/proc/{pid}/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


@contextlib.contextmanager
def in_process(rig: ServiceHarness) -> Iterator[tuple[str, int]]:
    """(base address, pid) of the rig's own application."""
    with served(rig) as (host, port):
        yield f"http://{host}:{port}", os.getpid()


@contextlib.contextmanager
def apart(rig: ServiceHarness, token: str | None) -> Iterator[tuple[str, int]]:
    """(base address, pid) of a service on the rig's database whose memory is its own."""
    process = Process(
        rig.home,
        "--no-scheduler",
        f"--database-url={rig.url}",
        TRAINYARD_TOKEN=token or "",
        TRAINYARD_LOG_LEVEL="warning",
    )
    try:
        yield process.url(), process.process.pid
        assert process.end() == 0
    finally:
        process.process.kill()
        process.process.wait()


def explore(
    rig: ServiceHarness, count: int, token: str | None, serving: contextlib.AbstractContextManager[tuple[str, int]]
) -> tuple[collections.Counter[int], list[int]]:
    """Send ``count`` requests and hold every answer against the document.

    Returns how often each status came, and the server's resident bytes at the begin and after each round.
    """
    seen: collections.Counter[int] = collections.Counter()
    ids = jobs(rig)
    with serving as (base, pid):

        @settings(
            max_examples=min(count, ROUND),
            deadline=None,
            database=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(case=requests(operations(rig), ids))
        def one(case: Any) -> None:
            headers = {"Authorization": f"Bearer {token}"} if token else {}
            answer = case.call(base_url=base, headers=headers, timeout=60)
            seen[answer.status_code] += 1
            # No scheduler runs here, and /ready says so.
            assert answer.status_code < 500 or case.path == "/ready", (case.as_curl_command(), answer.text[:500])
            case.validate_response(answer, checks=CHECKS if answer.status_code < 500 else CHECKS[1:])

        sizes = [resident(pid)]
        # What the generator remembers of a round goes with it: what stays is the service's.
        for number in range(-(-count // ROUND)):
            seed(SEED + number)(one)()
            gc.collect()
            sizes.append(resident(pid))
            print(f"{sum(seen.values())} requests, {sizes[-1] / MIB:.1f} MiB", flush=True)
    print(f"seed {SEED}: {sum(seen.values())} requests, {dict(sorted(seen.items()))}")
    return seen, sizes


CHECKS = [
    getattr(schemathesis.checks, name, None) or getattr(schemathesis.specs.openapi.checks, name)
    for name in (
        "not_a_server_error",
        "status_code_conformance",
        "content_type_conformance",
        "response_headers_conformance",
        "response_schema_conformance",
    )
]


@pytest.mark.long
@pytest.mark.parametrize("token", [None, TOKEN])
def test_generated_requests(make_rig: MakeHarness, any_url: str, token: str | None) -> None:
    rig = make_rig(any_url, token=token)
    rig.client.headers["Authorization"] = f"Bearer {token}"
    seen, _ = explore(rig, 40, token, in_process(rig))
    rig.close()
    assert sum(seen.values()) >= 40
    assert len(seen) >= 3
    assert 401 not in seen


@pytest.mark.soak
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("token", [None, TOKEN])
def test_ten_thousand_generated_requests(
    account: SoakReport, make_rig: MakeHarness, any_url: str, token: str | None
) -> None:
    rig = make_rig(any_url, token=token)
    rig.client.headers["Authorization"] = f"Bearer {token}"
    seen, sizes = explore(rig, 10_000, token, apart(rig, token))
    rig.close()
    account.faults["generated request"] += sum(seen.values())
    assert sum(seen.values()) >= 10_000
    account.figure("server's memory at the begin, MiB", sizes[0] / MIB)
    account.figure("server's memory after a fifth, MiB", sizes[len(sizes) // 5] / MIB)
    account.figure("server's memory at the end, MiB", sizes[-1] / MIB)
    # The first fifth fills what is kept for good: pools, compiled queries, the document.
    assert sizes[-1] - sizes[len(sizes) // 5] < 16 * MIB, "memory is flat"
    account.invariants.append("no answer of 5xx, none that the document does not know, memory flat")
