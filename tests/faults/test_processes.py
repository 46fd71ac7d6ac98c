"""The faults of processes: what the user sees of each. The invariants are checked after every one by `make_home`."""

import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from datetime import UTC, datetime
from typing import Any

import httpx2
import pytest

from tests.faults.conftest import MakeHome
from tests.faults.forked_service import FAKE_AGENT
from tests.faults.invariants import check_weights
from tests.faults.service_home import Home, cpu_seconds, until
from trainyard.contract.processes import ProcessIdentity
from trainyard.contract.rundir import read_json

pytestmark = pytest.mark.long


def soak(*values: Any) -> Any:
    """A case of the long form only; one that is like it is in the short one."""
    return pytest.param(values if len(values) == 1 else values[0], *values[1:], marks=pytest.mark.soak)


@pytest.mark.parametrize(
    "down",
    [
        0.0,
        *(pytest.param(seconds, marks=pytest.mark.soak) for seconds in (1.0, 20.0, 60.0)),
        pytest.param(900.0, marks=[pytest.mark.soak, pytest.mark.timeout(2400)]),
    ],
)
def test_the_server_killed_and_away_costs_nothing(home: Home, down: float) -> None:
    pace = 0.02 if down < 100 else 0.2  # the curve of a quarter of an hour is read as one page
    steps = 60 if down < 5 else int(1.2 * down / pace)
    job_id = home.submit(steps=str(steps), pace=str(pace))
    until(lambda: home.step(job_id) >= 5, home.patience)
    home.kill()
    time.sleep(down)
    # On a busy host the time of the processes before it in the queue does not count.
    took = home.start()
    assert min(took, cpu_seconds(home)) < 5
    job = home.wait(job_id, "succeeded", seconds=300 + down)
    assert job["attempt"] == 1
    assert [row["step"] for row in home.metrics(job_id)] == list(range(1, steps + 1))
    check_weights(home, job_id, steps)


@pytest.mark.parametrize(
    ("fault", "status", "reason", "said"),
    [
        ("none", "succeeded", None, "finished at step 12"),
        soak("exit_1_at_8", "interrupted", "worker_crashed", "rank 0 ended with exit code 1 at step 7"),
        soak("signal_11_at_8", "interrupted", "worker_crashed", "rank 0 was killed by SIGSEGV at step 7"),
        ("signal_9_at_8", "interrupted", "worker_crashed", "rank 0 was killed by SIGKILL at step 7"),
    ],
)
def test_what_ended_while_the_server_was_away_has_its_true_end_and_time(
    make_home: MakeHome, fault: str, status: str, reason: str | None, said: str
) -> None:
    home = make_home(scale=4.0)
    home.start()
    job_id = home.submit(steps="12", pace="0.05", fault=fault)
    until(lambda: home.step(job_id) >= 2)
    home.kill()
    report = home.run(job_id).attempt(1).exit
    until(report.exists)
    ended, seen = datetime.fromisoformat(str((read_json(report) or {})["ended_at"])), datetime.now(UTC)
    assert ended < seen
    home.start()
    job = home.wait(job_id, status)
    assert job["reason"] == reason
    assert said in job["message"]
    attempt = home.get(f"/jobs/{job_id}/attempts").json()["data"][0]
    assert datetime.fromisoformat(attempt["ended_at"]) == ended, "not the time at which the server learned of it"


