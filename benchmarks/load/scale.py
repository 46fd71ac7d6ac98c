"""A large installation without its hosts: 100,000 jobs, 10,000 of which run on 100,000 devices.

The launcher answers that every attempt is alive. Nothing else is replaced: the database, the scheduler's rounds, the
ingest and the pages are those of the service.
"""

import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from sqlalchemy import func, insert, select, text

from benchmarks.load.live import Agent, database
from benchmarks.load.submissions import postgres
from benchmarks.load.tables import Figure, quantile
from benchmarks.load.wire_bytes import Wire
from benchmarks.running import served
from trainyard.contract.spec import JobSpec
from trainyard.contract.status import Desired, JobStatus
from trainyard.service.auth.principal import LOCAL
from trainyard.service.db.engine import Database
from trainyard.service.db.models import AttemptRow, DeviceLeaseRow, EventRow, JobRow, MetricRow
from trainyard.service.devices.inventory import Device
from trainyard.service.ids import token_hash
from trainyard.service.jobs import repository
from trainyard.service.launch.base import AttemptRef, AttemptState, AttemptStatus, Launch
from trainyard.service.scheduler.loop import Scheduler

JOBS = 100_000
RUNNING = 10_000
QUEUED = 1_000
DEVICES_PER_JOB = 10
POINTS_PER_JOB = 50
JOBS_WITH_POINTS = 2_000
AT_ONCE = 5_000
ROUNDS = 10
REQUESTS = 30

NOW = datetime.now(UTC)
"""The time of the scheduler, which stands still: no attempt becomes silent during the rounds."""

REPORTING = 16
POINTS_PER_REPORT = 500
REPORT_SECONDS = 15.0

PAGES = (
    "/jobs?limit=20",
    "/jobs?limit=100&fields=summary",
    "/jobs?limit=20&order=score",
    "/jobs?limit=20&status=running",
    "/jobs?limit=20&group=sweep-7&order=score",
    "/jobs?limit=20&name=run 99999",
)


class AliveLauncher:
    """Answers that every attempt is alive. It is never asked to start one: all devices are leased."""

    def start(self, launch: Launch) -> None:
        raise AssertionError(f"{launch.name} was started although every device is leased")

    def find(self, name: AttemptRef) -> AttemptStatus:  # noqa: ARG002 - the protocol names it
        return AttemptStatus(AttemptState.ALIVE)

    def find_alive(self, names: Sequence[AttemptRef]) -> set[AttemptRef]:
        return set(names)

    def stop(self, name: AttemptRef) -> None:
        pass

    def save(self, name: AttemptRef) -> None:
        pass

    def kill(self, name: AttemptRef) -> None:
        pass

    def write_settings(self, name: AttemptRef, settings: Any) -> None:
        pass

    def unacked_lines(self, name: AttemptRef, after_seq: int, limit: int) -> list[dict[str, Any]]:  # noqa: ARG002
        return []


@dataclass(frozen=True)
class LeasedInventory:
    """The devices of all running jobs."""

    fixed: tuple[Device, ...]

    def devices(self) -> Sequence[Device]:
        return self.fixed


def measure() -> Iterator[Figure]:
    yield from _measure_on("SQLite", "")
    with postgres() as url:
        yield from _measure_on("Postgres", url)
        yield from _ingest(url)


def _measure_on(name: str, url: str) -> Iterator[Figure]:
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder) / "home"
        with _opened(home, url) as opened:
            yield from _fill(name, opened, Path(folder))
            yield from _rounds(name, opened)
        yield from _pages(name, home, url)


@contextmanager
def _opened(home: Path, url: str) -> Iterator[Database]:
    if not url:
        with database(home) as opened:
            yield opened
        return
    home.mkdir()
    opened = Database(url)
    opened.upgrade(home / "migrate.lock")
    try:
        yield opened
    finally:
        opened.close()


def _fill(name: str, opened: Database, folder: Path) -> Iterator[Figure]:
    """Store the jobs with their attempts, leases, events and points; yield the bytes of each."""
    template = _template(opened, folder)
    yield _grown(name, "job, without its events and points", opened, JOBS, lambda: _add_jobs(opened, template))
    running = JOBS - QUEUED - RUNNING, JOBS - QUEUED
    _add_attempts(opened, range(*running))
    events = JOBS_WITH_POINTS * 10
    yield _grown(name, "event", opened, events, lambda: _add_events(opened, events))
    points = JOBS_WITH_POINTS * POINTS_PER_JOB
    yield _grown(name, "point of a curve", opened, points, lambda: _add_points(opened, points))


