"""What a job's attempts have come to since the user last started it: whether it gets anywhere at all. Pure."""

from collections.abc import Iterable
from dataclasses import dataclass

from trainyard.contract.status import UNCOUNTED_REASONS, Reason

BY_USER = ("submit", "resume")
"""Triggers of an attempt that somebody asked for: with it everything is counted anew."""


@dataclass(frozen=True)
class EndedAttempt:
    """One attempt that ended. ``moved``: it made a step beyond the checkpoint it began from."""

    trigger: str
    reason: Reason
    made_progress: bool


@dataclass(frozen=True)
class RestartHistory:
    """``restarts`` are those that count against ``max_restarts``.

    Of the newest attempts in a row that made no step, ``fruitless`` ended by their own fault and ``setbacks`` by
    nobody's. Both include the attempt that has just ended.
    """

    restarts: int = 0
    fruitless: int = 0
    setbacks: int = 0


def made_a_step(start_step: int | None, end_step: int | None) -> bool:
    """Whether an attempt came further than it began. One that never said where it began was at 0."""
    return (end_step or 0) > (start_step or 0)


def fault(outcome: str, reason: Reason | None) -> Reason:
    """Why an attempt ended that nobody here had asked to end."""
    if reason is Reason.TIME_LIMIT:
        return reason  # saved in time or not
    match outcome:
        case "stopped":
            return Reason.TERMINATED  # a host that shuts down, or a person with a shell
        case "killed":
            return Reason.UNKNOWN
        case _:
            return reason or Reason.UNKNOWN


def restart_history(restarts: int, newest_first: Iterable[EndedAttempt]) -> RestartHistory:
    """Count back to the newest attempt that made a step, or that the user had asked for."""
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
