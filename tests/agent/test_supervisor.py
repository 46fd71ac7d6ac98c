"""The escalation, as a table: observation -> step."""

import dataclasses

import pytest

from trainyard.contract.spec import Timeouts
from trainyard.contract.status import Desired
from trainyard.worker.agent.exit_report import StopCause
from trainyard.worker.agent.supervisor import EscalationStep as Step
from trainyard.worker.agent.supervisor import Observation, next_step

TIMEOUTS = Timeouts(stop=100.0, term=10.0)
IDLE = Observation(
    torchrun_ended=False,
    desired=Desired.RUN,
    received_signal=False,
    stop_requested_at=None,
    terminated_at=None,
    is_hung=False,
)


@pytest.mark.parametrize(
    ("change", "now", "expected"),
    [
        ({}, 0.0, (Step.WAIT, None)),
        ({"torchrun_ended": True}, 0.0, (Step.KILL, None)),
        (
            {"torchrun_ended": True, "desired": Desired.PAUSE, "stop_requested_at": 0.0},
            1.0,
            (Step.KILL, None),
        ),
        (
            {"torchrun_ended": True, "stop_requested_at": 0.0, "terminated_at": 1.0},
            2.0,
            (Step.KILL, StopCause.OVERDUE),
        ),
        ({"torchrun_ended": True, "desired": Desired.KILL}, 0.0, (Step.KILL, StopCause.KILLED)),
        ({"is_hung": True}, 0.0, (Step.KILL, StopCause.HUNG)),
        ({"desired": Desired.KILL}, 0.0, (Step.KILL, StopCause.KILLED)),
        ({"desired": Desired.KILL, "stop_requested_at": 0.0}, 1.0, (Step.KILL, StopCause.KILLED)),
        ({"desired": Desired.PAUSE}, 50.0, (Step.REQUEST_STOP, None)),
        ({"desired": Desired.CANCEL}, 50.0, (Step.REQUEST_STOP, None)),
        ({"received_signal": True}, 50.0, (Step.REQUEST_STOP, None)),
        ({"desired": Desired.PAUSE, "stop_requested_at": 50.0}, 149.0, (Step.WAIT, None)),
        ({"desired": Desired.PAUSE, "stop_requested_at": 50.0}, 150.0, (Step.TERMINATE, None)),
        (
            {"desired": Desired.PAUSE, "stop_requested_at": 50.0, "terminated_at": 150.0},
            159.0,
            (Step.WAIT, None),
        ),
        (
            {"desired": Desired.PAUSE, "stop_requested_at": 50.0, "terminated_at": 150.0},
            160.0,
            (Step.KILL, StopCause.OVERDUE),
        ),
        # A stop that was requested is not withdrawn: the run may be in the middle of its save.
        ({"desired": Desired.RUN, "stop_requested_at": 50.0}, 60.0, (Step.WAIT, None)),
        # Saving takes as long as it takes: no hang is declared while a stop is under way.
        ({"desired": Desired.PAUSE, "stop_requested_at": 50.0, "is_hung": True}, 60.0, (Step.WAIT, None)),
    ],
)
def test_the_table(change: dict[str, object], now: float, expected: tuple[Step, StopCause | None]) -> None:
    assert next_step(dataclasses.replace(IDLE, **change), TIMEOUTS, now) == expected  # type: ignore[arg-type]
