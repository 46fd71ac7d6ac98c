"""A long curve as few rows, and stretches of it as sums: two stretches in a row add up to one. Pure.

The running mean is kept as sums that decay: over a stretch that ends at its last finite step s, the total is the sum of
``loss * 0.5 ** ((s - step) / H)`` and the weight that of the factors alone. Both can be carried on to a later s.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import Any, NamedTuple

HALF_LIVES = (10, 50, 200, 1000)
"""Those that are kept: what the dashboard offers. Any other is made of the points."""

BUCKET_FIELDS = (
    "first_step", "step", "attempt", "count", "loss", "loss_mean", "loss_min", "loss_max", "loss_ema",
    "nonfinite_count", "nonfinite",
)  # fmt: skip


class Aggregate(NamedTuple):
    """A stretch, or a point, with the sums of one half-life. ``finite_step``: None where no loss in it is finite."""

    first_step: int
    step: int
    attempt: int
    points: int
    nonfinite: int
    loss: float | None
    loss_sum: float
    loss_min: float | None
    loss_max: float | None
    finite_step: int | None
    total: float
    weight: float


def aggregate_of(step: int, loss: float | None, attempt: int) -> Aggregate:
    """One point."""
    if loss is None or not math.isfinite(loss):
        return Aggregate(step, step, attempt, 1, 1, loss, 0.0, None, None, None, 0.0, 0.0)
    return Aggregate(step, step, attempt, 1, 0, loss, loss, loss, loss, step, loss, 1.0)


def bucket_width(last_step: int, max_points: int, first_step: int = 0) -> int:
    """The smallest power of two that makes at most ``max_points`` rows of ``first_step`` to ``last_step``."""
    wide = 1
    while last_step // wide - first_step // wide + 1 > max_points:
        wide *= 2
    return wide


def to_buckets(parts: Iterable[Aggregate], wide: int, half_life: float) -> Iterator[dict[str, Any]]:
    """Yield a row for each ``wide`` steps, at absolute multiples: the rows of a growing curve never move.

    ``parts`` come in order of their steps, and the running mean goes on over all of them.
    """
    total = weight = 0.0
    at = 0
    for _, group in groupby(parts, key=lambda part: part.step // wide):
        stretch = list(group)
        first, last = stretch[0], stretch[-1]
        count = nonfinite = 0
        finite: list[Aggregate] = []
        for part in stretch:
            count += part.points
            nonfinite += part.nonfinite
            if part.finite_step is not None:
                finite.append(part)
                kept = decay(part.finite_step - at, half_life)  # of nothing, before the first
                total, weight, at = kept * total + part.total, kept * weight + part.weight, part.finite_step
        yield {
            "first_step": first.first_step,
            "step": last.step,
            "attempt": last.attempt,
            "count": count,
            "loss": last.loss,
            "loss_mean": math.fsum([part.loss_sum for part in finite]) / (count - nonfinite) if finite else None,
            "loss_min": min([part.loss_min for part in finite if part.loss_min is not None], default=None),
            "loss_max": max([part.loss_max for part in finite if part.loss_max is not None], default=None),
            "loss_ema": total / weight if finite else None,
            "nonfinite_count": nonfinite,
            "nonfinite": last.loss is None,
        }


def decay(distance: int, half_life: float) -> float:
    """What is left of a weight after ``distance`` steps."""
    return float(0.5 ** (distance / half_life)) if half_life > 0 else 0.0


@dataclass
class RollupBucket:
    """A stretch as it is stored, with the sums of every half-life that is kept."""

    first_step: int
    step: int
    attempt: int
    count: int
    nonfinite: int
    loss: float | None
    loss_sum: float
    loss_min: float | None
    loss_max: float | None
    finite_step: int | None
    totals: list[float]
    weights: list[float]

    @classmethod
    def of(cls, step: int, loss: float | None, attempt: int) -> "RollupBucket":
        """One point."""
        part = aggregate_of(step, loss, attempt)
        kinds = len(HALF_LIVES)
        return cls(*part[:10], [part.total] * kinds, [part.weight] * kinds)

    def add(self, later: "RollupBucket") -> None:
        """Take in the stretch that follows."""
        self.step, self.attempt, self.loss = later.step, later.attempt, later.loss
        self.count += later.count
        self.nonfinite += later.nonfinite
        self.loss_sum += later.loss_sum
        if later.finite_step is None:
            return
        if self.finite_step is None:
            self.totals, self.weights = list(later.totals), list(later.weights)
            self.loss_min, self.loss_max = later.loss_min, later.loss_max
        else:
            self._carry(later)
        self.finite_step = later.finite_step

    def _carry(self, later: "RollupBucket") -> None:
        assert self.finite_step is not None
        assert later.finite_step is not None
        assert self.loss_min is not None
        assert self.loss_max is not None
        assert later.loss_min is not None
        assert later.loss_max is not None
        distance = later.finite_step - self.finite_step
        for index, half_life in enumerate(HALF_LIVES):
            kept = decay(distance, half_life)
            self.totals[index] = kept * self.totals[index] + later.totals[index]
            self.weights[index] = kept * self.weights[index] + later.weights[index]
        self.loss_min, self.loss_max = min(self.loss_min, later.loss_min), max(self.loss_max, later.loss_max)


def aggregate(stretches: Iterable[RollupBucket], wide: int) -> list[RollupBucket]:
    """Stretches in order, put together into those of width ``wide``."""
    found: list[RollupBucket] = []
    for stretch in stretches:
        if found and found[-1].step // wide == stretch.step // wide:
            found[-1].add(stretch)
        else:
            found.append(stretch)
    return found
