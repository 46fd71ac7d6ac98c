"""Generated input for the API, and curves compared with a slow reader of the same lines."""

import json
import random
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.service.harness import ServiceHarness
from trainyard.contract.spec import JobSpec
from trainyard.contract.status import Reason
from trainyard.service.ingest.parsing import MAX_INTEGER, parse_event
from trainyard.service.schemas import Job

LENIENT = settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)

SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | st.text(max_size=20)
    | st.sampled_from(["\0", "\ud800", "nan", "byte", "cuda", "cpu", "../x", "/dev/zero", "--x", "$(x)"])
)
JSON = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
SPEC: dict[str, Any] = JobSpec.model_validate({"data": {"data_path": "x"}}).model_dump(mode="json")
LEAVES = [(group, leaf) for group, value in SPEC.items() if isinstance(value, dict) for leaf in value]
LINES: dict[str, dict[str, Any]] = {
    "metric": {"step": 1, "epoch": 1.0, "loss": 1.0, "learning_rate": 1e-3, "tokens": 1, "memory_bytes": 1},
    "phase": {"phase": "training", "message": "m", "done": 1, "total": 2},
    "checkpoint": {"step": 1, "path": "/x", "bytes": 1, "sha256": "a", "loss": 1.0, "checkpoint_kind": "full"},
    "checkpoint_removed": {"step": 1, "path": "/x", "why": "retention"},
    "sample": {"step": 1, "prompt": "p", "text": "t"},
    "warning": {"code": "c", "message": "m", "step": 1, "data": {}},
    "resume_verified": {"step": 1, "expected": 2.0, "found": 2.0, "difference": 0.0},
    "finished": {"outcome": "completed", "step": 1, "message": "m"},
}


def post(rig: ServiceHarness, path: str, body: object) -> int:
    answer = rig.client.post(path, content=json.dumps(body), headers={"Content-Type": "application/json"})
    assert answer.status_code < 500, answer.text[:500]
    if answer.status_code == 201:
        Job.model_validate(answer.json())
    return int(answer.status_code)


@LENIENT
@given(changes=st.lists(st.tuples(st.sampled_from(LEAVES), JSON), min_size=1, max_size=4))
def test_specs_with_anything_in_any_field(rig: ServiceHarness, changes: list[tuple[tuple[str, str], Any]]) -> None:
    spec = json.loads(json.dumps(SPEC))
    spec["data"]["data_path"] = str(rig.corpus)
    for (group, leaf), value in changes:
        spec[group][leaf] = value
    assert post(rig, "/jobs", spec) in (201, 422)


@LENIENT
@given(body=JSON)
def test_bodies_of_any_shape(rig: ServiceHarness, body: Any) -> None:
    assert post(rig, "/jobs", body) == 422


@LENIENT
@given(body=st.dictionaries(st.sampled_from(["epochs", "max_steps", "resources", "step", "x"]), JSON, max_size=3))
def test_resumes_of_any_shape(rig: ServiceHarness, body: dict[str, Any]) -> None:
    job_id = rig.submit()
    rig.post_action(job_id, "pause")
    assert post(rig, f"/jobs/{job_id}/resume", body) in (202, 409, 422)


@st.composite
def odd_line(draw: st.DrawFn) -> dict[str, Any]:
    """A line of the outbox in which one field holds anything, and some keys were never heard of."""
    kind = draw(st.sampled_from(sorted(LINES)))
    field = draw(st.sampled_from(sorted(LINES[kind])))
    unknown = draw(st.dictionaries(st.text(max_size=6), JSON, max_size=2))
    return {**unknown, **LINES[kind], field: draw(JSON), "kind": kind, "seq": 2}


@LENIENT
@given(second=odd_line())
def test_lines_with_anything_in_any_field(rig: ServiceHarness, second: dict[str, Any]) -> None:
    job_id, attempt = rig.running()
    try:
        answer = rig.report(attempt, "events", {"events": [second, {**LINES["metric"], "kind": "metric", "seq": 3}]})
        assert answer.status_code == 200, answer.text[:500]
        assert answer.json()["acked"] == 3
        Job.model_validate(rig.job(job_id))
        for what in ("events", "metrics", "samples", "checkpoints"):
            rig.data(job_id, what)
    finally:
        rig.report(attempt, "exit", attempt.end("completed", step=1).model_dump(mode="json"))


@given(line=st.dictionaries(st.sampled_from(["kind", "step", "text", "at", "data"]), JSON, max_size=5))
@settings(LENIENT, max_examples=200)
def test_reading_a_line_never_fails(line: dict[str, Any]) -> None:
    event = parse_event({**line, "seq": 7})
    assert event.seq == 7
    for value in event.model_dump().values():
        assert not isinstance(value, int) or abs(value) <= MAX_INTEGER


def stitched_slowly(attempts: list[tuple[int, list[int]]]) -> list[tuple[int, int]]:
    """(step, attempt) of the curve, by its definition: attempt n counts up to where attempt n+1 began."""
    found: dict[int, int] = {}
    for number, (start, steps) in enumerate(attempts, start=1):
        found = {step: owner for step, owner in found.items() if step <= start}
        found |= dict.fromkeys(steps, number)
    return sorted(found.items())


@pytest.mark.parametrize("seed", range(6))
def test_the_curve_is_what_a_slow_reader_finds(any_rig: ServiceHarness, seed: int) -> None:
    dice = random.Random(seed)
    rig = any_rig
    job_id = rig.submit(resources={"max_restarts": 0})
    attempts: list[tuple[int, list[int]]] = []
    reached = 0
    for number in range(1, 6):
        start = dice.randrange(reached + 1)
        attempt = rig.next_attempt(job_id, number, start_step=start, steps=1000)
        stride = dice.choice((1, 2, 5))
        steps = list(range(start + stride, start + 1 + dice.randrange(30), stride))
        for step in steps:
            attempt.metric(step, loss=float(number))
        attempts.append((start, steps))
        reached = max([reached, *steps])
        rig.exit(attempt, "crashed", Reason.HUNG, step=reached)
        rig.post_action(job_id, "resume")
    found = [(m["step"], m["attempt"]) for m in rig.data(job_id, "metrics")]
    assert found == stitched_slowly(attempts)
