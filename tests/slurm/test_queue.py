"""Slurm's queue in the API, and users' actions on jobs that wait in it or run. The ranks are fake and fast."""

import contextlib
from typing import Any

import httpx2
import pytest

from tests.faults.invariants import check_weights
from tests.faults.service_home import Home, until
from tests.slurm.cluster import NODES, SECONDS, Cluster
from tests.slurm.conftest import MakeSlurmHome
from tests.slurm.slurm_jobs import attempts, completed, events, fake, in_slurm, submit
from trainyard.contract.rundir import read_json

pytestmark = pytest.mark.long


def waiting(home: Home, job_id: str) -> dict[str, Any]:
    """The job once Slurm has said what it waits for."""

    def reported_reason() -> dict[str, Any] | None:
        job = home.job(job_id)
        return job if job["queue"] and job["queue"]["waiting_for"].startswith("Slurm: ") else None

    found: dict[str, Any] = until(reported_reason, SECONDS, f"Slurm's reason; {home.log()[-2000:]}")
    return found


def test_a_job_waits_for_a_drained_node_and_says_so(cluster: Cluster, slurm_home: MakeSlurmHome) -> None:
    home = slurm_home()
    cluster.drain("node2")
    job_id = submit(home, fake(home, pace="0.05", steps="30"))
    job = waiting(home, job_id)
    assert job["status"] == "starting"
    assert job["queue"]["position"] is None
    assert job["queue"]["waiting_for"] in job["summary"]
    assert job["placement"]["nodes"] == []
    cluster.undrain("node2")
    job = home.wait(job_id, "running")
    until(lambda: home.job(job_id)["placement"]["nodes"] == list(NODES), what="its nodes")
    devices = {each["id"]: each["job_id"] for each in home.get("/devices").json()["data"]}
    assert {name for name, holder in devices.items() if holder == job_id} == {"node1/cpu:0", "node2/cpu:0"}
    job = home.wait(job_id, "succeeded")
    assert (job["attempt"], job["queue"]) == (1, None)
    assert job_id not in [each["job_id"] for each in home.get("/devices").json()["data"]]
    check_weights(home, job_id, 30)


def test_what_waits_is_paused_resumed_cancelled_and_killed(cluster: Cluster, slurm_home: MakeSlurmHome) -> None:
    home = slurm_home()
    for node in NODES:
        cluster.drain(node)
    paused, cancelled, killed = (submit(home, fake(home)) for _ in range(3))
    for job_id, action in ((paused, "pause"), (cancelled, "cancel"), (killed, "kill")):
        waiting(home, job_id)
        assert home.post(f"/jobs/{job_id}/{action}").status_code == 202
    assert home.wait(paused, "paused")["resumable"]
    assert home.wait(cancelled, "cancelled")["reason"] == "user"
    assert home.wait(killed, "cancelled")["reason"] == "user"
    assert [in_slurm(cluster, job_id) for job_id in (paused, cancelled, killed)] == [
        [(f"{job_id}/1", "CANCELLED")] for job_id in (paused, cancelled, killed)
    ]
    for node in NODES:
        cluster.undrain(node)
    assert home.post(f"/jobs/{paused}/resume").status_code == 202
    assert home.wait(paused, "succeeded")["attempt"] == 2
    check_weights(home, paused, 20)


@pytest.mark.soak
def test_a_running_job_saves_and_pauses_and_another_one_is_killed(cluster: Cluster, slurm_home: MakeSlurmHome) -> None:
    home = slurm_home()
    job_id = submit(home, fake(home, pace="0.05", steps="4000", save="10000"))
    home.reach(job_id, 5)
    assert home.post(f"/jobs/{job_id}/pause").status_code == 202
    job = home.wait(job_id, "paused")
    assert job["checkpoint"]["step"] >= 5, "saved inside the grace"
    assert home.post(f"/jobs/{job_id}/resume").status_code == 202
    until(lambda: home.step(job_id, 2) > job["checkpoint"]["step"], what="it goes on")
    assert home.post(f"/jobs/{job_id}/kill").status_code == 202
    # By the agent's word, or by Slurm's where that ended the agent before its last word.
    assert "as asked" in home.wait(job_id, "cancelled")["message"]
    until(lambda: home.processes(job_id) == [], SECONDS, "nothing of it is left on either node")
    until(lambda: set(cluster.states().values()) == {"IDLE"}, SECONDS, "its nodes are free")


def test_two_launchers_in_one_home(cluster: Cluster, slurm_home: MakeSlurmHome) -> None:
    home = slurm_home()
    here = home.submit(steps="10", ranks="1")
    there = submit(home, fake(home, nnodes=1))
    for job_id in (here, there):
        home.wait(job_id, "succeeded")
    assert [attempts(home, job_id)[0]["launcher"] for job_id in (here, there)] == ["local", "slurm"]
    assert (home.job(here)["placement"], attempts(home, here)[0]["devices"]) == (None, ["cpu:0"])
    assert len(in_slurm(cluster, there)) == 1
    number = cluster.jobs()[-1]["job_id"]
    assert read_json(home.run(there).attempt(1).submitted)["slurm_job_id"] == str(number)  # type: ignore[index]


def test_what_slurm_refuses_is_said_and_given_up(cluster: Cluster, slurm_home: MakeSlurmHome) -> None:
    home = slurm_home()
    job_id = submit(home, fake(home, slurm={"partition": "nowhere"}))
    job = home.wait(job_id, "failed", seconds=90)
    assert "partition" in job["error"]["message"].lower()
    assert "sinfo" in job["error"]["hint"]
    assert in_slurm(cluster, job_id) == []


@pytest.mark.parametrize("line", [12, *(pytest.param(n, marks=pytest.mark.soak) for n in (3, 6, 9, 15, 18, 21, 24))])
def test_a_service_that_dies_on_the_way_to_sbatch_submits_once(
    cluster: Cluster, slurm_home: MakeSlurmHome, line: int
) -> None:
    home = slurm_home()
    home.kill()
    home.start(die_at=["slurm", line])
    with contextlib.suppress(httpx2.TransportError):  # it may be gone before it has answered
        submit(home, fake(home, nnodes=1, steps="10"))
    home.wait_down()
    home.start()
    (found,) = home.get("/jobs").json()["data"]
    job_id = found["id"]
    job = home.wait(job_id, "succeeded")
    until(lambda: completed(cluster, job_id), SECONDS, "Slurm has ended it")
    assert completed(cluster, job_id) == [f"{job_id}/{job['attempt']}"], in_slurm(cluster, job_id)
    assert [event["kind"] for event in events(home, job_id)].count("adopted") <= 1
    check_weights(home, job_id, 10)
