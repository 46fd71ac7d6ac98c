"""The agent's next action: a pure function of its observation."""

from dataclasses import dataclass
from enum import StrEnum
from typing import assert_never

from trainyard.contract.spec import Timeouts
from trainyard.contract.status import Desired


class EscalationStep(StrEnum):
    """One step of the escalation. KILL also removes what is left once torchrun has ended."""

    WAIT = "wait"
    REQUEST_STOP = "request_stop"
    TERMINATE = "terminate"
    KILL = "kill"


class StopCause(StrEnum):
    """Why the agent ended the ranks; None in its place means that they ended by themselves."""

    KILLED = "killed"
    """The user requested a kill, without a save."""
    OVERDUE = "overdue"
    """A stop was requested, and the ranks did not save and exit within the grace period."""
    HUNG = "hung"
    """The ranks made no progress."""
    PEER_LOST = "peer_lost"
    """The ranks of another node ended, and these did not."""


@dataclass(frozen=True)
class Observation:
    """What the agent knows at one moment; times are of the monotonic clock, in seconds."""

    torchrun_ended: bool
    desired: Desired
    received_signal: bool
    stop_requested_at: float | None
    terminated_at: float | None
    is_hung: bool
    peer_lost: bool = False


def next_step(observed: Observation, timeouts: Timeouts, now: float) -> tuple[EscalationStep, StopCause | None]:
    """Return the next action, and the cause if it ends the ranks."""
    if observed.torchrun_ended:
        # After our SIGTERM or a kill request, an exit without an outcome of rank 0 is our doing and not a crash.
        cause = StopCause.KILLED if observed.desired is Desired.KILL else None
        return EscalationStep.KILL, cause if observed.terminated_at is None else StopCause.OVERDUE
    if observed.peer_lost:
        return EscalationStep.KILL, StopCause.PEER_LOST
    match observed.desired:
        case Desired.KILL:
            return EscalationStep.KILL, StopCause.KILLED
        case Desired.PAUSE | Desired.CANCEL:
            return _escalate(observed, timeouts, now)
        case Desired.RUN:
            if observed.received_signal or observed.stop_requested_at is not None:
                # A stop is never withdrawn: the ranks may be in the middle of their last save.
                return _escalate(observed, timeouts, now)
            return (EscalationStep.KILL, StopCause.HUNG) if observed.is_hung else (EscalationStep.WAIT, None)
        case _:
            assert_never(observed.desired)


def _escalate(observed: Observation, timeouts: Timeouts, now: float) -> tuple[EscalationStep, StopCause | None]:
    if observed.stop_requested_at is None:
        return EscalationStep.REQUEST_STOP, None
    if observed.terminated_at is None:
        overdue = now - observed.stop_requested_at >= timeouts.stop
        return EscalationStep.TERMINATE if overdue else EscalationStep.WAIT, None
    overdue = now - observed.terminated_at >= timeouts.term
    return (EscalationStep.KILL, StopCause.OVERDUE) if overdue else (EscalationStep.WAIT, None)
