"""How long a starting service needs to find a hundred running attempts again."""

import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.load import live
from benchmarks.load.live import Agent
from benchmarks.load.tables import Figure
from benchmarks.load.wire_bytes import Wire
from benchmarks.running import served, until
from trainyard.contract.processes import MARKER

ATTEMPTS = 100


def measure() -> Iterator[Figure]:
    """Each attempt is a silent process with the attempt's marker, so the service has to look it up."""
    with live.home_with_jobs(ATTEMPTS) as (home, agents):
        processes = [subprocess.Popen(["sleep", "600"], env=_environment(agent)) for agent in agents]
        try:
            took, untouched = _start(home, agents)
        finally:
            for process in processes:
                process.kill()
                process.wait()
    yield Figure(f"{ATTEMPTS} running attempts found again, from the start on", took, "s", 5)
    yield Figure("attempts that were restarted", ATTEMPTS - untouched, "", 0.5)


def _environment(agent: Agent) -> dict[str, str]:
    return {"PATH": os.environ["PATH"], MARKER: f"{agent.job_id}/1", "TRAINYARD_ATTEMPT_TOKEN": agent.token}


def _start(home: Path, agents: list[Agent]) -> tuple[float, int]:
    """Return (seconds until the scheduler launches a new job, attempts that still run undisturbed)."""
    began, corpus = time.monotonic(), home.parent / "corpus.jsonl"
    with served(home, corpus.parent, TRAINYARD_CPU_SLOTS=str(ATTEMPTS + 1)) as service, Wire(service.url) as wire:
        # Attempts are inspected before anything is launched: once this job is, all the others were found.
        late = wire.json("POST", "/jobs", {"data": {"data_path": str(corpus)}, "resources": {"device": "cpu"}})["id"]
        until(lambda: wire.json("GET", f"/jobs/{late}")["status"] != "queued")
        took = time.monotonic() - began
        wire.json("POST", f"/jobs/{late}/kill")
        jobs = [wire.json("GET", f"/jobs/{agent.job_id}") for agent in agents]
        until(lambda: wire.json("GET", f"/jobs/{late}")["status"] in ("cancelled", "failed"))
    return took, sum(_untouched(job) for job in jobs)


def _untouched(job: dict[str, Any]) -> bool:
    return (job["status"], job["attempt"]) == ("running", 1)
