"""An AI agent on a real service with real runs: the SDK's client starts `trainyard mcp` and drives the loop."""

import asyncio
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from mcp import Client, StdioServerParameters

from benchmarks.corpus import write_docstrings
from tests.story.service_process import Served
from tests.story.test_story import spec as story_spec

pytestmark = [pytest.mark.long, pytest.mark.timeout(1800)]

COMMAND = str(Path(sys.executable).with_name("trainyard"))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("data") / "corpus.jsonl"
    assert write_docstrings(file, 200) == 200
    return file


def test_an_agent_plans_launches_waits_compares_describes_discards_and_forks(served: Served, corpus: Path) -> None:
    created = served.post("/tokens", {"name": "agent-7", "scope": "submit", "max_jobs": 3})
    token: str = created.json()["token"]
    theirs = served.submit(story_spec(corpus, nproc_per_node=1))
    environment = {**os.environ, "TRAINYARD_URL": served.url, "TRAINYARD_TOKEN": token}
    command = StdioServerParameters(command=COMMAND, args=["mcp"], env=environment)

    async def loop() -> None:
        async with Client(command) as client:

            async def ask(tool: str, **arguments: Any) -> tuple[bool, dict[str, Any]]:
                result = await client.call_tool(tool, arguments)
                [content] = result.content
                answer: dict[str, Any] = json.loads(getattr(content, "text", ""))
                return bool(result.is_error), answer

            async def call(tool: str, **arguments: Any) -> dict[str, Any]:
                is_error, answer = await ask(tool, **arguments)
                assert not is_error, answer
                return answer

            async def ended(job_id: str) -> dict[str, Any]:
                deadline = time.monotonic() + 300
                while not (job := await call("wait_for_job", job=job_id, timeout_seconds=30))["reached"]:
                    assert time.monotonic() < deadline, job
                return job

            is_error, refused = await ask("cancel_job", job=theirs)
            assert (is_error, refused["error"]["code"]) == (True, "forbidden")

            jobs = []
            for rate in (1e-5, 3e-3):
                spec = {**story_spec(corpus, nproc_per_node=1), "name": f"rate-{rate}", "group": "rates"}
                spec["training"] |= {"max_steps": 30, "learning_rate": rate}
                spec["data"] |= {"eval_fraction": 0.1}
                spec["limits"] = {"max_minutes": 5}
                assert (await call("plan_job", spec=spec))["steps"] == 30
                jobs.append(await call("launch_job", spec=spec, idempotency_key=spec["name"]))
                assert (await call("launch_job", spec=spec, idempotency_key=spec["name"]))["id"] == jobs[-1]["id"]
            for job in jobs:
                assert (await ended(job["id"]))["status"] == "succeeded"

            compared = await call("compare_jobs", group="rates")
            assert [job["name"] for job in compared["jobs"]] == ["rate-0.003", "rate-1e-05"]
            assert list(compared["differing_settings"]) == ["training.learning_rate"]
            assert compared["notes"] == []
            curve = await call("read_curve", job="rate-0.003", points=4)
            losses = [row[curve["columns"].index("loss_mean")] for row in curve["rows"]]
            assert losses[-1] < losses[0]
            assert (await call("read_log", job="rate-0.003", lines=5))["text"]

            await call("describe_job", job="rate-1e-05", description="too low")
            await call("discard_job", job="rate-1e-05")
            assert len((await call("list_jobs", group="rates"))["jobs"]) == 1
            overrides = {"name": "longer", "training": {"max_steps": 40}}
            fork = await call("fork_job", job="rate-0.003", overrides=overrides, idempotency_key="longer")
            last = await ended(fork["id"])
            assert (last["status"], last["step"], last["owner"]) == ("succeeded", 40, "agent-7")

    asyncio.run(loop())
    served.wait(theirs, "succeeded")
