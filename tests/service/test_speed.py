"""Figures with room to spare: these fail when something has become slow by a factor, not by the weather."""

import json
import time
from typing import Any

from sqlalchemy import insert

from tests.service.conftest import MakeHarness
from tests.service.harness import ServiceHarness
from trainyard.contract.spec import JobSpec
from trainyard.service.auth.principal import LOCAL
from trainyard.service.clock import utc_now
from trainyard.service.db.models import MetricRow
from trainyard.service.jobs import repository


def timed(work: Any) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def test_a_thousand_lines_in_one_batch(any_rig: ServiceHarness) -> None:
    job_id, attempt = any_rig.running(steps=2000)
    for step in range(1, 1001):
        attempt.metric(step)
    seconds = timed(lambda: any_rig.ship(attempt))
    assert len(any_rig.data(job_id, "metrics", limit=2000)) == 1000
    print(f"1,000 lines: {seconds * 1000:.0f} ms")
    assert seconds < 1.0


def test_a_thousand_jobs(any_rig: ServiceHarness) -> None:
    first = any_rig.submit(labels={"a": "b"})
    with any_rig.database.write() as session:
        spec = JobSpec.model_validate_json(json.dumps(repository.find(session, first).spec))
        for _ in range(999):
            repository.create(session, spec, {}, [], LOCAL, utc_now())
    seconds = timed(lambda: any_rig.get("/jobs", limit=100))
    filtered = timed(lambda: any_rig.get("/jobs", limit=100, label="a=b"))
    rounds = timed(any_rig.scheduler.reconcile)
    print(f"of 1,000 jobs: {seconds * 1000:.0f} ms, filtered {filtered * 1000:.0f} ms, a round {rounds * 1000:.0f} ms")
    assert max(seconds, filtered, rounds) < 1.0


def test_from_post_to_launch(make_rig: MakeHarness, sqlite_url: str) -> None:
    rig = make_rig(sqlite_url, scheduling=True)
    waits = []
    for _ in range(5):
        begin = time.perf_counter()
        job_id = rig.submit()
        deadline = time.monotonic() + 10
        while not rig.launcher.living(job_id):
            assert time.monotonic() < deadline
            time.sleep(0.0005)
        waits.append(time.perf_counter() - begin)
        attempt = rig.launcher.of(job_id)
        rig.exit(attempt, "completed", step=1)
    rig.close()
    print(f"POST to launch: {', '.join(f'{w * 1000:.0f}' for w in waits)} ms")
    assert min(waits) < 0.25, "50 ms on a machine that does nothing else"
    assert rig.scheduler.alive is False


def test_buckets_of_a_long_run(rig: ServiceHarness) -> None:
    job_id, _ = rig.running(steps=100_000)
    with rig.database.write() as session:
        point = {"job_id": job_id, "attempt": 1, "stitched": True, "epoch": 0.0, "loss": 1.0, "learning_rate": 1e-3}
        rest = {"tokens": 1, "nonfinite": False, "at": utc_now()}
        session.execute(insert(MetricRow), [{**point, **rest, "seq": 10 + s, "step": s} for s in range(1, 20_001)])
    seconds = timed(lambda: rig.get(f"/jobs/{job_id}/metrics", max_points=1000))
    print(f"1,000 buckets of 20,000 points: {seconds * 1000:.0f} ms")
    assert seconds < 2.0
    assert len(rig.get(f"/jobs/{job_id}/metrics", max_points=1000)["data"]) <= 1000
