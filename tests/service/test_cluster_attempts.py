"""Attempts on a cluster: what their jobs wait for, and agents that cannot reach the service."""

from collections.abc import Iterator
from datetime import datetime, timedelta

import pytest

from tests.fakes.launcher import FakeAttempt
from tests.service.conftest import MakeHarness
from tests.service.harness import ServiceHarness
from trainyard.contract.status import JobStatus
from trainyard.service.launch.base import AttemptPlacement, AttemptState

SILENCE = "Slurm does not answer: squeue takes long"
WAITING = AttemptPlacement("7", "pending", "Slurm: Resources")
PLACED = AttemptPlacement("7", "running", nodes=("node1",), devices=("node1/cuda:0",))


@pytest.fixture
def cluster(make_rig: MakeHarness, any_url: str) -> Iterator[ServiceHarness]:
    made = make_rig(any_url, TRAINYARD_SLURM="on", TRAINYARD_LAUNCHER="slurm")
    yield made
    made.close()


def submitted(rig: ServiceHarness) -> tuple[str, FakeAttempt]:
    job_id = rig.submit()
    rig.reconcile()
    return job_id, rig.launcher.of(job_id)


def later(rig: ServiceHarness, seconds: float = 6.0) -> None:
    rig.clock.forward(seconds)
    rig.reconcile()


def waiting_for(rig: ServiceHarness, job_id: str) -> str | None:
    queue = rig.job(job_id)["queue"]
    return queue["waiting_for"] if queue is not None else None


def test_a_job_waits_for_its_cluster_s_answer_and_says_so(cluster: ServiceHarness) -> None:
    job_id, attempt = submitted(cluster)
    attempt.state, attempt.silence = AttemptState.UNKNOWN, SILENCE
    later(cluster)
    assert cluster.job(job_id)["placement"]["engine_id"] == ""
    assert waiting_for(cluster, job_id) == SILENCE
    attempt.state, attempt.placement = AttemptState.ALIVE, WAITING
    later(cluster)
    assert waiting_for(cluster, job_id) == "Slurm: Resources"
    attempt.state = AttemptState.UNKNOWN
    later(cluster)
    assert (cluster.job(job_id)["placement"]["engine_id"], waiting_for(cluster, job_id)) == ("7", SILENCE)
    attempt.state, attempt.placement = AttemptState.ALIVE, PLACED
    later(cluster)
    assert waiting_for(cluster, job_id) is None
    attempt.state = AttemptState.UNKNOWN
    later(cluster)
    assert cluster.job(job_id)["placement"]["waiting_for"] is None, "it runs, whoever is silent"


def test_where_an_attempt_ran_is_kept_once_its_cluster_says_no_more(cluster: ServiceHarness) -> None:
    job_id, attempt = submitted(cluster)
    attempt.placement = PLACED
    later(cluster)
    attempt.placement = None
    later(cluster)
    assert cluster.job(job_id)["placement"]["nodes"] == ["node1"]


def test_a_launch_without_an_answer_says_why_it_stands_still(cluster: ServiceHarness) -> None:
    cluster.launcher.fail_next = "no_answer_but_done"
    job_id, attempt = submitted(cluster)
    attempt.state, attempt.silence = AttemptState.UNKNOWN, SILENCE
    later(cluster)
    assert (cluster.status(job_id), waiting_for(cluster, job_id)) == (JobStatus.STARTING, SILENCE)
    assert cluster.data(job_id, "attempts")[0]["launched_at"] is None, "nobody knows that"


def test_an_agent_that_cannot_report_is_read_all_the_same(cluster: ServiceHarness) -> None:
    job_id, attempt = submitted(cluster)
    attempt.placement = PLACED
    attempt.started()
    attempt.metric(1)
    later(cluster)
    assert cluster.status(job_id) is JobStatus.RUNNING
    assert [row["step"] for row in cluster.data(job_id, "metrics")] == [1]
    attempt.metric(2)
    later(cluster)
    cluster.ship(attempt)
    assert [row["step"] for row in cluster.data(job_id, "metrics")] == [1, 2], "each line once, whoever brings it"
    assert cluster.post_action(job_id, "kill")["status"] == "cancelling"
    later(cluster, 11.0)
    later(cluster, 11.0)
    assert (cluster.status(job_id), attempt.ended_by_launcher) == (JobStatus.CANCELLED, 1)


def test_an_agent_that_reports_is_not_read_beside(cluster: ServiceHarness) -> None:
    job_id, attempt = submitted(cluster)
    attempt.placement = PLACED
    with cluster.clock.standing():
        later(cluster)
        attempt.started()
        cluster.ship(attempt)
        attempt.metric(1)
        later(cluster, 1.0)
    assert cluster.data(job_id, "metrics") == []


@pytest.mark.parametrize("days", [-20000, 400])
def test_a_node_s_clock_moves_no_job_into_another_year(cluster: ServiceHarness, days: int) -> None:
    job_id, attempt = submitted(cluster)
    attempt.started()
    cluster.ship(attempt)
    report = attempt.end("completed", step=10).model_dump(mode="json")
    report["ended_at"] = (cluster.clock() + timedelta(days=days)).isoformat()
    assert cluster.report(attempt, "exit", report).status_code == 200
    job, told = cluster.job(job_id), cluster.data(job_id, "attempts")[0]
    assert job["status"] == "succeeded"
    times = [datetime.fromisoformat(time) for time in (told["created_at"], told["ended_at"])]
    assert times[0] <= times[1] <= cluster.clock()
    assert datetime.fromisoformat(job["finished_at"]) == times[1]
