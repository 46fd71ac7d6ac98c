"""The escalation, as a table: what is seen -> what is done."""

import dataclasses

import pytest

from trainyard.contract.spec import Timeouts
from trainyard.contract.status import Desired
from trainyard.worker.agent.escalation import (
    EscalationStep,
    Observation,
    StopCause,
    next_step,
)

TIMEOUTS = Timeouts(stop=100.0, term=10.0)
CALM = Observation(
    torchrun_ended=False,
    desired=Desired.RUN,
    received_signal=False,
    stop_requested_at=None,
    termed_at=None,
    is_hung=False,
)


@pytest.mark.parametrize(
    ("change", "now", "expected"),
    [
        ({}, 0.0, (EscalationStep.WAIT, None)),
        ({"torchrun_ended": True}, 0.0, (EscalationStep.KILL, None)),
        ({"torchrun_ended": True, "desired": Desired.PAUSE, "asked_at": 0.0}, 1.0, (EscalationStep.KILL, None)),
        ({"torchrun_ended": True, "asked_at": 0.0, "termed_at": 1.0}, 2.0, (EscalationStep.KILL, StopCause.OVERDUE)),
        ({"torchrun_ended": True, "desired": Desired.KILL}, 0.0, (EscalationStep.KILL, StopCause.KILLED)),
        ({"stuck": True}, 0.0, (EscalationStep.KILL, StopCause.HUNG)),
        ({"desired": Desired.KILL}, 0.0, (EscalationStep.KILL, StopCause.KILLED)),
        ({"desired": Desired.KILL, "asked_at": 0.0}, 1.0, (EscalationStep.KILL, StopCause.KILLED)),
        ({"desired": Desired.PAUSE}, 50.0, (EscalationStep.ASK, None)),
        ({"desired": Desired.CANCEL}, 50.0, (EscalationStep.ASK, None)),
        ({"signalled": True}, 50.0, (EscalationStep.ASK, None)),
        ({"desired": Desired.PAUSE, "asked_at": 50.0}, 149.0, (EscalationStep.WAIT, None)),
        ({"desired": Desired.PAUSE, "asked_at": 50.0}, 150.0, (EscalationStep.TERMINATE, None)),
        ({"desired": Desired.PAUSE, "asked_at": 50.0, "termed_at": 150.0}, 159.0, (EscalationStep.WAIT, None)),
        (
            {"desired": Desired.PAUSE, "asked_at": 50.0, "termed_at": 150.0},
            160.0,
            (EscalationStep.KILL, StopCause.OVERDUE),
        ),
        # A run that was told to stop and is "wanted" again goes on stopping: it may be in the middle of its save.
        ({"desired": Desired.RUN, "asked_at": 50.0}, 60.0, (EscalationStep.WAIT, None)),
        # Saving takes as long as it takes: no hang is declared while a stop is under way.
        ({"desired": Desired.PAUSE, "asked_at": 50.0, "stuck": True}, 60.0, (EscalationStep.WAIT, None)),
    ],
)
def test_the_table(change: dict[str, object], now: float, expected: tuple[EscalationStep, StopCause | None]) -> None:
    assert next_step(dataclasses.replace(CALM, **change), TIMEOUTS, now) == expected  # type: ignore[arg-type]
