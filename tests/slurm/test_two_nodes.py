"""Real ranks on two nodes of a real cluster."""

from pathlib import Path
from typing import Any

import pytest

from tests.faults.home import Home
from tests.slurm.cluster import NODES, Cluster
from tests.slurm.conftest import MakeSlurmHome
from tests.worker import driver
from worker.checkpoint import find_damage

STEPS = 12


def spec_on(home: Home, nnodes: Any = 2, steps: int = STEPS, **resources: Any) -> dict[str, Any]:
    """A small run of real ranks."""
    text = driver.corpus(home.path / "corpus.jsonl")
    return driver.spec(
        text,
        training={"max_steps": steps, "dtype": "float32"},
        checkpoint={"save_interval": 4},
        reporting={"log_interval": 1},
        resources={"launcher": "slurm", "nnodes": nnodes, **resources},
    )


def submit(home: Home, spec: dict[str, Any]) -> str:
    home.damage = find_damage
    answer = home.post("/jobs", spec)
    assert answer.status_code == 201, answer.text
    return str(answer.json()["id"])


@pytest.mark.slow
def test_two_nodes_train_one_model_and_report_over_http(
    cluster: Cluster, slurm_home: MakeSlurmHome, tmp_path: Path
) -> None:
    home = slurm_home(real_ranks=True)
    job_id = submit(home, spec_on(home))
    running = home.wait(job_id, "running", "succeeded", seconds=60)
    job = home.wait(job_id, "succeeded", seconds=120)
    assert running["spec"]["resources"]["launcher"] == "slurm"
    assert job["placement"]["nodes"] == list(NODES)
    assert [row["step"] for row in home.metrics(job_id)] == list(range(1, STEPS + 1))
    assert job["plan"]["world_size"] == 2
    attempt = home.run(job_id).attempt(1)
    assert [attempt.rank_log(rank).exists() for rank in range(3)] == [True, True, False]
    assert [attempt.node_log(node).exists() for node in range(3)] == [True, True, False]
    assert job["attempt"] == 1
