"""The test cluster is restored after anything that a test has done to it."""

import pytest

from tests.faults.service_home import until
from tests.slurm.cluster import NODES, Cluster
from tests.slurm.conftest import MakeSlurmHome
from tests.slurm.slurm_jobs import fake, submit


@pytest.mark.soak
def test_whatever_a_test_leaves_behind_the_next_one_finds_two_idle_nodes(
    cluster: Cluster, slurm_home: MakeSlurmHome
) -> None:
    home = slurm_home()
    job_id = submit(home, fake(home, steps="4000", pace="0.1", deaf="1"))
    submit(home, fake(home))
    home.reach(job_id, 3)
    home.kill()
    cluster.drain("node2")
    cluster.kill([*cluster.daemons("node1"), *cluster.controllers()])
    cluster.restore()
    assert cluster.states() == dict.fromkeys(NODES, "IDLE")
    until(lambda: home.processes() == [], what="nothing of any attempt is left")
    assert {job["job_state"] for job in cluster.jobs()} <= {"CANCELLED", "FAILED", "NODE_FAIL", "COMPLETED"}


@pytest.mark.soak
def test_a_cluster_that_cannot_be_repaired_is_recreated(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    before = cluster.controllers()
    monkeypatch.setattr(cluster, "_repair", _hopeless)
    cluster.restore()
    assert cluster.states() == dict.fromkeys(NODES, "IDLE")
    assert before[0] not in cluster.controllers()
    assert cluster.run("srun", "-N2", "true") == ""


def _hopeless() -> None:
    raise AssertionError("node1 is COMPLETING")