def _template(opened: Database, folder: Path) -> dict[str, Any]:
    """Return the columns of a job that was submitted through the service's own code."""
    corpus = folder / "corpus.jsonl"
    corpus.write_text('{"text": "one"}\n')
    spec = JobSpec.model_validate({"data": {"data_path": str(corpus)}, "labels": {"team": "speech"}})
    facts = {"steps": 1000, "tokens_per_step": 32768.0, "steps_per_epoch": 1000, "parameters": 64_000_000}
    with opened.write() as session:
        job = repository.create(session, spec, facts, [], LOCAL, datetime.now(UTC))
        columns = {
            column.key: getattr(job, column.key) for column in JobRow.__table__.columns if column.key != "number"
        }
        session.delete(job)
    progress = {"step": 1000, "loss": 3.21, "learning_rate": 1e-4, "tokens": 32_768_000, "tokens_per_second": 1e5}
    return {**columns, "progress": progress, "score_metric": "loss", "score_step": 1000}


def job_id(number: int) -> str:
    """Return the id of a job of this benchmark: digits as letters, as in all ids."""
    return "job_" + str(number).translate(str.maketrans("0123456789", "abcdefghij"))


def _status(number: int) -> JobStatus:
    if number >= JOBS - QUEUED:
        return JobStatus.QUEUED
    if number >= JOBS - QUEUED - RUNNING:
        return JobStatus.RUNNING
    return (JobStatus.SUCCEEDED, JobStatus.SUCCEEDED, JobStatus.SUCCEEDED, JobStatus.FAILED, JobStatus.CANCELLED)[
        number % 5
    ]


def _add_jobs(opened: Database, template: dict[str, Any]) -> None:
    now = datetime.now(UTC)
    for first in range(0, JOBS, AT_ONCE):
        rows = [
            {
                **template,
                "id": job_id(number),
                "name": f"run {number}",
                "group_name": f"sweep-{number // 20}",
                "status": _status(number),
                "desired": Desired.RUN,
                "ranks": DEVICES_PER_JOB,
                "device": "cuda",
                "attempt": 0 if _status(number) is JobStatus.QUEUED else 1,
                "score": 2 + number % 997 / 997,
                "created_at": now,
                "queued_at": now - timedelta(seconds=JOBS - number),
                "heard_at": NOW,
            }
            for number in range(first, first + AT_ONCE)
        ]
        with opened.write() as session:
            session.execute(insert(JobRow), rows)


def _add_attempts(opened: Database, numbers: Sequence[int]) -> None:
    now = datetime.now(UTC)
    for first in range(numbers[0], numbers[-1] + 1, AT_ONCE):
        chosen = range(first, min(first + AT_ONCE, numbers[-1] + 1))
        attempts, leases = [], []
        for number in chosen:
            begin = (number - numbers[0]) * DEVICES_PER_JOB
            devices = [f"cuda:{device}" for device in range(begin, begin + DEVICES_PER_JOB)]
            attempt = {
                "id": f"att_scale{number:06d}",
                "job_id": job_id(number),
                "number": 1,
                "token_sha256": token_hash(_token(number)),
                "trigger": "submit",
                "devices": devices,
                "acked_seq": 0,
                "created_at": now,
                "launched_at": now,
                "heard_at": NOW,
                "launcher": "local",
            }
            attempts.append(attempt)
            leases += [{"device": name, "attempt_id": attempt["id"], "job_id": job_id(number)} for name in devices]
        with opened.write() as session:
            session.execute(insert(AttemptRow), attempts)
            session.execute(insert(DeviceLeaseRow), leases)


def _token(number: int) -> str:
    return f"scale-token-{number}"


