"""Crashes of the service, of agents and of launches: no attempt runs twice, is stuck or is lost."""

import sqlite3

import pytest
from sqlalchemy.exc import OperationalError

from tests.fakes.launcher import Failpoint, ServiceKilled
from tests.service.conftest import MakeHarness
from tests.service.harness import ServiceHarness, path_of
from trainyard.contract.messages import Ack
from trainyard.contract.status import JobStatus, Reason
from trainyard.service.errors import OutcomeUnknown
from trainyard.service.launch.base import AttemptRef, AttemptState
from trainyard.service.scheduler.loop import log_round_failure


@pytest.mark.parametrize("failpoint", ["before_spawn", "after_spawn"])
def test_killed_around_the_spawn(make_rig: MakeHarness, any_url: str, failpoint: Failpoint) -> None:
    first = make_rig(any_url)
    job_id = first.submit()
    first.launcher.fail_next = failpoint
    with pytest.raises(ServiceKilled):
        first.reconcile()
    assert first.status(job_id) is JobStatus.STARTING

    second = first.restart()
    second.reconcile()
    assert len(second.launcher.living(job_id)) == 1
    attempts = second.data(job_id, "attempts")
    if failpoint == "before_spawn":
        assert [a["outcome"] for a in attempts] == ["not_launched", None]
        assert second.launcher.starts == [AttemptRef(job_id, 1), AttemptRef(job_id, 2)]
        assert path_of(second.data(job_id, "events")) == ["starting", "queued", "starting"]
    else:
        assert [a["outcome"] for a in attempts] == [None]
        assert second.launcher.starts == [AttemptRef(job_id, 1)]
        assert any(e["kind"] == "adopted" for e in second.data(job_id, "events"))
    attempt = second.launcher.living(job_id)[0]
    attempt.started()
    second.ship(attempt)
    assert second.status(job_id) is JobStatus.RUNNING
    leased = [d["job_id"] for d in second.get("/devices")["data"]]
    assert leased.count(job_id) == 1
    second.close()


@pytest.mark.parametrize("verb", ["cancel", "kill", "pause"])
def test_stopped_before_it_was_launched(make_rig: MakeHarness, sqlite_url: str, verb: str) -> None:
    first = make_rig(sqlite_url)
    job_id = first.submit()
    first.launcher.fail_next = "before_spawn"
    with pytest.raises(ServiceKilled):
        first.reconcile()
    first.post_action(job_id, verb)
    second = first.restart()
    second.reconcile()
    assert second.status(job_id) is (JobStatus.PAUSED if verb == "pause" else JobStatus.CANCELLED)
    assert second.launcher.living(job_id) == []
    assert all(d["job_id"] is None for d in second.get("/devices")["data"])
    second.close()


def test_a_run_goes_on_over_a_restart_without_a_gap(make_rig: MakeHarness, any_url: str) -> None:
    first = make_rig(any_url)
    job_id, attempt = first.running()
    attempt.metric(1)
    first.ship(attempt)
    second = first.restart()
    attempt.metric(2)
    attempt.metric(3)
    second.reconcile()
    assert second.ship(attempt)["acked"] == 4
    assert [m["step"] for m in second.data(job_id, "metrics")] == [1, 2, 3]
    assert second.job(job_id)["attempt"] == 1
    assert second.launcher.starts == [AttemptRef(job_id, 1)]
    second.close()


@pytest.mark.parametrize(
    ("outcome", "reason", "expected"),
    [
        ("completed", None, JobStatus.SUCCEEDED),
        ("failed", Reason.DIVERGED, JobStatus.FAILED),
        ("crashed", Reason.WORKER_CRASHED, JobStatus.INTERRUPTED),
    ],
)
def test_a_job_that_ended_while_the_service_was_down(
    make_rig: MakeHarness, any_url: str, outcome: str, reason: Reason | None, expected: JobStatus
) -> None:
    first = make_rig(any_url)
    job_id, attempt = first.running()
    first.close()
    for step in range(1, 6):
        attempt.metric(step)
    report = attempt.end(outcome, reason, step=5)  # type: ignore[arg-type] # one of the outcomes
    second = make_rig(any_url, launcher=first.launcher, clock=first.clock)
    second.reconcile()
    job = second.job(job_id)
    assert job["status"] == expected
    assert [m["step"] for m in second.data(job_id, "metrics")] == [1, 2, 3, 4, 5]
    ended = second.data(job_id, "attempts")[0]["ended_at"]
    assert ended.rstrip("Z") == report.ended_at.isoformat().removesuffix("+00:00"), "its true time, not ours"
    second.close()


