"""Specs of jobs on the test cluster, with fake ranks or real ones."""

from typing import Any

from tests.faults.service_home import Home
from tests.slurm.cluster import Cluster
from tests.worker import rank_runner
from trainyard.worker.checkpoint.files import verify


def fake(home: Home, nnodes: Any = 2, slurm: dict[str, Any] | None = None, **labels: str) -> dict[str, Any]:
    """Fake ranks, all on the first node: fast, with checkpoints whose weights identify each step."""
    spec = home.spec(3, **{"steps": "20", "save": "5", **labels})
    spec["resources"] |= {"launcher": "slurm", "nnodes": nnodes, "nproc_per_node": 1, "slurm": slurm or {}}
    return spec


def real(home: Home, nnodes: Any = 2, steps: int = 12, **resources: Any) -> dict[str, Any]:
    """A small run of real ranks."""
    home.damage = verify
    return rank_runner.spec(
        rank_runner.corpus(home.path / "corpus.jsonl"),
        training={"max_steps": steps, "dtype": "float32"},
        checkpoint={"save_interval": 4},
        reporting={"log_interval": 1},
        resources={"launcher": "slurm", "nnodes": nnodes, **resources},
    )


def submit(home: Home, spec: dict[str, Any]) -> str:
    answer = home.post("/jobs", spec)
    assert answer.status_code == 201, answer.text
    return str(answer.json()["id"])


def events(home: Home, job_id: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = home.get(f"/jobs/{job_id}/events?limit=100").json()["data"]
    return found


def attempts(home: Home, job_id: str) -> list[dict[str, Any]]:
    """Return the attempts, oldest first."""
    found: list[dict[str, Any]] = home.get(f"/jobs/{job_id}/attempts").json()["data"]
    return sorted(found, key=lambda attempt: attempt["number"])


def in_slurm(cluster: Cluster, job_id: str) -> list[tuple[str, str]]:
    """Return (comment, state) of all submissions."""
    return [(job["comment"], job["job_state"]) for job in cluster.jobs() if job["name"] == f"trainyard-{job_id}"]


def completed(cluster: Cluster, job_id: str) -> list[str]:
    """Return the comments of completed submissions."""
    return [comment for comment, state in in_slurm(cluster, job_id) if state == "COMPLETED"]
