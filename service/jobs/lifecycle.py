"""The rules of a job's lifecycle: which user action is allowed when, and what follows after an attempt. Pure.

Whether a job is restarted depends on the attempts since the user last started it: whether they make progress, and whose
fault it was if not.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, assert_never

from trainyard.contract.messages import ErrorCard, ExitReport
from trainyard.contract.status import LIVE, RESTARTABLE, TERMINAL, UNCOUNTED_REASONS, Desired, JobStatus, Reason
from trainyard.service.timing import Timing

BY_USER = ("submit", "resume")
"""Triggers of attempts that a user requested. They reset all counts."""


@dataclass(frozen=True)
class EndedAttempt:
    """One attempt that ended. ``made_progress``: it made a step after the one it started from."""

    trigger: str
    reason: Reason
    made_progress: bool


@dataclass(frozen=True)
class RestartHistory:
    """``restarts``: those that count against ``max_restarts``.

    Of the newest attempts in a row that made no step, ``fruitless`` failed by themselves and ``setbacks`` for a reason
    outside the job. Both include the attempt that has just ended.
    """

    restarts: int = 0
    fruitless: int = 0
    setbacks: int = 0


def made_a_step(start_step: int | None, end_step: int | None) -> bool:
    """Return True if an attempt made a step. One that never reported its start step started at 0."""
    return (end_step or 0) > (start_step or 0)


def fault(outcome: str, reason: Reason | None) -> Reason:
    """Return the reason of an end that the service did not request."""
    if reason is Reason.TIME_LIMIT:
        return reason  # whether it saved in time or not
    match outcome:
        case "stopped":
            return Reason.TERMINATED  # a host that shuts down, or a person with a shell
        case "killed":
            return Reason.UNKNOWN
        case _:
            return reason or Reason.UNKNOWN


def restart_history(restarts: int, newest_first: Iterable[EndedAttempt]) -> RestartHistory:
    """Count back to the newest attempt that made a step or that the user requested."""
    fruitless = setbacks = 0
    for attempt in newest_first:
        if attempt.made_progress:
            break
        if attempt.reason in UNCOUNTED_REASONS:
            setbacks += 1
        else:
            fruitless += 1
        if attempt.trigger in BY_USER:
            break
    return RestartHistory(restarts, fruitless, setbacks)


Action = Literal["pause", "resume", "save", "fork", "cancel", "kill", "delete"]
ACTIONS: tuple[Action, ...] = ("pause", "resume", "save", "fork", "cancel", "kill", "delete")

MAX_FRUITLESS_ATTEMPTS = 2
"""After this many failed attempts in a row without a step, another one would not make any either."""

FINISHED_BLOCKER = "finished: give more epochs, max_steps or max_tokens to continue"
LIMIT_BLOCKER = "ended at its limit: give more max_minutes or a lower target_loss, or null, to continue"
NOT_SAVED = "no checkpoint was written at this stop"


@dataclass(frozen=True)
class JobState:
    """All that `decide` depends on. ``restart_due``: an interrupted job that will restart automatically.

    ``preempted``: it is pausing for a job of higher priority, and will be queued again automatically. ``at_limit``: a
    limit of the spec has ended it.
    """

    status: JobStatus
    desired: Desired
    restart_due: bool = False
    attempts: int = 0
    preempted: bool = False
    has_checkpoint: bool = False
    at_limit: bool = False


@dataclass(frozen=True)
class Transition:
    """The action is allowed. ``to`` None: the status stays and only ``desired`` changes."""

    to: JobStatus | None
    desired: Desired


@dataclass(frozen=True)
class InProgress:
    """The action was requested before and has not finished."""


@dataclass(frozen=True)
class Rejected:
    """The action is not allowed, for ``reason``."""

    reason: str


Decision = Transition | InProgress | Rejected


def decide(action: Action, job: JobState) -> Decision:
    """Return what ``action`` does to a job in this state."""
    match action:
        case "pause":
            return _pause(job)
        case "resume":
            return _resume(job)
        case "save":
            running = job.status is JobStatus.RUNNING
            return Transition(None, job.desired) if running else Rejected(_status_phrase(job.status))
        case "fork":
            return Transition(None, job.desired) if job.has_checkpoint else Rejected("there is no checkpoint to fork")
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
    """Return the actions that are not rejected."""
    return [action for action in ACTIONS if not isinstance(decide(action, job), Rejected)]


def resume_blocker(job: JobState) -> str | None:
    """Return why the job cannot be resumed as it is, or None if it can."""
    decision = decide("resume", job)
    if isinstance(decision, Transition):
        return None
    return decision.reason if isinstance(decision, Rejected) else _status_phrase(job.status)


def _pause(job: JobState) -> Decision:
    match job.status:
        case JobStatus.QUEUED | JobStatus.PREPARING:
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
            return Rejected(LIMIT_BLOCKER if job.at_limit else FINISHED_BLOCKER)
        case JobStatus.QUEUED | JobStatus.PREPARING | JobStatus.STARTING if job.attempts > (
            job.status is JobStatus.STARTING
        ):
            return InProgress()
        case JobStatus.PAUSING if job.preempted:
            return InProgress()
        case JobStatus.PAUSING | JobStatus.CANCELLING:
            return Rejected(f"{_status_phrase(job.status)}: wait until it has stopped")
        case _:
            return Rejected(_status_phrase(job.status))


def _stop(job: JobState, desired: Desired) -> Decision:
    match job.status:
        case JobStatus.QUEUED | JobStatus.PREPARING | JobStatus.PAUSED | JobStatus.INTERRUPTED:
            return Transition(JobStatus.CANCELLED, desired)
        case JobStatus.STARTING | JobStatus.RUNNING | JobStatus.PAUSING:
            return Transition(JobStatus.CANCELLING, desired)
        case JobStatus.CANCELLING if desired is Desired.KILL and job.desired is not Desired.KILL:
            return Transition(None, desired)  # a cancel that saves becomes a kill
        case JobStatus.CANCELLING:
            return InProgress()
        case _:
            return Rejected(_status_phrase(job.status))


def _status_phrase(status: JobStatus) -> str:
    return f"the job is {status}"


@dataclass(frozen=True)
class ExitDecision:
    """The job's next state after an attempt. ``restart_seconds`` None: no automatic restart.

    ``requeue``: the job was preempted, or the service stops: it is queued again at once in its old place.
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
    history: RestartHistory,
    max_restarts: int,
    preempted_by: str | None = None,
    timing: Timing = Timing(),
    service_stops: bool = False,
) -> ExitDecision:
    """Return the job's next state after an attempt ended as ``report`` says.

    Args:
        status: one of LIVE. Pausing and cancelling mean that the user or the scheduler requested the stop.
        report: how the attempt ended. Only ``completed`` is success.
        history: this attempt and those before it, since the user last started the job.
        max_restarts: the number of restarts that count.
        preempted_by: the job for which this one is pausing, or None if the user paused it.
        timing: delays before a restart.
        service_stops: the service has asked every attempt of its host to save and end, because it ends itself.
    """
    assert status in LIVE, status
    if report.outcome == "completed":
        reason = Reason.LIMIT if report.reason is Reason.LIMIT else None
        return ExitDecision(JobStatus.SUCCEEDED, reason, report.message, restarts=history.restarts)
    if status is JobStatus.CANCELLING:
        saved = "" if report.outcome == "stopped" else f"; {NOT_SAVED}"
        return ExitDecision(JobStatus.CANCELLED, Reason.USER, f"{report.message}{saved}", restarts=history.restarts)
    if status is JobStatus.PAUSING and preempted_by is not None:
        return _after_preemption(report, history, max_restarts, preempted_by, timing)
    if status is JobStatus.PAUSING:
        return _after_pausing(report, history.restarts)
    if service_stops and report.outcome in ("stopped", "killed"):
        # In its old place in the queue: another job must not get its devices first when the service starts again.
        saved = "" if report.outcome == "stopped" else f"; {NOT_SAVED}"
        message = f"{report.message}, because the service stops{saved}; it resumes when the service starts"
        return ExitDecision(JobStatus.INTERRUPTED, Reason.TERMINATED, message, restarts=history.restarts, requeue=True)
    return _after_crash(report, fault(report.outcome, report.reason), history, max_restarts, timing)


