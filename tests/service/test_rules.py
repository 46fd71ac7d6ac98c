"""The rules, over every status there is."""

import itertools
from datetime import UTC, datetime
from typing import Any, get_args

import pytest

from contract.report import ExitReport
from contract.status import (
    LIVE,
    NOT_COUNTED,
    RESTARTABLE,
    TERMINAL,
    TRANSITIONS,
    Desired,
    JobStatus,
    Reason,
    may_become,
)
from service.jobs.rules import (
    ACTIONS,
    Action,
    Move,
    Refusal,
    Standing,
    UnderWay,
    after_exit,
    decide,
    fitting,
    resume_blocker,
)

OUTCOMES: tuple[Any, ...] = get_args(ExitReport.model_fields["outcome"].annotation)
STANDINGS = [
    Standing(status, desired, due, attempts)
    for status, desired, due, attempts in itertools.product(JobStatus, Desired, (False, True), (0, 1, 3))
]


def report(outcome: Any, reason: Reason | None = Reason.UNKNOWN) -> ExitReport:
    return ExitReport(
        outcome=outcome, reason=reason, step=7, message="it ended", last_seq=0, ended_at=datetime.now(UTC)
    )


@pytest.mark.parametrize("action", ACTIONS)
def test_every_move_is_in_the_table(action: Action) -> None:
    for standing in STANDINGS:
        decision = decide(action, standing)
        if isinstance(decision, Move) and decision.to is not None:
            assert may_become(standing.status, decision.to), (action, standing, decision)


@pytest.mark.parametrize("action", ACTIONS)
def test_an_action_repeated_is_under_way_or_refused_and_never_moves_again(action: Action) -> None:
    for standing in STANDINGS:
        decision = decide(action, standing)
        if isinstance(decision, Move) and action not in ("delete", "save"):
            after = Standing(decision.to or standing.status, decision.desired, False, max(1, standing.attempts))
            assert isinstance(decide(action, after), UnderWay | Refusal), (action, standing, after)


def test_what_fits_each_status() -> None:
    fits = {status: fitting(Standing(status, Desired.RUN, False, 1)) for status in JobStatus}
    assert fits == {
        JobStatus.QUEUED: ["pause", "resume", "cancel", "kill"],
        JobStatus.STARTING: ["pause", "cancel", "kill"],
        JobStatus.RUNNING: ["pause", "save", "cancel", "kill"],
        JobStatus.PAUSING: ["pause", "cancel", "kill"],
        JobStatus.PAUSED: ["resume", "cancel", "kill"],
        JobStatus.CANCELLING: ["cancel", "kill"],
        JobStatus.CANCELLED: ["resume", "delete"],
        JobStatus.INTERRUPTED: ["resume", "cancel", "kill"],
        JobStatus.SUCCEEDED: ["delete"],
        JobStatus.FAILED: ["resume", "delete"],
    }


def test_only_what_has_stopped_can_be_resumed() -> None:
    resumable = {s for s in JobStatus if resume_blocker(Standing(s, Desired.RUN)) is None}
    assert resumable == {JobStatus.PAUSED, JobStatus.INTERRUPTED, JobStatus.FAILED, JobStatus.CANCELLED}


@pytest.mark.parametrize("status", sorted(LIVE))
@pytest.mark.parametrize("outcome", OUTCOMES)
def test_every_ending_is_reachable_by_the_table(status: JobStatus, outcome: Any) -> None:
    for reason, restarts in itertools.product(Reason, (0, 3)):
        ending = after_exit(status, report(outcome, reason), restarts, 3)
        reachable = TRANSITIONS[status] | (TRANSITIONS[JobStatus.RUNNING] if status is JobStatus.STARTING else set())
        assert ending.status in reachable, (status, outcome, reason)
        assert (ending.status is JobStatus.SUCCEEDED) == (outcome == "completed")
        assert (ending.restart_seconds is not None) <= (ending.status is JobStatus.INTERRUPTED)
        assert ending.status in TERMINAL | {JobStatus.PAUSED, JobStatus.INTERRUPTED}


