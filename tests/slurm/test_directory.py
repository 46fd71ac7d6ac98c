"""Nodes that cannot reach the service: it reads the run directory and writes its requests there. Ranks are fake."""

import pytest

from tests.faults.invariants import check_weights
from tests.faults.service_home import until
from tests.slurm.cluster import Cluster
from tests.slurm.conftest import MakeSlurmHome
from tests.slurm.slurm_jobs import fake, submit
from trainyard.contract.rundir import read_json

DIRECTORY = {"TRAINYARD_SLURM_REPORTS": "directory"}


@pytest.mark.soak
def test_a_run_is_read_in_its_directory_paused_resumed_and_killed(cluster: Cluster, slurm_home: MakeSlurmHome) -> None:
    home = slurm_home(settings=DIRECTORY)
    job_id = submit(home, fake(home, steps="60", pace="0.1", save="1000"))
    home.wait(job_id, "running")
    until(lambda: home.metrics(job_id), what="points are read while it runs")
    assert home.client.patch(f"{home.url}/jobs/{job_id}", json={"log_interval": 7}).status_code == 200
    settings = home.run(job_id).attempt(1).settings
    until(settings.exists, what="changed settings are left where the ranks look")
    assert (read_json(settings) or {})["log_interval"] == 7
    assert home.post(f"/jobs/{job_id}/pause").status_code == 202
    assert home.wait(job_id, "paused")["checkpoint"]["step"] > 0
    assert home.post(f"/jobs/{job_id}/resume").status_code == 202
    home.wait(job_id, "succeeded")
    assert [row["step"] for row in home.metrics(job_id)] == list(range(1, 61))
    assert "reach" not in home.run(job_id).attempt(1).agent_log.read_text(), "nobody was called"
    check_weights(home, job_id, 60)
    killed = submit(home, fake(home, steps="1000", pace="0.1"))
    home.wait(killed, "running")
    assert home.post(f"/jobs/{killed}/kill").status_code == 202
    assert home.wait(killed, "cancelled")["reason"] == "user"
