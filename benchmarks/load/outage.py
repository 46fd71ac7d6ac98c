"""A day without a service: the outbox it leaves, what a retry costs meanwhile, and how fast the service catches up."""

import time
from collections.abc import Iterator
from pathlib import Path

from sqlalchemy import func, select

from benchmarks.load import live
from benchmarks.load.tables import Figure
from benchmarks.running import served
from trainyard.contract.events import MetricEvent
from trainyard.contract.rundir import AttemptDir, RunDir
from trainyard.service.db.models import MetricRow
from trainyard.worker.agent.uploader import EventUploader, ReportEndpoint
from trainyard.worker.events.writer import EventWriter

DAY_POINTS = 86_400
"""One point a second."""

RETRIES = 200
NOT_LISTENING = "http://127.0.0.1:9"


def measure() -> Iterator[Figure]:
    """One run that makes a point a second; the service is on SQLite."""
    with live.home_with_jobs(1) as (home, (agent,)):
        attempt = RunDir(home / "runs" / agent.job_id).attempt(1)
        attempt.path.mkdir(parents=True)
        _write_day(attempt)
        yield Figure("outbox of a day, a point a second", attempt.outbox.stat().st_size / 1e6, "MB")
        yield Figure("CPU of a retry without a service", 1e6 * _retry_seconds(attempt), "us")
        seconds = _catch_up(home, attempt, agent.attempt_id, agent.token)
        with live.database(home) as database, database.read() as session:
            stored = session.scalar(select(func.count()).select_from(MetricRow)) or 0
    yield Figure("lines a second until the service has caught up, SQLite", DAY_POINTS / seconds, "/s")
    yield Figure("lines lost", DAY_POINTS - stored, "", 0.5)


def _write_day(attempt: AttemptDir) -> None:
    with EventWriter(attempt.outbox) as outbox:
        for step in range(1, DAY_POINTS + 1):
            outbox.emit(_point(step))


def _point(step: int) -> MetricEvent:
    """Return a point with every field that a dense run on one rank fills in."""
    return MetricEvent(
        step=step,
        epoch=step / 20_000,
        loss=2.0 + 8.0 / step,
        learning_rate=5e-4 * (1 - step / DAY_POINTS),
        grad_norm=0.8123456789,
        tokens=step * 32_768,
        tokens_per_second=32_768.123456,
        mfu=0.4123456789,
        step_seconds=1.0000123456,
        data_seconds=0.0001234567,
        memory_bytes=8_123_456_789,
        train_seconds=step * 1.0000123456,
        bpb=1.0123456789,
    )


def _retry_seconds(attempt: AttemptDir) -> float:
    uploader = EventUploader(attempt, ReportEndpoint(NOT_LISTENING, "att", "token", None))
    uploader.poll()
    began = time.process_time()
    for _ in range(RETRIES):
        uploader.poll()
    return (time.process_time() - began) / RETRIES


def _catch_up(home: Path, attempt: AttemptDir, attempt_id: str, token: str) -> float:
    # Without a scheduler: it would end an attempt that has no processes.
    with served(home, home.parent, arguments=["--no-scheduler"]) as service:
        uploader = EventUploader(attempt, ReportEndpoint(service.url, attempt_id, token, None))
        began = time.perf_counter()
        while uploader.acked < DAY_POINTS:
            uploader.poll()
        return time.perf_counter() - began