@pytest.mark.parametrize(
    ("status", "outcome", "reason", "expected", "restarts"),
    [
        (JobStatus.RUNNING, "completed", None, JobStatus.SUCCEEDED, False),
        (JobStatus.PAUSING, "completed", None, JobStatus.SUCCEEDED, False),
        (JobStatus.CANCELLING, "completed", None, JobStatus.SUCCEEDED, False),
        (JobStatus.PAUSING, "stopped", Reason.USER, JobStatus.PAUSED, False),
        (JobStatus.CANCELLING, "stopped", Reason.USER, JobStatus.CANCELLED, False),
        (JobStatus.RUNNING, "stopped", Reason.USER, JobStatus.INTERRUPTED, True),
        (JobStatus.STARTING, "stopped", Reason.USER, JobStatus.INTERRUPTED, True),
        (JobStatus.CANCELLING, "killed", Reason.USER, JobStatus.CANCELLED, False),
        (JobStatus.CANCELLING, "crashed", Reason.HUNG, JobStatus.CANCELLED, False),
        (JobStatus.CANCELLING, "failed", Reason.DIVERGED, JobStatus.CANCELLED, False),
        (JobStatus.PAUSING, "killed", Reason.USER, JobStatus.INTERRUPTED, False),
        (JobStatus.PAUSING, "crashed", Reason.WORKER_CRASHED, JobStatus.INTERRUPTED, False),
        (JobStatus.PAUSING, "failed", Reason.DIVERGED, JobStatus.FAILED, False),
        (JobStatus.RUNNING, "crashed", Reason.WORKER_CRASHED, JobStatus.INTERRUPTED, True),
        (JobStatus.RUNNING, "crashed", Reason.OUT_OF_MEMORY, JobStatus.FAILED, False),
        (JobStatus.RUNNING, "failed", Reason.DIVERGED, JobStatus.FAILED, False),
        (JobStatus.RUNNING, "failed", Reason.DATA_INVALID, JobStatus.FAILED, False),
        (JobStatus.RUNNING, "killed", Reason.USER, JobStatus.INTERRUPTED, True),
        (JobStatus.STARTING, "crashed", Reason.LAUNCH_FAILED, JobStatus.INTERRUPTED, True),
    ],
)
def test_endings(status: JobStatus, outcome: Any, reason: Reason | None, expected: JobStatus, restarts: bool) -> None:
    ending = after_exit(status, report(outcome, reason), 0, 3)
    assert ending.status is expected
    assert (ending.restart_seconds is not None) is restarts


def test_back_off_grows_and_is_counted() -> None:
    crash = report("crashed", Reason.WORKER_CRASHED)
    endings = [after_exit(JobStatus.RUNNING, crash, n, 5) for n in range(6)]
    assert [e.restart_seconds for e in endings] == [5.0, 20.0, 60.0, 60.0, 60.0, None]
    assert [e.restarts for e in endings] == [1, 2, 3, 4, 5, 5]
    assert endings[0].message == "it ended; restarting in 5 s, 1 of 5"
    assert (endings[5].status, endings[5].reason) == (JobStatus.FAILED, Reason.MAX_RESTARTS)
    assert endings[5].error is not None
    assert endings[5].error.code == "worker_crashed"


@pytest.mark.parametrize("reason", sorted(NOT_COUNTED))
def test_what_is_no_fault_of_the_job_uses_nothing_up(reason: Reason) -> None:
    assert reason in RESTARTABLE
    ending = after_exit(JobStatus.RUNNING, report("crashed", reason), 3, 3)
    assert (ending.status, ending.restarts, ending.restart_seconds) == (JobStatus.INTERRUPTED, 3, 60.0)


def test_with_no_restart_allowed_the_reason_is_the_crash_itself() -> None:
    ending = after_exit(JobStatus.RUNNING, report("crashed", Reason.HUNG), 0, 0)
    assert (ending.status, ending.reason, ending.message) == (JobStatus.FAILED, Reason.HUNG, "it ended")
