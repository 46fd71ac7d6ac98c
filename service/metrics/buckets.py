"""A long curve as few rows: buckets of a power-of-two width at absolute multiples. Pure.

A running curve grows at its end and never moves; a spike stays in its bucket's maximum.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

BUCKET_FIELDS = (
    "first_step",
    "step",
    "attempt",
    "count",
    "loss",
    "loss_mean",
    "loss_min",
    "loss_max",
    "loss_ema",
    "nonfinite_count",
    "nonfinite",
)


class Point(NamedTuple):
    """The loss at a step; None: it was not finite or not measured."""

    step: int
    loss: float | None
    attempt: int


@dataclass
class Ema:
    """Exponential mean over raw points with a half-life in steps; non-finite ones are skipped."""

    half_life: float
    total: float = 0.0
    weight: float = 0.0
    step: int | None = None

    def add(self, step: int, value: float) -> float:
        """The mean after ``value`` at ``step``."""
        distance = step - self.step if self.step is not None else 0
        decay = 0.5 ** (distance / self.half_life) if self.half_life > 0 else 0.0
        self.total = decay * self.total + value
        self.weight = decay * self.weight + 1.0
        self.step = step
        return self.total / self.weight


@dataclass
class _Bucket:
    first_step: int
    step: int = 0
    attempt: int = 0
    count: int = 0
    nonfinite: int = 0
    last: float | None = None
    ema: float | None = None
    finite: list[float] = field(default_factory=list)

    def row(self) -> dict[str, Any]:
        finite = self.finite
        return {
            "first_step": self.first_step,
            "step": self.step,
            "attempt": self.attempt,
            "count": self.count,
            "loss": self.last,
            "loss_mean": math.fsum(finite) / len(finite) if finite else None,
            "loss_min": min(finite, default=None),
            "loss_max": max(finite, default=None),
            "loss_ema": self.ema,
            "nonfinite_count": self.nonfinite,
            "nonfinite": self.last is None,
        }


def width(last_step: int, max_points: int, first_step: int = 0) -> int:
    """The smallest power of two that makes at most ``max_points`` buckets of ``first_step`` to ``last_step``."""
    wide = 1
    while last_step // wide - first_step // wide + 1 > max_points:
        wide *= 2
    return wide


def buckets(points: Iterable[Point], wide: int, ema_half_life: float) -> Iterator[dict[str, Any]]:
    """Rows for ``points``, which come in order of their steps. The mean runs on over all of them."""
    ema = Ema(ema_half_life)
    bucket: _Bucket | None = None
    for point in points:
        if bucket is None or point.step // wide != bucket.step // wide:
            if bucket is not None:
                yield bucket.row()
            bucket = _Bucket(point.step)
        bucket.step, bucket.attempt, bucket.last = point.step, point.attempt, point.loss
        bucket.count += 1
        if point.loss is None or not math.isfinite(point.loss):
            bucket.nonfinite += 1
        else:
            bucket.finite.append(point.loss)
            bucket.ema = ema.add(point.step, point.loss)
    if bucket is not None:
        yield bucket.row()
