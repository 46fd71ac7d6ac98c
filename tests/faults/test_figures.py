"""How fast: a rank's death is noticed, the others are ended, the run trains again. Real torchrun, gloo, two ranks.

Times are of an idle host; on a busy one they are printed, and only what takes no processor time is asserted strictly.
"""

import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks.corpus import write_docstrings
from tests import soak_report
from tests.faults.conftest import MakeHome
from tests.faults.service_home import Home, until
from tests.faults.test_kills import gloo_spec
from tests.faults.test_time import slowness
from tests.soak_report import SoakReport
from trainyard.contract.processes import ProcessIdentity
from trainyard.contract.rundir import AttemptDir
from trainyard.worker.checkpoint.files import verify

NOTICED_SECONDS = 2.0
TRAINING_SECONDS = 15.0
ORPHAN_SECONDS = 1.0


class Run:
    """A real run that makes steps for long, and one look at it after the other."""

    def __init__(self, home: Home, corpus: Path) -> None:
        self.home = home
        spec = gloo_spec(corpus, {})
        spec["training"]["max_steps"] = 100_000
        answer = home.post("/jobs", spec)
        assert answer.status_code == 201, answer.text
        self.job_id = str(answer.json()["id"])

    def attempt(self, number: int) -> AttemptDir:
        return self.home.run(self.job_id).attempt(number)

    def trains(self, number: int, beyond: int) -> None:
        until(lambda: (self.attempt(number).read_step() or 0) > beyond, 120, f"attempt {number} trains")

    def end(self) -> None:
        self.home.post(f"/jobs/{self.job_id}/kill")
        self.home.wait(self.job_id, "cancelled")


def seconds_until(condition: Callable[[], object], what: str) -> float:
    began = time.monotonic()
    until(condition, 120, what)
    return time.monotonic() - began


def gone(processes: list[ProcessIdentity]) -> Callable[[], bool]:
    return lambda: not any(process.alive() for process in processes)


@pytest.fixture
def run(make_home: MakeHome) -> Run:
    home = make_home(slots=2, scale=1.0, real_ranks=True)
    home.damage = verify
    write_docstrings(home.path / "docstrings.jsonl", 400)
    home.start()
    return Run(home, home.path / "docstrings.jsonl")


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_a_dead_rank(run: Run, account: SoakReport) -> None:
    """From the SIGKILL of a rank to the report, to the end of its peers, to the first step of the next attempt."""
    number = 1
    for _ in range(int(soak_report.chosen("RANK_DEATHS", 3))):
        run.trains(number, (run.attempt(number).read_step() or 0) + 8)
        noticed, again, loading = death(run, account, number)
        assert noticed < NOTICED_SECONDS * slowness()
        assert again - loading < TRAINING_SECONDS
        # A resume resets the count of restarts: each death meets the first back-off, of 5 s.
        run.home.post(f"/jobs/{run.job_id}/pause")
        run.home.wait(run.job_id, "paused")
        run.home.post(f"/jobs/{run.job_id}/resume")
        number += 2
    account.invariants.append("noticed within 2 s, training again within 15 s plus the time to load")
    run.end()


def death(run: Run, account: SoakReport, number: int) -> tuple[float, float, float]:
    """Seconds until nothing of the attempt lives, until the next one trains, and how long that one loads."""
    ranks = run.home.named(run.job_id, "rank")
    began = time.monotonic()
    ranks[-1].send(signal.SIGKILL)
    noticed = seconds_until(gone(ranks), "all ranks are gone")
    account.figure("a rank is killed -> the others have ended, s", noticed)
    until(lambda: run.home.job(run.job_id)["status"] != "running", 20, "the job says so")
    account.figure("a rank is killed -> the API says so, s", time.monotonic() - began)
    following = run.attempt(number + 1)
    until(following.spec.exists, 60, "the next attempt")
    launched = time.monotonic()
    run.trains(number + 1, 0)
    again, loading = time.monotonic() - began, time.monotonic() - launched
    account.figure("a rank is killed -> training again, s", again)
    account.figure("of which the next attempt loads, s", loading)
    account.faults["rank killed"] += 1
    return noticed, again, loading


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_orphaned_ranks(run: Run, account: SoakReport) -> None:
    """torchrun killed: its ranks would train for ever. The agent ends them."""
    run.trains(1, 5)
    ranks, torchrun = run.home.named(run.job_id, "rank"), run.home.named(run.job_id, "torchrun")[0]
    torchrun.send(signal.SIGKILL)
    took = seconds_until(gone(ranks), "no orphan")
    account.faults["torchrun killed"] += 1
    account.figure("torchrun is killed -> no orphan, s", took)
    account.invariants.append("an orphaned rank is ended within 1 s")
    assert took < ORPHAN_SECONDS * slowness()
    run.end()
