"""Processor time of each kind of request: the figure that other work on the host changes least."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.load import live
from benchmarks.load.live import Agent
from benchmarks.load.tables import Figure
from benchmarks.load.wire_bytes import Wire
from benchmarks.running import Served, served
from trainyard.contract.rundir import RunDir
from trainyard.service.clock import utc_now
from trainyard.service.db.engine import Database
from trainyard.service.jobs import repository
from trainyard.service.jobs.repository import EventDraft

JOBS = 30
EVENTS = 50
POINTS = 2000
REQUESTS = 300
"""Requests of each kind: many, because the kernel counts processor time in hundredths of a second."""

GOALS = {"a job": 1300, "a page of 20 jobs": 3000, "a submission": 2800}
"""Microseconds."""

Request = Callable[[], Any]


@contextmanager
def served_jobs() -> Iterator[tuple[Served, Agent, Wire, Path]]:
    """Yield a service with JOBS jobs, the agent of the one with events, a log and points, its connection, a corpus."""
    with live.home_with_jobs(JOBS) as (home, [agent, *_]):
        with live.database(home) as database:
            add_events(database, agent)
        write_log(home, agent)
        with served(home, home.parent, arguments=["--no-scheduler"]) as service:
            with Wire(service.url, agent.token) as reporting:
                add_points(reporting, agent)
                yield service, agent, reporting, home.parent / "corpus.jsonl"


def measure() -> Iterator[Figure]:
    """Send one request at a time, on SQLite; the kernel's time for the process is included."""
    with served_jobs() as (service, agent, reporting, corpus), Wire(service.url) as wire:
        for kind, request in _kinds(wire, reporting, agent, corpus).items():
            yield Figure(f"processor time: {kind}", _cost(service, request), "us", GOALS.get(kind))


def _kinds(wire: Wire, reporting: Wire, agent: Agent, corpus: Path) -> dict[str, Request]:
    job, spec = f"/jobs/{agent.job_id}", {"data": {"data_path": str(corpus)}, "resources": {"device": "cpu"}}

    def report() -> None:
        agent.metric()
        agent.upload(reporting)

    return {
        "/health": lambda: wire.json("GET", "/health"),
        "a job": lambda: wire.json("GET", job),
        "a page of 20 jobs": lambda: wire.json("GET", "/jobs?limit=20"),
        f"its {EVENTS} events": lambda: wire.json("GET", f"{job}/events?limit={EVENTS}"),
        "100 lines of its log": lambda: wire.json("GET", f"{job}/logs?tail=100"),
        "its curve as 500 rows": lambda: wire.json("GET", f"{job}/metrics?max_points=500"),
        "the devices": lambda: wire.json("GET", "/devices"),
        "a change of its labels": lambda: wire.json("PATCH", job, {"labels": {"looked": "at"}}),
        "a point that is reported": report,
        "a submission": lambda: wire.json("POST", "/jobs", spec),
    }


def _cost(service: Served, request: Request) -> float:
    """Return the microseconds of processor time per request."""
    for _ in range(REQUESTS // 10):
        request()
    before = service.cpu_seconds
    for _ in range(REQUESTS):
        request()
    return 1e6 * (service.cpu_seconds - before) / REQUESTS


def add_events(database: Database, agent: Agent) -> None:
    """Add some events to the agent's job."""
    with database.write() as session:
        job = repository.find(session, agent.job_id)
        for number in range(EVENTS):
            repository.record_event(
                session, job, EventDraft("changed", f"the {number}th of them", "local", 1), utc_now()
            )


def write_log(home: Path, agent: Agent) -> None:
    """Write the log of the job's rank."""
    log = RunDir(home / "runs" / agent.job_id).attempt(1).rank_log(0)
    log.parent.mkdir(parents=True)
    log.write_text("".join(f"step {step}: loss 2.0\n" for step in range(5000)))


def add_points(wire: Wire, agent: Agent) -> None:
    """Report a curve for the agent's job."""
    for _ in range(POINTS):
        agent.metric()
    while agent.acked < POINTS:
        agent.upload(wire)