def _after_preemption(
    report: ExitReport, history: RestartHistory, max_restarts: int, preempted_by: str, timing: Timing
) -> ExitDecision:
    if report.outcome == "stopped":
        message = f"{report.message}, to make room for {preempted_by}; it resumes automatically"
        return ExitDecision(JobStatus.PAUSED, Reason.PREEMPTED, message, restarts=history.restarts, requeue=True)
    # Killed after the grace period: the scheduler requested the stop, so the job is not to blame.
    why = Reason.PREEMPTED if report.outcome == "killed" else fault(report.outcome, report.reason)
    return _after_crash(report, why, history, max_restarts, timing)


def _after_pausing(report: ExitReport, restarts: int) -> ExitDecision:
    if report.outcome == "stopped":
        return ExitDecision(JobStatus.PAUSED, Reason.USER, report.message, restarts=restarts)
    reason = report.reason or Reason.UNKNOWN
    if report.outcome == "failed" and reason not in RESTARTABLE:
        return ExitDecision(JobStatus.FAILED, reason, report.message, _error_card(report), restarts=restarts)
    message = f"{report.message}; it was pausing, and {NOT_SAVED}"
    return ExitDecision(JobStatus.INTERRUPTED, reason, message, _error_card(report), restarts=restarts)


def _after_crash(
    report: ExitReport, reason: Reason, history: RestartHistory, max_restarts: int, timing: Timing
) -> ExitDecision:
    if reason not in RESTARTABLE:
        return ExitDecision(JobStatus.FAILED, reason, report.message, _error_card(report), restarts=history.restarts)
    counted = reason not in UNCOUNTED_REASONS
    given_up = _give_up_message(history, max_restarts) if counted else None
    if given_up is not None:
        why = Reason.MAX_RESTARTS if max_restarts else reason
        return ExitDecision(
            JobStatus.FAILED, why, f"{report.message}{given_up}", _error_card(report), restarts=history.restarts
        )
    # A long run reaches its time limit again and again: after new steps there is no reason to wait.
    seconds = 0.0 if reason is Reason.TIME_LIMIT and not history.setbacks else _restart_delay(history, counted, timing)
    number = history.restarts + counted
    which = f", {number} of {max_restarts}" if counted else ""
    message = f"{report.message}; restarting in {seconds:g} s{which}"
    return ExitDecision(JobStatus.INTERRUPTED, reason, message, _error_card(report), seconds, number)


def _give_up_message(history: RestartHistory, max_restarts: int) -> str | None:
    """Return the message's end for a job that is not restarted, or None if it is."""
    if history.restarts >= max_restarts:
        return f"; all {max_restarts} restarts are used up" if max_restarts else ""
    if history.fruitless >= MAX_FRUITLESS_ATTEMPTS:
        return (
            f"; {history.fruitless} attempts in a row made no step, so it is given up "
            f"after {history.restarts} of {max_restarts} restarts"
        )
    return None


def _restart_delay(history: RestartHistory, counted: bool, timing: Timing) -> float:
    # Longer each time, also after ends that do not count against max_restarts.
    if counted:
        table, before = timing.backoff_seconds, history.restarts
    else:
        table, before = timing.setback_seconds, max(0, history.setbacks - 1)
    return table[min(before, len(table) - 1)]


def _error_card(report: ExitReport) -> ErrorCard | None:
    if report.error is not None or report.outcome == "stopped":
        return report.error
    return ErrorCard(code=report.reason or Reason.UNKNOWN, message=report.message)
