"""What the agent does next: a pure function of what it sees."""

from dataclasses import dataclass
from enum import StrEnum
from typing import assert_never

from trainyard.contract.spec import Timeouts
from trainyard.contract.status import Desired


class Action(StrEnum):
    """One step of the escalation. KILL also clears away what is left once torchrun has ended."""

    WAIT = "wait"
    ASK = "ask"
    TERMINATE = "terminate"
    KILL = "kill"


class Cause(StrEnum):
    """Why the agent ended the ranks. None of these: they ended by themselves."""

    KILLED = "killed"
    """The user asked for an end without a save."""
    OVERDUE = "overdue"
    """They were asked to save and stop, and did not within the grace."""
    HUNG = "hung"
    """They made no progress."""
    DESERTED = "deserted"
    """The ranks of another node had ended, and these did not."""


@dataclass(frozen=True)
class Seen:
    """What the agent knows at one moment; times are of the monotonic clock, in seconds."""

    torchrun_ended: bool
    desired: Desired
    signalled: bool
    asked_at: float | None
    termed_at: float | None
    stuck: bool
    deserted: bool = False


def decide(seen: Seen, timeouts: Timeouts, now: float) -> tuple[Action, Cause | None]:
    """The next action, and why, where it is the agent that ends the ranks."""
    if seen.torchrun_ended:
        # Where they were to be ended, an end without a word of rank 0 is our doing and no crash of theirs.
        asked_for = Cause.KILLED if seen.desired is Desired.KILL else None
        return Action.KILL, asked_for if seen.termed_at is None else Cause.OVERDUE
    if seen.deserted:
        return Action.KILL, Cause.DESERTED
    match seen.desired:
        case Desired.KILL:
            return Action.KILL, Cause.KILLED
        case Desired.PAUSE | Desired.CANCEL:
            return _escalate(seen, timeouts, now)
        case Desired.RUN:
            if seen.signalled or seen.asked_at is not None:
                # A stop once asked for goes its way: ranks that are saving must not be told to go on.
                return _escalate(seen, timeouts, now)
            return (Action.KILL, Cause.HUNG) if seen.stuck else (Action.WAIT, None)
        case _:
            assert_never(seen.desired)


def _escalate(seen: Seen, timeouts: Timeouts, now: float) -> tuple[Action, Cause | None]:
    if seen.asked_at is None:
        return Action.ASK, None
    if seen.termed_at is None:
        return (Action.TERMINATE if now - seen.asked_at >= timeouts.stop else Action.WAIT), None
    overdue = now - seen.termed_at >= timeouts.term
    return (Action.KILL, Cause.OVERDUE) if overdue else (Action.WAIT, None)
