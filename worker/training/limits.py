"""The limits of a run: a time of active training, and a loss to reach."""

import statistics
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from trainyard.contract.spec import LimitsSpec

STEPS_TIMED = 8


@dataclass
class RunLimits:
    """Decides whether a limit is reached.

    ``earlier_seconds``: active training time of the attempts before this one. ``own_seconds``: of this attempt, now.
    ``first_step``: the step that the first attempt started from.
    """

    spec: LimitsSpec
    earlier_seconds: float
    own_seconds: Callable[[], float]
    first_step: int = 0
    _step_seconds: deque[float] = field(default_factory=lambda: deque(maxlen=STEPS_TIMED))
    _counted: float | None = None

    def seconds(self) -> float:
        """Return the active training time of all attempts together, see `contract.rundir.RunDir.train_seconds`."""
        return self.earlier_seconds + self.own_seconds()

    def end_step(self) -> None:
        """Record the time of the finished step. `is_time_up` estimates the next steps by it."""
        now = self.seconds()
        if self._counted is not None:
            self._step_seconds.append(now - self._counted)
        self._counted = now

    def is_time_up(self, steps_ahead: int = 0) -> bool:
        """Return whether the time is used up, now or after ``steps_ahead`` steps of the median length."""
        minutes = self.spec.max_minutes
        if minutes is None:
            return False
        ahead = steps_ahead * statistics.median(self._step_seconds) if self._step_seconds else 0.0
        return self.seconds() + ahead >= 60 * minutes

    def is_reached(self, loss: float | None) -> bool:
        """Return whether ``loss`` is the target or less."""
        return self.spec.target_loss is not None and loss is not None and loss <= self.spec.target_loss

    def time_message(self, step: int) -> str:
        return f"limits.max_minutes: {self.spec.max_minutes:g} minutes of training are used up at step {step:,}"

    def loss_message(self, name: str, loss: float | None, step: int) -> str:
        return f"limits.target_loss {self.spec.target_loss:g} is reached at step {step:,}: the {name} is {loss:.4f}"
