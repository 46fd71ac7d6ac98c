"""Slurm's controller, the service, or both are away: runs continue. The ranks are fake and fast."""

import pytest

from tests.faults.invariants import check_weights
from tests.faults.service_home import until
from tests.slurm.cluster import SECONDS, Cluster
from tests.slurm.conftest import MakeSlurmHome
from tests.slurm.slurm_jobs import attempts, completed, fake, submit


@pytest.mark.soak
@pytest.mark.parametrize("away", ["controller", "service", "both"])
def test_a_run_continues_whatever_is_killed(cluster: Cluster, slurm_home: MakeSlurmHome, away: str) -> None:
    home = slurm_home()
    job_id = submit(home, fake(home, steps="150", pace="0.1"))
    home.reach(job_id, 5)
    cluster.wait_until_saved(cluster.jobs()[-1]["job_id"])
    if away != "service":
        cluster.kill(cluster.controllers())
    if away != "controller":
        home.kill()
    seen = home.step(job_id)
    until(lambda: home.step(job_id) > seen + 10, what="it goes on")
    if away != "controller":
        home.start()
        until(lambda: home.job(job_id)["progress"]["step"] > seen, what="the service has caught up")
    if away != "service":
        assert home.job(job_id)["status"] == "running", "no answer is no end"
        cluster.start_controller()
    home.wait(job_id, "succeeded")
    assert [each["message"] for each in attempts(home, job_id)] == ["finished at step 150"], cluster.logs()
    assert [row["step"] for row in home.metrics(job_id)] == list(range(1, 151)), "no gap"
    check_weights(home, job_id, 150)


@pytest.mark.soak
def test_what_is_submitted_while_the_controller_is_away_runs_once_it_is_back(
    cluster: Cluster, slurm_home: MakeSlurmHome
) -> None:
    home = slurm_home()
    cluster.kill(cluster.controllers())
    job_id = submit(home, fake(home, nnodes=1))
    here = home.submit(steps="10", ranks="1")
    home.wait(here, "succeeded")
    assert home.job(job_id)["status"] in ("queued", "starting")
    cluster.start_controller()
    job = home.wait(job_id, "succeeded")
    until(lambda: completed(cluster, job_id), SECONDS, "Slurm has ended it")
    assert completed(cluster, job_id) == [f"{job_id}/{job['attempt']}"]
    check_weights(home, job_id, 20)


@pytest.mark.soak
def test_a_host_without_munge_keeps_a_job_waiting_and_says_why(cluster: Cluster, slurm_home: MakeSlurmHome) -> None:
    home = slurm_home()
    cluster.kill(cluster.munged_processes())
    job_id = submit(home, fake(home, nnodes=1))

    def reported_reason() -> str | None:
        queue = home.job(job_id)["queue"]
        return queue["waiting_for"] if queue is not None and "does not answer" in queue["waiting_for"] else None

    assert str(until(reported_reason, SECONDS, "why nothing happens")).startswith("Slurm does not answer: squeue ")
    assert home.job(job_id)["status"] == "starting"
    cluster.start_munge()
    job = home.wait(job_id, "succeeded", seconds=90)
    until(lambda: completed(cluster, job_id), SECONDS, "Slurm has ended it")
    assert completed(cluster, job_id) == [f"{job_id}/{job['attempt']}"]
    check_weights(home, job_id, 20)
