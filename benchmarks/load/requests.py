"""What a request takes of a processor, by what is asked: a figure that other work on the host moves least."""

import tempfile
from collections.abc import Callable, Iterator
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
ASKED = 300
"""Requests of a kind: the kernel counts a process's time in hundredths of a second."""

GOALS = {"a job": 1300, "a page of 20 jobs": 3000, "a submission": 2800}
"""In microseconds."""

Asked = Callable[[], Any]


def measure() -> Iterator[Figure]:
    """On SQLite, one request at a time; what the kernel does for the process is in it."""
    with tempfile.TemporaryDirectory() as folder:
        home, corpus = Path(folder) / "home", Path(folder) / "corpus.jsonl"
        corpus.write_text('{"text": "one"}\n')
        with live.database(home) as made:
            agents = live.running(made, corpus, JOBS)
            _happen(made, agents[0])
        _write_log(home, agents[0])
        with served(home, Path(folder), arguments=["--no-scheduler"]) as service:
            with Wire(service.url) as wire, Wire(service.url, agents[0].token) as reporting:
                _grow(reporting, agents[0])
                for what, ask in _kinds(wire, reporting, agents[0], corpus).items():
                    yield Figure(f"processor time: {what}", _cost(service, ask), "us", GOALS.get(what))


def _kinds(wire: Wire, reporting: Wire, agent: Agent, corpus: Path) -> dict[str, Asked]:
    job, spec = f"/jobs/{agent.job_id}", {"data": {"data_path": str(corpus)}, "resources": {"device": "cpu"}}

    def report() -> None:
        agent.metric()
        agent.ship(reporting)

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


def _cost(service: Served, ask: Asked) -> float:
    """Microseconds of processor time a request."""
    for _ in range(ASKED // 10):
        ask()
    before = service.cpu_seconds
    for _ in range(ASKED):
        ask()
    return 1e6 * (service.cpu_seconds - before) / ASKED


def _happen(made: Database, agent: Agent) -> None:
    with made.write() as session:
        job = repository.find(session, agent.job_id)
        for number in range(EVENTS):
            repository.record_event(
                session, job, EventDraft("changed", f"the {number}th of them", "local", 1), utc_now()
            )


def _write_log(home: Path, agent: Agent) -> None:
    log = RunDir(home / "runs" / agent.job_id).attempt(1).rank_log(0)
    log.parent.mkdir(parents=True)
    log.write_text("".join(f"step {step}: loss 2.0\n" for step in range(5000)))


def _grow(wire: Wire, agent: Agent) -> None:
    for _ in range(POINTS):
        agent.metric()
    while agent.acked < POINTS:
        agent.ship(wire)
