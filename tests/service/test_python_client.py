"""Both Python clients against the real application on a socket, with a run that the test drives."""

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest

from tests.service.harness import ServiceHarness
from tests.service.live_server import DEADLINE, served
from trainyard.client.api import Client
from trainyard.client.async_client import AsyncClient
from trainyard.client.errors import InvalidSpec, InvalidState, NotFound
from trainyard.contract.status import Reason


@pytest.fixture
def url(rig: ServiceHarness, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.delenv("TRAINYARD_TOKEN", raising=False)
    with served(rig) as (host, port):
        yield f"http://{host}:{port}"


def pause(rig: ServiceHarness, job_id: str, attempt: Any) -> None:
    """Save, stop and say so, as an agent does after a request."""
    rig.checkpoint(job_id, attempt, 3)
    rig.exit(attempt, "stopped", Reason.USER, step=3)


def test_a_job_from_submit_to_its_end(rig: ServiceHarness, url: str) -> None:
    with Client(url) as client:
        with pytest.raises(InvalidSpec, match="/training/learning_rate: ") as mistakes:
            client.submit(rig.spec(training={"learning_rate": -1, "batchsize": 3}))
        assert len(mistakes.value.errors) == 2
        assert all(problem.message in str(mistakes.value) for problem in mistakes.value.errors)
        job = client.submit(rig.spec(name="first"))
        assert job.status == "queued"
        rig.reconcile()
        attempt = rig.launcher.of(job.id)
        attempt.started(steps=10)
        attempt.metric(1, loss=4.0)
        attempt.metric(2, loss=3.0)
        rig.ship(attempt)
        points = job.follow(interval=0.2)
        assert [next(points)["loss"] for _ in range(2)] == [4.0, 3.0]
        attempt.metric(3, loss=2.0)
        rig.ship(attempt)
        assert next(points)["loss"] == 2.0
        assert job.refresh().status == "running"
        assert job.pause().status == "pausing"
        pause(rig, job.id, attempt)
        assert list(points) == [], "a paused job is idle"
        assert job.wait({"paused"}, timeout=DEADLINE).checkpoint["step"] == 3  # type: ignore[index]
        with pytest.raises(InvalidState) as refused:
            job.pause()
        assert refused.value.code == "invalid_state"
        assert [point["step"] for point in job.metrics(after_step=1)] == [2, 3]
        assert [point["loss_mean"] for point in job.curve()] == [4.0, 3.0, 2.0]
        assert "<svg" in job._repr_html_()
        assert client.find("first") == job.refresh()
        assert job.update(description="a try").description == "a try"
        assert job.resume(max_steps=20).status == "queued"
        assert job.kill().wait(timeout=DEADLINE).status == "cancelled"
        assert [each.id for each in client.jobs()] == [job.id]
        job.delete()
        with pytest.raises(NotFound):
            job.refresh()


def test_the_same_asynchronously(rig: ServiceHarness, url: str) -> None:
    async def use() -> None:
        async with AsyncClient(url) as client:
            with pytest.raises(InvalidSpec, match="/training/learning_rate: "):
                await client.submit(rig.spec(training={"learning_rate": -1}))
            job = await client.submit(rig.spec(name="first"))
            await asyncio.to_thread(rig.reconcile)
            attempt = rig.launcher.of(job.id)
            attempt.started(steps=10)
            attempt.metric(1, loss=4.0)
            await asyncio.to_thread(rig.ship, attempt)
            points = job.follow(interval=0.2)
            assert (await anext(points))["loss"] == 4.0
            waiting = asyncio.create_task(job.wait({"paused"}, timeout=DEADLINE, interval=0.05))
            attempt.metric(2, loss=3.0)
            await asyncio.to_thread(rig.ship, attempt)
            assert (await anext(points))["loss"] == 3.0
            assert (await job.pause()).status == "pausing"
            await asyncio.to_thread(pause, rig, job.id, attempt)
            assert [point async for point in points] == []
            assert await waiting is job
            assert job.status == "paused"
            assert [point["step"] for point in await job.metrics().to_list()] == [1, 2]
            assert [each.id async for each in client.jobs(status="paused")] == [job.id]
            await job.curve()
            assert "<svg" in job._repr_html_()
            hook = await client.webhooks.create("http://127.0.0.1:9/", events=["job.failed"])
            assert [each["id"] async for each in client.webhooks.list()] == [hook["id"]]
            assert (await client.plan(rig.spec()))["world_size"] == 1
            await job.cancel()
            assert (await job.wait(timeout=DEADLINE)).status == "cancelled"

    asyncio.run(use())
