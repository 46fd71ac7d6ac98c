"""The escalation, as a table: what is seen -> what is done."""

import dataclasses

import pytest

from trainyard.contract.spec import Timeouts
from trainyard.contract.status import Desired
from trainyard.worker.agent.escalation import (
    Action,
    Cause,
    Seen,
    decide,
)

TIMEOUTS = Timeouts(stop=100.0, term=10.0)
CALM = Seen(torchrun_ended=False, desired=Desired.RUN, signalled=False, asked_at=None, termed_at=None, stuck=False)


@pytest.mark.parametrize(
    ("change", "now", "expected"),
    [
        ({}, 0.0, (Action.WAIT, None)),
        ({"torchrun_ended": True}, 0.0, (Action.KILL, None)),
        ({"torchrun_ended": True, "desired": Desired.PAUSE, "asked_at": 0.0}, 1.0, (Action.KILL, None)),
        ({"torchrun_ended": True, "asked_at": 0.0, "termed_at": 1.0}, 2.0, (Action.KILL, Cause.OVERDUE)),
        ({"torchrun_ended": True, "desired": Desired.KILL}, 0.0, (Action.KILL, Cause.KILLED)),
        ({"stuck": True}, 0.0, (Action.KILL, Cause.HUNG)),
        ({"desired": Desired.KILL}, 0.0, (Action.KILL, Cause.KILLED)),
        ({"desired": Desired.KILL, "asked_at": 0.0}, 1.0, (Action.KILL, Cause.KILLED)),
        ({"desired": Desired.PAUSE}, 50.0, (Action.ASK, None)),
        ({"desired": Desired.CANCEL}, 50.0, (Action.ASK, None)),
        ({"signalled": True}, 50.0, (Action.ASK, None)),
        ({"desired": Desired.PAUSE, "asked_at": 50.0}, 149.0, (Action.WAIT, None)),
        ({"desired": Desired.PAUSE, "asked_at": 50.0}, 150.0, (Action.TERMINATE, None)),
        ({"desired": Desired.PAUSE, "asked_at": 50.0, "termed_at": 150.0}, 159.0, (Action.WAIT, None)),
        ({"desired": Desired.PAUSE, "asked_at": 50.0, "termed_at": 150.0}, 160.0, (Action.KILL, Cause.OVERDUE)),
        # A run that was told to stop and is "wanted" again goes on stopping: it may be in the middle of its save.
        ({"desired": Desired.RUN, "asked_at": 50.0}, 60.0, (Action.WAIT, None)),
        # Saving takes as long as it takes: no hang is declared while a stop is under way.
        ({"desired": Desired.PAUSE, "asked_at": 50.0, "stuck": True}, 60.0, (Action.WAIT, None)),
    ],
)
def test_the_table(change: dict[str, object], now: float, expected: tuple[Action, Cause | None]) -> None:
    assert decide(dataclasses.replace(CALM, **change), TIMEOUTS, now) == expected  # type: ignore[arg-type]