def test_an_attempt_that_ran_and_ended_while_the_service_was_down(make_rig: MakeHarness, sqlite_url: str) -> None:
    first = make_rig(sqlite_url)
    job_id = first.submit()
    first.launcher.fail_next = "after_spawn"
    with pytest.raises(ServiceKilled):
        first.reconcile()
    attempt = first.launcher.of(job_id)
    attempt.end("completed", step=10)
    second = first.restart()
    second.reconcile()
    assert second.status(job_id) is JobStatus.SUCCEEDED
    assert path_of(second.data(job_id, "events")) == ["starting", "running", "succeeded"]
    second.close()


def test_silence_alone_never_ends_an_attempt(rig: ServiceHarness) -> None:
    job_id, attempt = rig.running()
    for _ in range(5):
        rig.clock.forward(3600)
        rig.reconcile()
    assert rig.status(job_id) is JobStatus.RUNNING
    assert attempt.ended_by_launcher == 0
    assert rig.launcher.starts == [AttemptRef(job_id, 1)]


def test_who_does_not_answer_says_nothing(any_rig: ServiceHarness) -> None:
    rig = any_rig
    job_id, attempt = rig.running()
    attempt.state = AttemptState.UNKNOWN
    for _ in range(5):
        rig.clock.forward(3600)
        rig.reconcile()
    assert rig.status(job_id) is JobStatus.RUNNING
    assert (attempt.ended_by_launcher, rig.launcher.starts) == (0, [AttemptRef(job_id, 1)])


def test_a_launch_without_an_answer_is_inspected_and_not_repeated(any_rig: ServiceHarness) -> None:
    rig = any_rig
    rig.launcher.fail_next = "no_answer_but_done"
    done = rig.submit()
    rig.reconcile()
    rig.launcher.fail_next = "no_answer"
    lost = rig.submit()
    rig.reconcile()
    rig.clock.forward(10)
    rig.reconcile()
    assert rig.launcher.starts.count(AttemptRef(done, 1)) == 1
    assert [attempt.state for attempt in rig.launcher.living(done)] == [AttemptState.ALIVE]
    assert rig.launcher.starts.count(AttemptRef(lost, 2)) == 1, "nothing was found of it, so it was queued again"
    assert [event["kind"] for event in rig.data(done, "events")].count("adopted") == 1


def test_an_orphan_is_ended_and_the_job_restarts(any_rig: ServiceHarness) -> None:
    rig = any_rig
    job_id, attempt = rig.running(resources={"max_restarts": 0})
    attempt.metric(1)
    attempt.metric(2)
    attempt.lose_agent()
    rig.clock.forward(6)
    rig.reconcile()
    assert attempt.ended_by_launcher == 1
    job = rig.job(job_id)
    assert (job["status"], job["reason"]) == ("interrupted", "agent_lost")
    assert [m["step"] for m in rig.data(job_id, "metrics")] == [1, 2]
    rig.clock.forward(6)
    rig.reconcile()
    assert rig.job(job_id)["attempt"] == 2


def test_a_kill_that_no_agent_hears_is_carried_out(rig: ServiceHarness) -> None:
    job_id, attempt = rig.running()
    rig.post_action(job_id, "kill")
    rig.reconcile()
    assert attempt.ended_by_launcher == 0
    rig.clock.forward(30)
    rig.reconcile()
    assert attempt.ended_by_launcher == 1
    assert rig.status(job_id) is JobStatus.CANCELLED


def test_a_refused_launch_is_tried_again_and_then_fails(any_rig: ServiceHarness) -> None:
    rig = any_rig
    job_id = rig.submit(resources={"max_restarts": 1})
    rig.launcher.fail_next = "refuse"
    rig.reconcile()
    job = rig.job(job_id)
    assert (job["status"], job["reason"]) == ("interrupted", "launch_failed")
    assert job["message"] == "the launch failed: no room in the test; restarting in 5 s, 1 of 1"
    assert job["error"]["hint"] == "make room in the test"
    rig.launcher.fail_next = "refuse"
    rig.clock.forward(6)
    rig.reconcile()
    job = rig.job(job_id)
    assert (job["status"], job["reason"], job["error"]["code"]) == ("failed", "max_restarts", "launch_failed")
    assert all(d["job_id"] is None for d in rig.get("/devices")["data"])


def test_an_error_of_the_launcher_after_a_start_leaves_no_process(any_rig: ServiceHarness) -> None:
    """The devices are free after the error, so the agent must not use them."""
    rig = any_rig
    job_id = rig.submit()
    rig.launcher.fail_next = "error_after_spawn"
    rig.scheduler.reconcile()
    assert rig.launcher.of(job_id).ended_by_launcher == 1
    job = rig.job(job_id)
    assert (job["status"], job["reason"]) == ("interrupted", "launch_failed")
    assert job["message"].startswith("the launch failed: can't start new thread")


