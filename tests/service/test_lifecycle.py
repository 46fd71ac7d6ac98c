"""The lifecycle rules, for every status. Pure."""

import itertools
import re
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, get_args

import pytest

from trainyard.contract.messages import ExitReport
from trainyard.contract.status import (
    LIVE,
    RESTARTABLE,
    TERMINAL,
    TRANSITIONS,
    UNCOUNTED_REASONS,
    Desired,
    JobStatus,
    Reason,
    can_transition,
)
from trainyard.service.jobs.lifecycle import (
    ACTIONS,
    Action,
    EndedAttempt,
    InProgress,
    JobState,
    Rejected,
    RestartHistory,
    Transition,
    after_exit,
    allowed_actions,
    decide,
    fault,
    made_a_step,
    restart_history,
    resume_blocker,
)
from trainyard.service.timing import Timing

OUTCOMES: tuple[Any, ...] = get_args(ExitReport.model_fields["outcome"].annotation)
STATUSES = Path(__file__).parents[2] / "docs/reference/statuses.md"

STANDINGS = [JobState(*each) for each in itertools.product(JobStatus, Desired, (False, True), (0, 1, 3), (False, True))]


def report(outcome: Any, reason: Reason | None = Reason.UNKNOWN) -> ExitReport:
    return ExitReport(
        outcome=outcome, reason=reason, step=7, message="it ended", last_seq=0, ended_at=datetime.now(UTC)
    )


@pytest.mark.parametrize("action", ACTIONS)
def test_every_move_is_in_the_table(action: Action) -> None:
    for standing in STANDINGS:
        decision = decide(action, standing)
        if isinstance(decision, Transition) and decision.to is not None:
            assert can_transition(standing.status, decision.to), (action, standing, decision)


@pytest.mark.parametrize("action", ACTIONS)
def test_an_action_repeated_is_under_way_or_refused_and_never_moves_again(action: Action) -> None:
    for standing in STANDINGS:
        decision = decide(action, standing)
        if isinstance(decision, Transition) and action not in ("delete", "save", "fork"):
            after = JobState(decision.to or standing.status, decision.desired, False, max(1, standing.attempts))
            assert isinstance(decide(action, after), InProgress | Rejected), (action, standing, after)


def test_what_fits_each_status() -> None:
    fits = {status: allowed_actions(JobState(status, Desired.RUN, False, 1)) for status in JobStatus}
    assert fits == {
        JobStatus.QUEUED: ["pause", "resume", "cancel", "kill"],
        JobStatus.PREPARING: ["pause", "resume", "cancel", "kill"],
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


@pytest.mark.parametrize("status", JobStatus)
def test_the_reference_lists_the_actions_of_each_status(status: JobStatus) -> None:
    # What is after a semicolon holds in special cases only. An action in progress is not listed.
    row = re.search(rf"^\| `{status}` \|.*\| ([^|]+) \|$", STATUSES.read_text(), re.MULTILINE)
    assert row is not None
    state = JobState(status, Desired.PAUSE if status is JobStatus.PAUSING else Desired.RUN, attempts=1)
    new = [action for action in ACTIONS if isinstance(decide(action, state), Transition)]
    assert sorted(row[1].partition(";")[0].split(", ")) == sorted(new)


def test_only_what_has_stopped_can_be_resumed() -> None:
    resumable = {s for s in JobStatus if resume_blocker(JobState(s, Desired.RUN)) is None}
    assert resumable == {JobStatus.PAUSED, JobStatus.INTERRUPTED, JobStatus.FAILED, JobStatus.CANCELLED}


@pytest.mark.parametrize("status", sorted(LIVE))
@pytest.mark.parametrize("outcome", OUTCOMES)
def test_every_ending_is_reachable_by_the_table(status: JobStatus, outcome: Any) -> None:
    for reason, restarts, fruitless, by in itertools.product(Reason, (0, 3), (0, 2), (None, "job_front")):
        ending = after_exit(status, report(outcome, reason), RestartHistory(restarts, fruitless), 3, by)
        reachable = TRANSITIONS[status] | (TRANSITIONS[JobStatus.RUNNING] if status is JobStatus.STARTING else set())
        assert ending.status in reachable, (status, outcome, reason)
        assert (ending.status is JobStatus.SUCCEEDED) == (outcome == "completed")
        assert (ending.restart_seconds is not None) <= (ending.status is JobStatus.INTERRUPTED)
        assert ending.status in TERMINAL | {JobStatus.PAUSED, JobStatus.INTERRUPTED}
        assert ending.requeue <= (ending.status is JobStatus.PAUSED and by is not None)


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
        (JobStatus.RUNNING, "failed", Reason.HOST_OUT_OF_MEMORY, JobStatus.FAILED, False),
    ],
)
def test_endings(status: JobStatus, outcome: Any, reason: Reason | None, expected: JobStatus, restarts: bool) -> None:
    ending = after_exit(status, report(outcome, reason), RestartHistory(), 3)
    assert ending.status is expected
    assert (ending.restart_seconds is not None) is restarts


