"""What may be done with a job, and what an attempt's end makes of it. Pure."""

from dataclasses import dataclass
from typing import Literal, assert_never

from trainyard.contract.messages import ErrorCard, ExitReport
from trainyard.contract.status import (
    LIVE,
    RESTARTABLE,
    TERMINAL,
    UNCOUNTED_REASONS,
    Desired,
    JobStatus,
    Reason,
)
from trainyard.service.jobs.restart_policy import RestartHistory, fault
from trainyard.service.timing import Timing

Action = Literal["pause", "resume", "save", "fork", "cancel", "kill", "delete"]
ACTIONS: tuple[Action, ...] = ("pause", "resume", "save", "fork", "cancel", "kill", "delete")

MAX_FRUITLESS_ATTEMPTS = 2
"""After so many attempts in a row that failed and made no step, a further one would not either."""

FINISHED_BLOCKER = "finished: give more epochs or max_steps to go on"


@dataclass(frozen=True)
class JobState:
    """All that the rules look at. ``restart_due``: an interrupted job that will start again by itself.

    ``preempted``: it is pausing for a job of higher priority, and will be queued again by itself.
    """

    status: JobStatus
    desired: Desired
    restart_due: bool = False
    attempts: int = 0
    preempted: bool = False
    has_checkpoint: bool = False


@dataclass(frozen=True)
class Transition:
    """The action fits. ``to`` None: the status stays and only the wish changes."""

    to: JobStatus | None
    desired: Desired


@dataclass(frozen=True)
class InProgress:
    """The action was asked for before and goes its way."""


@dataclass(frozen=True)
class Rejected:
    """The action does not fit, because of ``why``."""

    reason: str


Decision = Transition | InProgress | Rejected


def decide(action: Action, job: JobState) -> Decision:
    """What ``action`` does to a job that stands like this."""
    match action:
        case "pause":
            return _pause(job)
        case "resume":
            return _resume(job)
        case "save":
            running = job.status is JobStatus.RUNNING
            return Transition(None, job.desired) if running else Rejected(_status_phrase(job.status))
        case "fork":
            return (
                Transition(None, job.desired) if job.has_checkpoint else Rejected("there is no checkpoint to begin at")
            )
        case "cancel":
            return _stop(job, Desired.CANCEL)
        case "kill":
            return _stop(job, Desired.KILL)
        case "delete":
            ended = job.status in TERMINAL
            return (
                Transition(None, job.desired) if ended else Rejected(f"{_status_phrase(job.status)}: cancel it first")
            )
        case _:
            assert_never(action)


def allowed_actions(job: JobState) -> list[str]:
    """The verbs that fit."""
    return [action for action in ACTIONS if not isinstance(decide(action, job), Rejected)]


def resume_blocker(job: JobState) -> str | None:
    """Why the job cannot be resumed as it is, or None where it can."""
    decision = decide("resume", job)
    if isinstance(decision, Transition):
        return None
    return decision.reason if isinstance(decision, Rejected) else _status_phrase(job.status)


def _pause(job: JobState) -> Decision:
    match job.status:
        case JobStatus.QUEUED:
            return Transition(JobStatus.PAUSED, Desired.PAUSE)
        case JobStatus.STARTING | JobStatus.RUNNING:
            return Transition(JobStatus.PAUSING, Desired.PAUSE)
        case JobStatus.PAUSING if job.preempted:
            return Transition(None, Desired.PAUSE)
        case JobStatus.PAUSING:
            return InProgress()
        case JobStatus.INTERRUPTED if job.restart_due:
            return Transition(None, Desired.PAUSE)
        case _:
            return Rejected(_status_phrase(job.status))


def _resume(job: JobState) -> Decision:
    match job.status:
        case JobStatus.PAUSED | JobStatus.INTERRUPTED | JobStatus.FAILED | JobStatus.CANCELLED:
            return Transition(JobStatus.QUEUED, Desired.RUN)
        case JobStatus.SUCCEEDED:
            return Rejected(FINISHED_BLOCKER)
        case JobStatus.QUEUED | JobStatus.STARTING if job.attempts > (job.status is JobStatus.STARTING):
            return InProgress()
        case JobStatus.PAUSING if job.preempted:
            return InProgress()
        case JobStatus.PAUSING | JobStatus.CANCELLING:
            return Rejected(f"{_status_phrase(job.status)}: wait until it has stopped")
        case _:
            return Rejected(_status_phrase(job.status))


def _stop(job: JobState, wish: Desired) -> Decision:
    match job.status:
        case JobStatus.QUEUED | JobStatus.PAUSED | JobStatus.INTERRUPTED:
            return Transition(JobStatus.CANCELLED, wish)
        case JobStatus.STARTING | JobStatus.RUNNING | JobStatus.PAUSING:
            return Transition(JobStatus.CANCELLING, wish)
        case JobStatus.CANCELLING:
            return Transition(None, wish) if wish is Desired.KILL and job.desired is not Desired.KILL else InProgress()
        case _:
            return Rejected(_status_phrase(job.status))


def _status_phrase(status: JobStatus) -> str:
    return f"the job is {status}"