def test_a_launcher_that_breaks_does_not_stop_the_others(rig: ServiceHarness, monkeypatch: pytest.MonkeyPatch) -> None:
    broken, whole = rig.submit(), rig.submit()
    start = rig.launcher.start

    def break_once(launch: object) -> None:
        monkeypatch.setattr(rig.launcher, "start", start)
        raise ZeroDivisionError

    monkeypatch.setattr(rig.launcher, "start", break_once)
    rig.reconcile()
    assert rig.status(broken) is JobStatus.INTERRUPTED
    assert rig.status(whole) is JobStatus.STARTING


def test_an_attempt_that_vanished_with_its_files_is_lost(rig: ServiceHarness) -> None:
    job_id, _ = rig.running()
    rig.launcher.attempts.clear()
    rig.clock.forward(6)
    rig.reconcile()
    job = rig.job(job_id)
    assert (job["status"], job["reason"]) == ("interrupted", "agent_lost")


def test_an_agent_of_a_replaced_attempt_is_killed(any_rig: ServiceHarness) -> None:
    rig = any_rig
    job_id, first = rig.running()
    rig.exit(first, "crashed", Reason.WORKER_CRASHED, step=1)
    rig.post_action(job_id, "resume")
    rig.next_attempt(job_id, 2)
    answer = rig.report(first, "heartbeat", {"step": 5})
    assert Ack.model_validate(answer.json()).desired == "kill"
    assert rig.job(job_id)["progress"]["step"] == 0
    assert rig.report(first, "exit", first.end("completed", step=10).model_dump(mode="json")).status_code == 200
    assert rig.status(job_id) is JobStatus.RUNNING


def test_an_exit_with_lines_missing_waits_for_them(rig: ServiceHarness) -> None:
    job_id, attempt = rig.running()
    attempt.metric(1)
    report = attempt.end("completed", step=1)
    assert rig.report(attempt, "exit", report.model_dump(mode="json")).json()["acked"] == 1
    assert rig.status(job_id) is JobStatus.RUNNING
    rig.clock.forward(6)
    rig.reconcile()
    assert rig.status(job_id) is JobStatus.SUCCEEDED
    assert [m["step"] for m in rig.data(job_id, "metrics")] == [1]


def test_a_lease_is_given_once(any_rig: ServiceHarness) -> None:
    jobs = [any_rig.submit() for _ in range(5)]
    any_rig.reconcile()
    assert len(any_rig.launcher.starts) == 2
    for job_id in jobs:
        for attempt in any_rig.launcher.living(job_id):
            any_rig.exit(attempt, "completed", step=1)
            any_rig.reconcile()
    assert len(any_rig.launcher.starts) == 5
    assert [any_rig.status(j) for j in jobs] == [JobStatus.SUCCEEDED] * 5
    devices = [d for name in any_rig.launcher.starts for d in any_rig.launcher.attempts[name].launch.devices]
    assert devices.count("cpu:0") + devices.count("cpu:1") == 5


def test_state_of_the_fake_is_the_real_ones() -> None:
    assert {s.value for s in AttemptState} == {"absent", "alive", "orphaned", "ended", "unknown"}


def test_the_spec_of_an_attempt_names_the_kind_and_the_lease_names_the_card(
    make_rig: MakeHarness, sqlite_url: str
) -> None:
    from tests.service.test_plan import gpus

    rig = make_rig(sqlite_url, devices=gpus(2))
    job_id = rig.submit(resources={"device": "cuda:1"})
    rig.reconcile()
    launch = rig.launcher.of(job_id).launch
    assert (launch.devices, launch.spec.resources.device) == (("cuda:1",), "cuda")
    assert rig.job(job_id)["spec"]["resources"]["device"] == "cuda:1"
    rig.close()


def test_a_database_that_is_away_fills_no_log(caplog: pytest.LogCaptureFixture) -> None:
    full = OperationalError("INSERT", {}, sqlite3.OperationalError("database or disk is full"))
    try:
        raise OutcomeUnknown() from full
    except OutcomeUnknown as error:
        log_round_failure(error)
    log_round_failure(full)
    assert [record.exc_info for record in caplog.records] == [None, None]
    assert all("(sqlite3.OperationalError) database or disk is full" in line for line in caplog.messages)
    log_round_failure(RuntimeError("a mistake of ours"))
    assert caplog.records[-1].exc_info