def test_back_off_grows_and_is_counted() -> None:
    crash = report("crashed", Reason.WORKER_CRASHED)
    endings = [after_exit(JobStatus.RUNNING, crash, RestartHistory(n), 5) for n in range(6)]
    assert [e.restart_seconds for e in endings] == [5.0, 20.0, 60.0, 60.0, 60.0, None]
    assert [e.restarts for e in endings] == [1, 2, 3, 4, 5, 5]
    assert endings[0].message == "it ended; restarting in 5 s, 1 of 5"
    assert (endings[5].status, endings[5].reason) == (JobStatus.FAILED, Reason.MAX_RESTARTS)
    assert endings[5].error is not None
    assert endings[5].error.code == "worker_crashed"


@pytest.mark.parametrize("reason", sorted(UNCOUNTED_REASONS))
def test_what_is_no_fault_of_the_job_uses_nothing_up(reason: Reason) -> None:
    assert reason in RESTARTABLE
    ending = after_exit(JobStatus.RUNNING, report("crashed", reason), RestartHistory(3), 3)
    # With steps made until its time was over, a long run goes on at once.
    seconds = 0.0 if reason is Reason.TIME_LIMIT else 5.0
    assert (ending.status, ending.restarts, ending.restart_seconds) == (JobStatus.INTERRUPTED, 3, seconds)


def test_with_no_restart_allowed_the_reason_is_the_crash_itself() -> None:
    ending = after_exit(JobStatus.RUNNING, report("crashed", Reason.HUNG), RestartHistory(), 0)
    assert (ending.status, ending.reason, ending.message) == (JobStatus.FAILED, Reason.HUNG, "it ended")


NOTHING = EndedAttempt("restart", Reason.WORKER_CRASHED, False)
A_STEP = EndedAttempt("restart", Reason.WORKER_CRASHED, True)
LOST = EndedAttempt("restart", Reason.AGENT_LOST, False)
ASKED_FOR = EndedAttempt("resume", Reason.HUNG, False)


@pytest.mark.parametrize(
    ("newest_first", "fruitless", "setbacks"),
    [
        ([], 0, 0),
        ([A_STEP, NOTHING, NOTHING], 0, 0),
        ([NOTHING], 1, 0),
        ([NOTHING, A_STEP, NOTHING], 1, 0),
        ([NOTHING, NOTHING, A_STEP], 2, 0),
        ([NOTHING, ASKED_FOR, NOTHING, NOTHING], 2, 0),
        ([ASKED_FOR, NOTHING], 1, 0),
        ([LOST, LOST, A_STEP], 0, 2),
        # A host that went down in between says nothing about the job, for or against it.
        ([NOTHING, LOST, NOTHING, A_STEP], 2, 1),
        ([LOST, EndedAttempt("submit", Reason.HOST_RESTARTED, False)], 0, 2),
        ([NOTHING, EndedAttempt("preemption", Reason.TERMINATED, True)], 1, 0),
    ],
)
def test_what_attempts_in_a_row_have_come_to(newest_first: list[EndedAttempt], fruitless: int, setbacks: int) -> None:
    assert restart_history(1, newest_first) == RestartHistory(1, fruitless, setbacks)


@pytest.mark.parametrize(
    ("start", "end", "moved"),
    [
        (None, None, False),
        (None, 0, False),
        (0, 0, False),
        (None, 1, True),
        (40, 0, False),
        (40, 40, False),
        (40, 41, True),
    ],
)
def test_a_step_counts_only_beyond_where_the_attempt_began(start: int | None, end: int | None, moved: bool) -> None:
    assert made_a_step(start, end) is moved


def test_two_attempts_in_a_row_without_a_step_are_enough() -> None:
    crash = report("crashed", Reason.WORKER_CRASHED)
    first = after_exit(JobStatus.RUNNING, crash, RestartHistory(0, 1), 3)
    assert (first.status, first.restart_seconds) == (JobStatus.INTERRUPTED, 5.0)
    second = after_exit(JobStatus.RUNNING, crash, RestartHistory(1, 2), 3)
    assert (second.status, second.reason, second.restart_seconds) == (JobStatus.FAILED, Reason.MAX_RESTARTS, None)
    assert second.message == "it ended; 2 attempts in a row made no step, so it is given up after 1 of 3 restarts"
    assert second.error is not None
    assert second.error.code == "worker_crashed"


def test_where_restarts_are_used_up_that_is_what_is_said() -> None:
    ending = after_exit(JobStatus.RUNNING, report("crashed", Reason.HUNG), RestartHistory(1, 2), 1)
    assert (ending.reason, ending.message) == (Reason.MAX_RESTARTS, "it ended; all 1 restarts are used up")