@pytest.mark.parametrize(
    ("forged", "reason"),
    [
        ({}, "agent_lost"),
        pytest.param({"start_ticks": 10**12}, "agent_lost", marks=pytest.mark.soak),
        pytest.param({"boot_id": "another boot"}, "host_restarted", marks=pytest.mark.soak),
        ({"pid_namespace": "pid:[1]"}, "host_restarted"),
    ],
)
def test_a_stranger_with_the_agent_s_pid_is_never_signalled(
    make_home: MakeHome, forged: dict[str, Any], reason: str
) -> None:
    # Waits four times as long as usual: on a busy host the restart must not come before the resume.
    home = make_home(scale=4.0)
    home.start()
    job_id = home.submit(steps="100000")
    until(lambda: home.step(job_id) >= 6)
    home.kill()
    for role in ("agent", "torchrun", "rank"):
        for process in home.named(job_id, role):
            process.send(signal.SIGKILL)
    stranger = subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(100)"])
    try:
        identity = ProcessIdentity.of(stranger.pid)
        assert identity is not None
        started = home.run(job_id).attempt(1).started
        record = read_json(started)
        assert record is not None
        started.write_text(json.dumps({**record, "agent": {**identity.to_json(), **forged}}))
        home.start()
        job = home.wait(job_id, "interrupted")
        assert job["reason"] == reason
        assert home.post(f"/jobs/{job_id}/resume").status_code == 202
        until(lambda: home.step(job_id, 2) > 6)
        assert stranger.poll() is None
    finally:
        stranger.kill()
        stranger.wait()
    home.post(f"/jobs/{job_id}/kill")
    home.wait(job_id, "cancelled")


@pytest.mark.parametrize("roles", [("agent", "torchrun"), soak("agent"), soak("torchrun"), soak("rank")])
def test_whatever_is_killed_the_run_goes_on_and_ends_the_same(home: Home, roles: tuple[str, ...]) -> None:
    # The first attempt cannot end before it is killed.
    job_id = home.submit(steps="150", fault="file_at_100")
    until(lambda: home.step(job_id) >= 12)
    victims = [home.named(job_id, role)[0] for role in roles]
    others = [member.process for member in home.processes(job_id)]
    for victim in victims:
        victim.send(signal.SIGKILL)
    until(lambda: not [process for process in others if process.alive()], what="no orphan")
    job = home.wait(job_id, "succeeded")
    assert job["attempt"] == 2
    assert [row["step"] for row in home.metrics(job_id)] == list(range(1, 151))
    check_weights(home, job_id, 150)


def test_agent_and_server_killed_leaves_no_orphan(home: Home) -> None:
    job_id = home.submit(steps="150", fault="file_at_100")
    until(lambda: home.step(job_id) >= 12)
    home.kill()
    home.named(job_id, "agent")[0].send(signal.SIGKILL)
    home.start()
    job = home.wait(job_id, "succeeded")
    assert job["attempt"] == 2
    check_weights(home, job_id, 150)


def test_a_data_loader_that_ignores_sigterm_ends_with_its_attempt(home: Home) -> None:
    job_id = home.submit(steps="20", fault="loader_at_5")
    home.wait(job_id, "succeeded")
    until(lambda: not home.named(job_id, "rank"))


def test_sigterm_under_load_finishes_requests_and_touches_no_worker(home: Home) -> None:
    job_id = home.submit(steps="200", fault="file_at_60")
    until(lambda: home.step(job_id) >= 5)
    answers: list[int | str] = []
    stopping = threading.Event()

    def ask() -> None:
        while not stopping.is_set():
            try:
                answers.append(home.get(f"/jobs/{job_id}").status_code)
            except httpx2.ConnectError:
                return  # it is down: no request was accepted
            except httpx2.TransportError as error:
                answers.append(type(error).__name__)

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    until(lambda: len(answers) > 50)
    before = home.step(job_id)
    home.go_on(job_id)
    home.signal(signal.SIGTERM)
    home.wait_down()
    stopping.set()
    for thread in threads:
        thread.join()
    # A connection that was idle when the server left is closed without an answer; no request gets half of one.
    assert set(answers) <= {200, "ReadError", "RemoteProtocolError"}
    assert answers.count(200) >= len(answers) - len(threads)
    until(lambda: home.step(job_id) > before + 3)
    home.start()
    assert home.wait(job_id, "succeeded")["attempt"] == 1
    check_weights(home, job_id, 200)


@pytest.mark.parametrize("count", [5, pytest.param(20, marks=pytest.mark.soak)])
def test_many_jobs_at_once(make_home: MakeHome, count: int) -> None:
    home = make_home(slots=count)
    home.start()
    jobs = [home.submit(steps="10", pace="0.05", ranks="1") for _ in range(count)]
    for job_id in jobs:
        home.wait(job_id, "succeeded")
        check_weights(home, job_id, 10)