@dataclass(frozen=True)
class ExitDecision:
    """What an attempt's end makes of its job. ``restart_seconds`` None: nothing happens without the user.

    ``queued_again``: it has made room for another job, and takes its place in the queue again at once.
    """

    status: JobStatus
    reason: Reason | None
    message: str
    error: ErrorCard | None = None
    restart_seconds: float | None = None
    restarts: int = 0
    requeue: bool = False


def after_exit(
    status: JobStatus,
    report: ExitReport,
    past: RestartHistory,
    max_restarts: int,
    preempted_by: str | None = None,
    timing: Timing = Timing(),
) -> ExitDecision:
    """Where a job goes from ``status`` when its attempt has ended as ``report`` says.

    Args:
        status: one of the live ones; it says what the user wanted.
        report: how the attempt ended. Anything but ``completed`` is never success.
        past: what this attempt and those before it have come to, since the user last started the job.
        max_restarts: how many restarts that count there may be.
        preempted_by: the job for which this one is pausing; None: for its user.
        timing: how long to wait before a restart.
    """
    assert status in LIVE, status
    if report.outcome == "completed":
        return ExitDecision(JobStatus.SUCCEEDED, None, report.message, restarts=past.restarts)
    if status is JobStatus.CANCELLING:
        saved = "" if report.outcome == "stopped" else "; nothing was saved by this stop"
        return ExitDecision(JobStatus.CANCELLED, Reason.USER, f"{report.message}{saved}", restarts=past.restarts)
    if status is JobStatus.PAUSING and preempted_by is not None:
        return _after_preemption(report, past, max_restarts, preempted_by, timing)
    if status is JobStatus.PAUSING:
        return _after_pausing(report, past.restarts)
    return _after_crash(report, fault(report.outcome, report.reason), past, max_restarts, timing)


def _after_preemption(
    report: ExitReport, past: RestartHistory, max_restarts: int, preempted_by: str, timing: Timing
) -> ExitDecision:
    if report.outcome == "stopped":
        message = f"{report.message}, to make room for {preempted_by}; it goes on by itself"
        return ExitDecision(JobStatus.PAUSED, Reason.PREEMPTED, message, restarts=past.restarts, requeue=True)
    # Ended after the grace: we asked for the stop, so it is no fault of the job's.
    why = Reason.PREEMPTED if report.outcome == "killed" else fault(report.outcome, report.reason)
    return _after_crash(report, why, past, max_restarts, timing)


def _after_pausing(report: ExitReport, restarts: int) -> ExitDecision:
    if report.outcome == "stopped":
        return ExitDecision(JobStatus.PAUSED, Reason.USER, report.message, restarts=restarts)
    reason = report.reason or Reason.UNKNOWN
    if report.outcome == "failed" and reason not in RESTARTABLE:
        return ExitDecision(JobStatus.FAILED, reason, report.message, _error_card(report), restarts=restarts)
    message = f"{report.message}; it was pausing, and nothing was saved by this stop"
    return ExitDecision(JobStatus.INTERRUPTED, reason, message, _error_card(report), restarts=restarts)


def _after_crash(
    report: ExitReport, reason: Reason, past: RestartHistory, max_restarts: int, timing: Timing
) -> ExitDecision:
    if reason not in RESTARTABLE:
        return ExitDecision(JobStatus.FAILED, reason, report.message, _error_card(report), restarts=past.restarts)
    counted = reason not in UNCOUNTED_REASONS
    given_up = _give_up_message(past, max_restarts) if counted else None
    if given_up is not None:
        why = Reason.MAX_RESTARTS if max_restarts else reason
        return ExitDecision(
            JobStatus.FAILED, why, f"{report.message}{given_up}", _error_card(report), restarts=past.restarts
        )
    # A time limit that was met with new steps is how a long run goes on, and nothing to wait after.
    seconds = 0.0 if reason is Reason.TIME_LIMIT and not past.setbacks else _restart_delay(past, counted, timing)
    number = past.restarts + counted
    which = f", {number} of {max_restarts}" if counted else ""
    message = f"{report.message}; restarting in {seconds:g} s{which}"
    return ExitDecision(JobStatus.INTERRUPTED, reason, message, _error_card(report), seconds, number)


def _give_up_message(past: RestartHistory, max_restarts: int) -> str | None:
    """What is to be said of a job that is not started again, or None where it is."""
    if past.restarts >= max_restarts:
        return f"; all {max_restarts} restarts are used up" if max_restarts else ""
    if past.fruitless >= MAX_FRUITLESS_ATTEMPTS:
        return (
            f"; {past.fruitless} attempts in a row made no step, so it is given up "
            f"after {past.restarts} of {max_restarts} restarts"
        )
    return None


def _restart_delay(past: RestartHistory, counted: bool, timing: Timing) -> float:
    """Seconds until the next attempt; longer each time, also where nobody is to blame."""
    if counted:
        table, before = timing.backoff_seconds, past.restarts
    else:
        table, before = timing.setback_seconds, max(0, past.setbacks - 1)
    return table[min(before, len(table) - 1)]


def _error_card(report: ExitReport) -> ErrorCard | None:
    if report.error is not None or report.outcome == "stopped":
        return report.error
    return ErrorCard(code=report.reason or Reason.UNKNOWN, message=report.message)