@pytest.mark.parametrize("reason", sorted(UNCOUNTED_REASONS))
def test_setbacks_wait_longer_each_time_and_never_end_a_job(reason: Reason) -> None:
    endings = [after_exit(JobStatus.RUNNING, report("crashed", reason), RestartHistory(0, 0, n), 0) for n in range(8)]
    first = 0.0 if reason is Reason.TIME_LIMIT else 5.0
    assert [ending.restart_seconds for ending in endings] == [first, 5.0, 20.0, 60.0, 180.0, 600.0, 600.0, 600.0]
    assert {ending.status for ending in endings} == {JobStatus.INTERRUPTED}
    assert max(ending.restart_seconds or 0 for ending in endings) <= Timing().max_restart_wait


@pytest.mark.parametrize("outcome", ["stopped", "killed", "crashed"])
def test_a_time_limit_is_no_fault_whether_it_was_saved_in_time_or_not(outcome: str) -> None:
    ending = after_exit(JobStatus.RUNNING, report(outcome, Reason.TIME_LIMIT), RestartHistory(3), 3)
    assert (ending.status, ending.reason, ending.restart_seconds) == (JobStatus.INTERRUPTED, Reason.TIME_LIMIT, 0.0)


@pytest.mark.parametrize(
    ("outcome", "reason", "expected"),
    [
        ("stopped", Reason.USER, Reason.TERMINATED),
        ("killed", Reason.USER, Reason.UNKNOWN),
        ("crashed", None, Reason.UNKNOWN),
        ("crashed", Reason.HUNG, Reason.HUNG),
        ("failed", Reason.DISK_FULL, Reason.DISK_FULL),
    ],
)
def test_who_is_at_fault_for_an_end_that_nobody_asked_for(
    outcome: str, reason: Reason | None, expected: Reason
) -> None:
    assert fault(outcome, reason) is expected


@pytest.mark.parametrize(
    ("outcome", "reason", "status", "becomes", "again", "restarts"),
    [
        ("stopped", Reason.USER, JobStatus.PAUSED, Reason.PREEMPTED, True, 0),
        ("completed", None, JobStatus.SUCCEEDED, None, False, 0),
        # It did not save within the grace: we asked, so it is not counted, and starts again after a while.
        ("killed", Reason.USER, JobStatus.INTERRUPTED, Reason.PREEMPTED, False, 0),
        ("crashed", Reason.WORKER_CRASHED, JobStatus.INTERRUPTED, Reason.WORKER_CRASHED, False, 1),
        ("crashed", Reason.AGENT_LOST, JobStatus.INTERRUPTED, Reason.AGENT_LOST, False, 0),
        ("failed", Reason.DIVERGED, JobStatus.FAILED, Reason.DIVERGED, False, 0),
    ],
)
def test_the_end_of_an_attempt_that_made_room(
    outcome: str, reason: Reason | None, status: JobStatus, becomes: Reason | None, again: bool, restarts: int
) -> None:
    ending = after_exit(JobStatus.PAUSING, report(outcome, reason), RestartHistory(), 3, "job_front")
    assert (ending.status, ending.reason, ending.requeue, ending.restarts) == (status, becomes, again, restarts)
    assert (ending.restart_seconds is not None) == (status is JobStatus.INTERRUPTED)
    if again:
        assert ending.message == "it ended, to make room for job_front; it resumes automatically"


@pytest.mark.parametrize("status", [JobStatus.STARTING, JobStatus.RUNNING])
@pytest.mark.parametrize(
    ("outcome", "reason", "becomes", "why", "again"),
    [
        ("stopped", None, JobStatus.INTERRUPTED, Reason.TERMINATED, True),
        ("killed", Reason.HUNG, JobStatus.INTERRUPTED, Reason.TERMINATED, True),
        ("completed", None, JobStatus.SUCCEEDED, None, False),
        ("crashed", Reason.WORKER_CRASHED, JobStatus.INTERRUPTED, Reason.WORKER_CRASHED, False),
        ("failed", Reason.DIVERGED, JobStatus.FAILED, Reason.DIVERGED, False),
    ],
)
def test_the_end_of_an_attempt_whose_service_stops(
    status: JobStatus, outcome: str, reason: Reason | None, becomes: JobStatus, why: Reason | None, again: bool
) -> None:
    ending = after_exit(status, report(outcome, reason), RestartHistory(), 3, service_stops=True)
    assert (ending.status, ending.reason, ending.requeue) == (becomes, why, again)
    if again:
        assert ending.restarts == 0
        assert ending.message.endswith("; it resumes when the service starts")


def test_a_pause_stays_a_pause_while_the_service_stops() -> None:
    ending = after_exit(JobStatus.PAUSING, report("stopped", None), RestartHistory(), 3, service_stops=True)
    assert (ending.status, ending.requeue) == (JobStatus.PAUSED, False)


def test_a_user_may_still_have_their_way_with_a_job_that_makes_room() -> None:
    pausing = JobState(JobStatus.PAUSING, Desired.PAUSE, attempts=1, preempted=True)
    assert decide("pause", pausing) == Transition(None, Desired.PAUSE)
    assert decide("resume", pausing) == InProgress()
    assert decide("cancel", pausing) == Transition(JobStatus.CANCELLING, Desired.CANCEL)
