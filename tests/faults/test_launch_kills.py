"""A server that dies between the commit of a launch, the spawn, and the commit after it: at each line there is."""

import contextlib

import httpx2
import pytest

from tests.faults import invariants
from tests.faults.conftest import MakeHome
from tests.faults.invariants import check_weights
from tests.faults.service_home import Home, until
from tests.soak_report import SoakReport

STEPS = 12
MAX_LINES = 200
SHORT = (24, 40, 52)


def life(home: Home, line: int) -> bool:
    """One job's life with a server that dies at this line of the launch; False where the launch has fewer lines."""
    before = home.log().count("died at")
    home.start(die_at=["launch", line])
    with contextlib.suppress(httpx2.TransportError):  # the answer may be lost with the server; the job is not
        home.submit(steps=str(STEPS), ranks="2", pace="0.01")
    until(lambda: home.log().count("died at") > before or through(home))
    died = home.log().count("died at") > before
    if died:
        home.wait_down()
        home.start()
    job_id = home.get("/jobs").json()["data"][0]["id"]
    job = home.wait(job_id, "succeeded")
    assert job["attempt"] in (1, 2), "requeued or adopted"
    attempts = home.get(f"/jobs/{job_id}/attempts").json()["data"]
    ran = [a for a in attempts if home.run(job_id).attempt(a["number"]).outbox.exists()]
    assert len(ran) == 1, "never both"
    check_weights(home, job_id, STEPS)
    invariants.check(home)
    home.kill()
    return died


def through(home: Home) -> bool:
    """A job has come to its last step."""
    return any(home.step(member.job) >= STEPS for member in home.processes())


@pytest.mark.long
def test_a_server_that_dies_in_a_launch(make_home: MakeHome) -> None:
    home = make_home()
    for line in SHORT:
        assert life(home, line)


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_a_server_that_dies_at_each_line_of_a_launch(make_home: MakeHome, account: SoakReport) -> None:
    home, lines = make_home(), 0
    while life(home, lines + 1):
        lines += 1
        assert lines < MAX_LINES
        account.faults["server killed at a line of a launch"] += 1
    account.invariants.append(f"each of the {lines} lines: requeued or adopted, launched once, nothing lost")
    assert lines > max(SHORT)
