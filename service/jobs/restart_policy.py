"""The attempts since the user last started a job: do they make progress, and whose fault was it if not? Pure."""

from collections.abc import Iterable
from dataclasses import dataclass

from trainyard.contract.status import UNCOUNTED_REASONS, Reason

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
