"""What the agent does next: a pure function of what it sees."""

from dataclasses import dataclass
from enum import StrEnum
from typing import assert_never

from trainyard.contract.spec import Timeouts
from trainyard.contract.status import Desired


class EscalationStep(StrEnum):
    """One step of the escalation. KILL also clears away what is left once torchrun has ended."""

    WAIT = "wait"
    ASK = "ask"
    TERMINATE = "terminate"
    KILL = "kill"


class StopCause(StrEnum):
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
class Observation:
    """What the agent knows at one moment; times are of the monotonic clock, in seconds."""

    torchrun_ended: bool
    desired: Desired
    received_signal: bool
    stop_requested_at: float | None
    termed_at: float | None
    is_hung: bool
    peer_lost: bool = False


def next_step(seen: Observation, timeouts: Timeouts, now: float) -> tuple[EscalationStep, StopCause | None]:
    """The next action, and why, where it is the agent that ends the ranks."""
    if seen.torchrun_ended:
        # Where they were to be ended, an end without a word of rank 0 is our doing and no crash of theirs.
        asked_for = StopCause.KILLED if seen.desired is Desired.KILL else None
        return EscalationStep.KILL, asked_for if seen.termed_at is None else StopCause.OVERDUE
    if seen.peer_lost:
        return EscalationStep.KILL, StopCause.DESERTED
    match seen.desired:
        case Desired.KILL:
            return EscalationStep.KILL, StopCause.KILLED
        case Desired.PAUSE | Desired.CANCEL:
            return _escalate(seen, timeouts, now)
        case Desired.RUN:
            if seen.received_signal or seen.stop_requested_at is not None:
                # A stop once asked for goes its way: ranks that are saving must not be told to go on.
                return _escalate(seen, timeouts, now)
            return (EscalationStep.KILL, StopCause.HUNG) if seen.is_hung else (EscalationStep.WAIT, None)
        case _:
            assert_never(seen.desired)


def _escalate(seen: Observation, timeouts: Timeouts, now: float) -> tuple[EscalationStep, StopCause | None]:
    if seen.stop_requested_at is None:
        return EscalationStep.ASK, None
    if seen.termed_at is None:
        return (
            EscalationStep.TERMINATE if now - seen.stop_requested_at >= timeouts.stop else EscalationStep.WAIT
        ), None
    overdue = now - seen.termed_at >= timeouts.term
    return (EscalationStep.KILL, StopCause.OVERDUE) if overdue else (EscalationStep.WAIT, None)