def test_a_crash_at_step_0_again_is_given_up(home: Home) -> None:
    job_id = home.submit(max_restarts=3, fault="exit_13_at_0", always="1")
    job = home.wait(job_id, "failed")
    assert job["reason"] == "max_restarts"
    assert "2 attempts in a row made no step, so it is given up after 1 of 3 restarts" in job["message"]
    assert "about to end with exit code 13" in job["error"]["traceback"]
    assert len(home.get(f"/jobs/{job_id}/attempts").json()["data"]) == 2


def test_a_crash_again_and_again_uses_up_the_restarts(home: Home) -> None:
    job_id = home.submit(max_restarts=2, fault="exit_13_at_7", always="1")
    job = home.wait(job_id, "failed")
    assert job["reason"] == "max_restarts"
    assert "all 2 restarts are used up" in job["message"]
    assert "about to end with exit code 13" in job["error"]["traceback"]
    attempts = home.get(f"/jobs/{job_id}/attempts").json()["data"]
    assert len(attempts) == 3
    times = [datetime.fromisoformat(attempt["created_at"]) for attempt in attempts]
    waits = [(later - earlier).total_seconds() for earlier, later in itertools.pairwise(times)]
    assert waits[0] >= 0.5  # 5 s and 20 s, a tenth of each
    assert waits[1] >= 2.0


def test_cancel_while_starting(home: Home) -> None:
    job_id = home.submit(steps="3000")
    until(lambda: home.job(job_id)["status"] in ("starting", "running"))
    assert home.post(f"/jobs/{job_id}/cancel").status_code == 202
    home.wait(job_id, "cancelled")


LATE_AGENT = """
import os, sys, time
while not os.path.exists(os.path.join(sys.argv[2], "go")):
    time.sleep(0.01)
os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
"""
"""An agent that begins once the test says so: until then its job is starting."""


def test_cancel_just_before_the_server_dies_stays_a_cancel(make_home: MakeHome) -> None:
    home = make_home(agent=[sys.executable, "-S", "-c", LATE_AGENT, FAKE_AGENT[1]])
    home.start()
    job_id = home.submit(steps="100000")
    until(lambda: home.job(job_id)["status"] == "starting")
    assert home.post(f"/jobs/{job_id}/cancel").status_code == 202
    home.kill()
    home.start()
    home.go_on(job_id)
    assert home.wait(job_id, "cancelled")["attempt"] == 1


def test_finish_against_cancel_has_one_truth(home: Home) -> None:
    ends = set()
    for step in (6, 7, 8, 9):
        job_id = home.submit(steps="10", pace="0.01")
        home.reach(job_id, step)
        assert home.post(f"/jobs/{job_id}/cancel").status_code in (202, 409)
        job = home.wait(job_id, "cancelled", "succeeded")
        ends.add(job["status"])
        done = (read_json(home.run(job_id).attempt(1).outcome) or {}).get("outcome") == "completed"
        assert (job["status"] == "succeeded") == done
    assert ends


def test_no_zombie_is_left_of_jobs_that_ended(home: Home) -> None:
    """Each job's agent is the server's child: a server that never waits for them runs out of pids one day."""
    for _ in range(3):
        home.wait(home.submit(steps="2", ranks="1"), "succeeded")
    assert home.service is not None
    parent = home.service.pid
    until(lambda: zombies(parent) <= 1)


def zombies(parent: int) -> int:
    found = 0
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                with open(f"/proc/{entry}/stat") as file:
                    state, ppid = file.read().rpartition(")")[2].split()[:2]
            except OSError:
                continue
            found += state == "Z" and int(ppid) == parent
    return found


def test_an_agent_that_cannot_begin_is_given_up_with_what_it_said(make_home: MakeHome) -> None:
    """Not counted as a restart, it would be launched again and again for ever."""
    home = make_home(agent=[sys.executable, "-S", "-c", "raise SystemExit('no module named torchlight')"])
    home.start()
    job_id = home.submit(max_restarts=1)
    job = home.wait(job_id, "failed")
    assert job["reason"] == "max_restarts"
    assert "the attempt's agent ended before it began: no module named torchlight" in job["message"]
    assert len(home.get(f"/jobs/{job_id}/attempts").json()["data"]) == 2
