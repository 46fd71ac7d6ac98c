"""Clocks that are set, servers that sleep, many attempts to find again, ends that meet a cancel."""

import os
import random
import signal
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests import soak_report
from tests.faults.conftest import MakeHome
from tests.faults.invariants import check_weights
from tests.faults.service_home import Home, cpu_seconds, until
from tests.soak_report import SoakReport
from trainyard.contract.rundir import read_json, write_atomically

STUB = [sys.executable, "-S", str(Path(__file__).with_name("idle_agent.py"))]


def set_clock(home: Home, seconds: int) -> None:
    """Set the service's wall clock wrong by ``seconds``. The service reads the file at any time, so it is replaced."""
    write_atomically(home.path / "clock", str(seconds).encode())


@pytest.mark.parametrize("hours", [1, pytest.param(-1, marks=pytest.mark.soak)])
def test_a_clock_set_by_an_hour_declares_nothing_dead(make_home: MakeHome, hours: int) -> None:
    home = make_home(clock=True)
    home.start()
    job_id = home.submit(steps="150", fault="file_at_100")
    home.reach(job_id, 8)
    agent = home.named(job_id, "agent")
    set_clock(home, 3600 * hours)
    home.reach(job_id, 60)
    home.kill()
    set_clock(home, 0)
    home.start()
    assert home.named(job_id, "agent") == agent
    home.go_on(job_id)
    job = home.wait(job_id, "succeeded")
    assert job["attempt"] == 1
    assert [event["kind"] for event in home.get(f"/jobs/{job_id}/events").json()["data"]].count("warning") == 0
    check_weights(home, job_id, 150)


@pytest.mark.parametrize("seconds", [2.0, pytest.param(60.0, marks=pytest.mark.soak)])
def test_a_server_that_slept_kills_nobody(make_home: MakeHome, seconds: float) -> None:
    """All it remembers is old when it wakes: twenty times older than what makes it look (a tenth of 5 s here)."""
    home = make_home(slots=3)
    home.start()
    steps = 100 + 60 * int(seconds)
    jobs = [home.submit(steps=str(steps), ranks="1") for _ in range(3)]
    for job_id in jobs:
        home.reach(job_id, 5)
    home.signal(signal.SIGSTOP)
    time.sleep(seconds)
    home.signal(signal.SIGCONT)
    for job_id in jobs:
        assert home.wait(job_id, "succeeded", seconds=120)["attempt"] == 1
        assert [row["step"] for row in home.metrics(job_id)] == list(range(1, steps + 1))
        check_weights(home, job_id, steps)


@pytest.mark.parametrize(
    ("count", "most"), [(12, 5.0), pytest.param(100, 5.0, marks=[pytest.mark.soak, pytest.mark.timeout(600)])]
)
def test_running_attempts_are_found_again(make_home: MakeHome, account: SoakReport, count: int, most: float) -> None:
    home = make_home(slots=count + 1, agent=STUB)
    home.start()
    jobs = [home.submit(ranks="1") for _ in range(count)]
    for job_id in jobs:
        home.wait(job_id, "running", seconds=200)
    agents = {member.job: member.process for member in home.processes()}
    home.kill()
    began = time.monotonic()
    home.start()
    # Attempts are inspected before anything is launched: once this one is, all the others were found.
    late = home.submit(ranks="1")
    until(lambda: home.job(late)["status"] != "queued")
    took = time.monotonic() - began
    account.faults["running attempt found again after a kill of the server"] += count
    account.figure(f"{count} attempts found again, s", took)
    account.invariants.append("none was restarted, every agent is the same process")
    now = {member.job: member.process for member in home.processes() if member.job != late}
    assert now == agents
    assert {home.job(job_id)["attempt"] for job_id in jobs} == {1}
    # On a busy host the time of the processes before it in the queue does not count.
    assert min(took, cpu_seconds(home)) < most


def slowness() -> float:
    """How many times slower than on an idle host things may be here, by what waits for a core."""
    return max(1.0, 2 * os.getloadavg()[0] / (os.cpu_count() or 1))


def race(home: Home, seed: int) -> str:
    """One job's finish against one cancel; returns what became of it.

    The request takes some ten milliseconds to the ranks: it is sent up to that long before their end, or 5 ms after it.
    """
    dice = random.Random(seed)
    job_id = home.submit(steps="10", pace="0.01", ranks="1")
    home.reach(job_id, dice.randint(2, 9))
    time.sleep(dice.uniform(0, 0.015))
    answered = home.post(f"/jobs/{job_id}/cancel").status_code
    job = home.wait(job_id, "cancelled", "succeeded")
    outcome = (read_json(home.run(job_id).attempt(1).outcome) or {}).get("outcome")
    assert (job["status"] == "succeeded") == (outcome == "completed"), (job, outcome)
    assert answered == 202 or (answered == 409 and job["status"] == "succeeded"), (answered, job["status"])
    return f"{job['status']}, cancel answered {answered}"


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_a_thousand_finishes_against_cancel(make_home: MakeHome, account: SoakReport) -> None:
    home = make_home(slots=4)
    home.start()
    first = soak_report.seed()
    seeds = range(first, first + int(soak_report.chosen("RACES", 1000)))
    with ThreadPoolExecutor(4) as pool:
        ends = Counter(pool.map(lambda seed: race(home, seed), seeds))
    account.faults.update({f"finish against cancel: {end}": count for end, count in ends.items()})
    account.invariants.append("one truth: succeeded exactly if rank 0 had reported completed")
    assert len(ends) > 1, "always the same one was first"
