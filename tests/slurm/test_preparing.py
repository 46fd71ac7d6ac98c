"""A corpus is prepared by a Slurm job of its own, without GPUs, before the run's job is submitted."""

import signal

import pytest

from tests.faults.service_home import until
from tests.slurm.cluster import Cluster
from tests.slurm.conftest import MakeSlurmHome
from tests.slurm.slurm_jobs import events, in_slurm, real, submit
from tests.worker import rank_runner

pytestmark = [pytest.mark.slow, pytest.mark.long]


def statuses(found: list[dict[str, object]]) -> list[object]:
    return [event["data"]["to"] for event in found if event["kind"] == "status"]  # type: ignore[index] # JSON


def test_the_corpus_is_a_job_of_its_own_in_its_partition(cluster: Cluster, slurm_home: MakeSlurmHome) -> None:
    home = slurm_home(real_ranks=True)
    spec = real(home, nnodes=1, steps=2, slurm={"prepare_partition": "short"})
    job_id = submit(home, spec)
    corpus_id = until(lambda: home.job(job_id)["corpus_id"])
    job = until(lambda: (found := home.job(job_id))["status"] == "succeeded" and found, 120)
    assert job["progress"]["step"] == 2
    assert statuses(events(home, job_id))[:3] == ["preparing", "queued", "starting"]
    [preparation] = [each for each in cluster.jobs() if each["name"] == f"trainyard-{corpus_id}"]
    assert (preparation["comment"], preparation["partition"]) == (f"{corpus_id}/1", "short")
    assert not any("gpu" in str(detail) for detail in preparation.get("gres_detail") or ())
    [run] = [each for each in cluster.jobs() if each["name"] == f"trainyard-{job_id}"]
    assert run["partition"] != "short"


def test_a_service_that_dies_finds_the_preparation_in_slurm(cluster: Cluster, slurm_home: MakeSlurmHome) -> None:
    home = slurm_home(real_ranks=True)
    spec = real(home, nnodes=1, steps=2)
    rank_runner.corpus(home.path / "corpus.jsonl", documents=20_000)
    job_id = submit(home, spec)
    corpus_id = until(lambda: home.job(job_id)["corpus_id"])
    until(lambda: in_slurm(cluster, corpus_id), 60)
    home.signal(signal.SIGKILL)
    home.wait_down()
    home.start()
    until(lambda: home.job(job_id)["status"] == "succeeded", 120)
    assert len(in_slurm(cluster, corpus_id)) == 1
