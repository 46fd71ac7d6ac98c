"""What may be done with a job, and what an attempt's end makes of it. Pure."""

from dataclasses import dataclass
from typing import Literal, assert_never

from contract.report import ErrorCard, ExitReport
from contract.status import LIVE, NOT_COUNTED, RESTARTABLE, TERMINAL, Desired, JobStatus, Reason

Action = Literal["pause", "resume", "save", "cancel", "kill", "delete"]
ACTIONS: tuple[Action, ...] = ("pause", "resume", "save", "cancel", "kill", "delete")

BACKOFF_SECONDS = (5.0, 20.0, 60.0)
"""Wait before restart 1, 2, and 3 and later."""

FINISHED_BLOCKER = "finished: give more epochs or max_steps to go on"


@dataclass(frozen=True)
class Standing:
    """All that the rules look at. ``restart_due``: an interrupted job that will start again by itself."""

    status: JobStatus
    desired: Desired
    restart_due: bool = False
    attempts: int = 0


@dataclass(frozen=True)
class Move:
    """The action fits. ``to`` None: the status stays and only the wish changes."""

    to: JobStatus | None
    desired: Desired


@dataclass(frozen=True)
class UnderWay:
    """The action was asked for before and goes its way."""


@dataclass(frozen=True)
class Refusal:
    """The action does not fit, because of ``why``."""

    why: str


Decision = Move | UnderWay | Refusal


def decide(action: Action, job: Standing) -> Decision:
    """What ``action`` does to a job that stands like this."""
    match action:
        case "pause":
            return _pause(job)
        case "resume":
            return _resume(job)
        case "save":
            running = job.status is JobStatus.RUNNING
            return Move(None, job.desired) if running else Refusal(_is(job.status))
        case "cancel":
            return _stop(job, Desired.CANCEL)
        case "kill":
            return _stop(job, Desired.KILL)
        case "delete":
            ended = job.status in TERMINAL
            return Move(None, job.desired) if ended else Refusal(f"{_is(job.status)}: cancel it first")
        case _:
            assert_never(action)


def fitting(job: Standing) -> list[str]:
    """The verbs that fit."""
    return [action for action in ACTIONS if not isinstance(decide(action, job), Refusal)]


def resume_blocker(job: Standing) -> str | None:
    """Why the job cannot be resumed as it is, or None where it can."""
    decision = decide("resume", job)
    if isinstance(decision, Move):
        return None
    return decision.why if isinstance(decision, Refusal) else _is(job.status)


def _pause(job: Standing) -> Decision:
    match job.status:
        case JobStatus.QUEUED:
            return Move(JobStatus.PAUSED, Desired.PAUSE)
        case JobStatus.STARTING | JobStatus.RUNNING:
            return Move(JobStatus.PAUSING, Desired.PAUSE)
        case JobStatus.PAUSING:
            return UnderWay()
        case JobStatus.INTERRUPTED if job.restart_due:
            return Move(None, Desired.PAUSE)
        case _:
            return Refusal(_is(job.status))


def _resume(job: Standing) -> Decision:
    match job.status:
        case JobStatus.PAUSED | JobStatus.INTERRUPTED | JobStatus.FAILED | JobStatus.CANCELLED:
            return Move(JobStatus.QUEUED, Desired.RUN)
        case JobStatus.SUCCEEDED:
            return Refusal(FINISHED_BLOCKER)
        case JobStatus.QUEUED | JobStatus.STARTING if job.attempts > (job.status is JobStatus.STARTING):
            return UnderWay()
        case JobStatus.PAUSING | JobStatus.CANCELLING:
            return Refusal(f"{_is(job.status)}: wait until it has stopped")
        case _:
            return Refusal(_is(job.status))


def _stop(job: Standing, wish: Desired) -> Decision:
    match job.status:
        case JobStatus.QUEUED | JobStatus.PAUSED | JobStatus.INTERRUPTED:
            return Move(JobStatus.CANCELLED, wish)
        case JobStatus.STARTING | JobStatus.RUNNING | JobStatus.PAUSING:
            return Move(JobStatus.CANCELLING, wish)
        case JobStatus.CANCELLING:
            return Move(None, wish) if wish is Desired.KILL and job.desired is not Desired.KILL else UnderWay()
        case _:
            return Refusal(_is(job.status))


def _is(status: JobStatus) -> str:
    return f"the job is {status}"


@dataclass(frozen=True)
class Ending:
    """What an attempt's end makes of its job. ``restart_seconds`` None: nothing happens without the user."""

    status: JobStatus
    reason: Reason | None
    message: str
    error: ErrorCard | None = None
    restart_seconds: float | None = None
    restarts: int = 0


def after_exit(status: JobStatus, report: ExitReport, restarts: int, max_restarts: int) -> Ending:
    """Where a job goes from ``status`` when its attempt has ended as ``report`` says.

    Args:
        status: one of the live ones; it says what the user wanted.
        report: how the attempt ended. Anything but ``completed`` is never success.
        restarts: restarts since the user last started the job, those that count.
        max_restarts: how many there may be.
    """
    assert status in LIVE, status
    if report.outcome == "completed":
        return Ending(JobStatus.SUCCEEDED, None, report.message, restarts=restarts)
    if status is JobStatus.CANCELLING:
        saved = "" if report.outcome == "stopped" else "; nothing was saved by this stop"
        return Ending(JobStatus.CANCELLED, Reason.USER, f"{report.message}{saved}", restarts=restarts)
    if status is JobStatus.PAUSING:
        return _after_pausing(report, restarts)
    return _after_crash(report, restarts, max_restarts)


def _after_pausing(report: ExitReport, restarts: int) -> Ending:
    if report.outcome == "stopped":
        return Ending(JobStatus.PAUSED, Reason.USER, report.message, restarts=restarts)
    reason = report.reason or Reason.UNKNOWN
    if report.outcome == "failed" and reason not in RESTARTABLE:
        return Ending(JobStatus.FAILED, reason, report.message, _card(report), restarts=restarts)
    message = f"{report.message}; it was pausing, and nothing was saved by this stop"
    return Ending(JobStatus.INTERRUPTED, reason, message, _card(report), restarts=restarts)


def _after_crash(report: ExitReport, restarts: int, max_restarts: int) -> Ending:
    reason = report.reason or Reason.UNKNOWN
    if report.outcome == "stopped":
        # Nobody here asked for it: a host that shuts down, or a person with a shell.
        reason = Reason.TERMINATED
    if report.outcome == "killed":
        reason = Reason.UNKNOWN
    if reason not in RESTARTABLE:
        return Ending(JobStatus.FAILED, reason, report.message, _card(report), restarts=restarts)
    counted = reason not in NOT_COUNTED
    if counted and restarts >= max_restarts:
        why = Reason.MAX_RESTARTS if max_restarts else reason
        used_up = f"; all {max_restarts} restarts are used up" if max_restarts else ""
        return Ending(JobStatus.FAILED, why, f"{report.message}{used_up}", _card(report), restarts=restarts)
    seconds = BACKOFF_SECONDS[min(restarts, len(BACKOFF_SECONDS) - 1)]
    number = restarts + counted
    which = f", {number} of {max_restarts}" if counted else ""
    message = f"{report.message}; restarting in {seconds:g} s{which}"
    return Ending(JobStatus.INTERRUPTED, reason, message, _card(report), seconds, number)


def _card(report: ExitReport) -> ErrorCard | None:
    if report.error is not None or report.outcome == "stopped":
        return report.error
    return ErrorCard(code=report.reason or Reason.UNKNOWN, message=report.message)
