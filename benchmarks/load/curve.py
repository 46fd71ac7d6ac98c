"""The curve of a job of a million points as a thousand rows: time and memory of the request."""

import time
from collections.abc import Iterator
from datetime import UTC, datetime

from sqlalchemy import insert

from benchmarks.load import live
from benchmarks.load.tables import Figure, quantile
from benchmarks.load.wire_bytes import Wire
from benchmarks.running import served
from trainyard.service.db.engine import Database
from trainyard.service.db.models import MetricRow
from trainyard.service.jobs import repository
from trainyard.service.metrics import rollups

POINTS = 1_000_000
AT_ONCE = 20_000
REQUESTS = 40


def measure() -> Iterator[Figure]:
    """Request the whole curve, as an opening page does."""
    with live.home_with_jobs(1) as (home, [agent]):
        job_id = agent.job_id
        with live.database(home) as database:
            fill(database, job_id, POINTS)
        with served(home, home.parent, arguments=["--no-scheduler"]) as service, Wire(service.url) as wire:
            took, rows = [], 0
            memory = 0
            for number in range(REQUESTS):
                begin = time.perf_counter()
                rows = len(wire.json("GET", f"/jobs/{job_id}/metrics?max_points=1000")["data"])
                took.append(1000 * (time.perf_counter() - begin))
                if number == 2:
                    memory = service.memory_bytes
            grown = service.memory_bytes - memory
        assert 400 < rows <= 1000, rows
    yield Figure(f"{POINTS:,} points, max_points=1000: median", quantile(took, 0.5), "ms", 100)
    yield Figure(f"{POINTS:,} points, max_points=1000: worst of {REQUESTS}", max(took[1:]), "ms")
    yield Figure(f"memory that {REQUESTS - 3} more of them add", grown / (1 << 20), "MiB", 8)


def fill(database: Database, job_id: str, points: int) -> None:
    """Store a curve of ``points`` points with its rollups, as ingest does."""
    now = datetime.now(UTC)
    same = {"job_id": job_id, "attempt": 1, "stitched": True, "epoch": 0.0, "learning_rate": 1e-3, "at": now}
    for first in range(1, points + 1, AT_ONCE):
        steps = range(first, min(first + AT_ONCE, points + 1))
        rows = [{**same, "seq": s, "step": s, **_point(s)} for s in steps]
        with database.write() as session:
            session.execute(insert(MetricRow), rows)
            rollups.roll_up(session, repository.lock(session, job_id), steps[-1])


def _point(step: int) -> dict[str, object]:
    timing = {"tokens_per_second": 1e5 + step % 900, "step_seconds": 0.3 + step % 5 / 50, "data_seconds": 0.001}
    shape = {"loss": 2.0 + step % 7, "grad_norm": 0.4 + step % 11 / 20, "memory_bytes": 60_000_000_000}
    return {**timing, **shape, "tokens": step * 32768, "nonfinite": False}
