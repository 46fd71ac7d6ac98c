"""Real ranks on two nodes of a real cluster."""

import pytest

from tests.slurm.cluster import NODES, Cluster
from tests.slurm.conftest import MakeSlurmHome
from tests.slurm.slurm_jobs import real, submit


@pytest.mark.long
@pytest.mark.slow
def test_two_nodes_train_one_model_and_report_over_http(cluster: Cluster, slurm_home: MakeSlurmHome) -> None:
    home = slurm_home(real_ranks=True)
    job_id = submit(home, real(home))
    job = home.wait(job_id, "succeeded", seconds=180)
    assert job["spec"]["resources"]["launcher"] == "slurm"
    assert job["placement"]["nodes"] == list(NODES)
    assert job["placement"]["devices"] == ["node1/cpu:0", "node2/cpu:0"]
    assert [row["step"] for row in home.metrics(job_id)] == list(range(1, 13))
    assert (job["plan"]["world_size"], job["attempt"]) == (2, 1)
    attempt = home.run(job_id).attempt(1)
    assert [attempt.rank_log(rank).exists() for rank in range(3)] == [True, True, False]
    assert [attempt.node_log(node).exists() for node in range(3)] == [True, True, False]
