"""The loss curve that `watch` shows: the newest points, and their exponential moving average."""

from collections import deque
from collections.abc import Iterable, Mapping
from typing import Any

MAX_POINTS = 2000
HALF_LIFE = 50.0
"""Steps after which a point has half its weight. The dashboard uses the same."""


class Ema:
    """Exponential moving average whose weights depend on the distance in steps, not on the log interval."""

    def __init__(self, half_life: float = HALF_LIFE) -> None:
        self._half_life = half_life
        self._step: int | None = None
        self._weighted = 0.0
        self._weight = 0.0

    def add(self, step: int, value: float) -> None:
        """Add a finite value. Steps must not decrease."""
        distance = 0 if self._step is None else step - self._step
        decay = 0.5 ** (distance / self._half_life)
        self._weighted = decay * self._weighted + value
        self._weight = decay * self._weight + 1.0
        self._step = step

    @property
    def value(self) -> float | None:
        """The average, or None before the first value."""
        return self._weighted / self._weight if self._weight else None


class Curve:
    """Points in the order of their steps. `rewind` removes those that a new attempt will report again."""

    def __init__(self) -> None:
        self.points: deque[tuple[int, float]] = deque(maxlen=MAX_POINTS)
        self.last: Mapping[str, Any] | None = None
        self.last_eval: Mapping[str, Any] | None = None
        self._ema = Ema()

    @property
    def step(self) -> int:
        """The step of the newest point, 0 before the first."""
        return int(self.last["step"]) if self.last else 0

    @property
    def ema(self) -> float | None:
        """The average loss, or None before the first point."""
        return self._ema.value

    @property
    def losses(self) -> list[float]:
        """The finite losses of the newest points, oldest first."""
        return [loss for _, loss in self.points]

    def extend(self, metrics: Iterable[Mapping[str, Any]]) -> None:
        """Add new points."""
        for metric in metrics:
            self.last = metric
            if metric.get("eval_loss") is not None:
                self.last_eval = metric
            if metric.get("loss") is not None:
                self.points.append((metric["step"], metric["loss"]))
                self._ema.add(metric["step"], metric["loss"])

    def rewind(self, step: int) -> None:
        """Remove the points after ``step``, at which a new attempt has started."""
        kept = [(at, loss) for at, loss in self.points if at <= step]
        self.points = deque(kept, maxlen=MAX_POINTS)
        self._ema = Ema()
        for at, loss in kept:
            self._ema.add(at, loss)
        if self.last and self.last["step"] > step:
            self.last = {"step": step}