def _add_events(opened: Database, count: int) -> None:
    now = datetime.now(UTC)
    data = {"to": "running", "devices": ["cuda:0"]}
    same = {
        "attempt": 1,
        "kind": "status",
        "actor": "scheduler",
        "message": "queued -> running",
        "data": data,
        "at": now,
    }
    for first in range(0, count, AT_ONCE):
        with opened.write() as session:
            session.execute(
                insert(EventRow), [{**same, "job_id": job_id(n // 10)} for n in range(first, first + AT_ONCE)]
            )


def _add_points(opened: Database, count: int) -> None:
    now = datetime.now(UTC)
    same = {"attempt": 1, "stitched": True, "epoch": 0.5, "learning_rate": 1e-3, "nonfinite": False, "at": now}
    shape = {"loss": 3.21, "grad_norm": 0.41, "tokens_per_second": 1e5, "step_seconds": 0.3, "data_seconds": 1e-3}
    shape |= {"memory_bytes": 60_000_000_000, "mfu": 0.4, "bpb": 1.01, "train_seconds": 12.5}
    for first in range(0, count, AT_ONCE):
        rows = []
        for number in range(first, first + AT_ONCE):
            step = number % POINTS_PER_JOB + 1
            point = {"job_id": job_id(number // POINTS_PER_JOB), "seq": step, "step": step, "tokens": step * 32768}
            rows.append({**same, **shape, **point})
        with opened.write() as session:
            session.execute(insert(MetricRow), rows)


def _grown(name: str, what: str, opened: Database, count: int, add: Callable[[], None]) -> Figure:
    """Run ``add``; return the bytes by which the database has grown for each of ``count``, indexes included."""
    before = _size(opened)
    add()
    return Figure(f"{name}: bytes of a {what}", (_size(opened) - before) / count, "B")


def _size(opened: Database) -> int:
    with opened.read() as session:
        if opened.is_sqlite:
            pages, size = session.scalar(text("PRAGMA page_count")), session.scalar(text("PRAGMA page_size"))
            return int(pages or 0) * int(size or 0)
        return int(session.scalar(text("SELECT pg_database_size(current_database())")) or 0)


def _rounds(name: str, opened: Database) -> Iterator[Figure]:
    """Run rounds of the scheduler: the first inspects every attempt, the others are those of a steady state."""
    devices = tuple(Device(f"cuda:{number}", "cuda") for number in range(RUNNING * DEVICES_PER_JOB))
    scheduler = Scheduler(opened, AliveLauncher(), LeasedInventory(devices), clock=lambda: NOW)
    took = []
    for _ in range(ROUNDS):
        began = time.thread_time()
        scheduler.reconcile()
        took.append(time.thread_time() - began)
    size = f"{RUNNING:,} attempts, {len(devices):,} devices, {QUEUED:,} queued"
    yield Figure(f"{name}: first round, {size}", 1000 * took[0], "ms")
    yield Figure(f"{name}: a round", 1000 * statistics.median(took[1:]), "ms", 1000)


def _pages(name: str, home: Path, url: str) -> Iterator[Figure]:
    environment = {"TRAINYARD_DATABASE_URL": url} if url else {}
    with served(home, home.parent, arguments=["--no-scheduler"], **environment) as service, Wire(service.url) as wire:
        for path in PAGES:
            took, found = [], []
            for _ in range(REQUESTS):
                begin = time.perf_counter()
                found = wire.json("GET", path.replace(" ", "%20"))["data"]
                took.append(1000 * (time.perf_counter() - begin))
            assert found, path
            yield Figure(f"{name}, {JOBS:,} jobs: {path}, median", quantile(took, 0.5), "ms", 50)


def _ingest(url: str) -> Iterator[Figure]:
    """Reports of many running jobs, each of hundreds of points, as after an outage; on the full database."""
    agents = [
        Agent(job_id(number), f"att_scale{number:06d}", _token(number))
        for number in range(JOBS - QUEUED - RUNNING, JOBS - QUEUED - RUNNING + REPORTING)
    ]
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder) / "home"
        with served(home, home, arguments=["--no-scheduler"], TRAINYARD_DATABASE_URL=url) as service:
            began, end = time.monotonic(), time.monotonic() + REPORT_SECONDS
            spent = service.cpu_seconds
            threads = [threading.Thread(target=_report, args=(service.url, agent, end)) for agent in agents]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            seconds, spent = time.monotonic() - began, service.cpu_seconds - spent
    opened = Database(url)
    with opened.read() as session:
        of_agents = MetricRow.job_id.in_([agent.job_id for agent in agents])
        stored = session.scalar(select(func.count()).select_from(MetricRow).where(of_agents)) or 0
    opened.close()
    acked = sum(agent.acked for agent in agents)
    label = f"Postgres: points a second, reports of {POINTS_PER_REPORT}"
    yield Figure(label, stored / seconds, "/s", 10_000, is_limit=False)
    yield Figure("Postgres: CPU of the service a thousand points", 1e6 * spent / stored, "ms")
    yield Figure("points acknowledged and not stored", abs(acked - stored), "", 0.5)


def _report(url: str, agent: Agent, end: float) -> None:
    with Wire(url, agent.token) as wire:
        while time.monotonic() < end:
            for _ in range(POINTS_PER_REPORT):
                agent.metric()
            agent.upload(wire, POINTS_PER_REPORT)
