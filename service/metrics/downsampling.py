"""Downsample a long curve into buckets. Sums over adjacent ranges of steps can be added up. Pure.

The exponential moving average (EMA) with half-life H is stored as two sums over the finite points of a range. If s is
the last finite step, ``total`` is the sum of ``loss * 0.5 ** ((s - step) / H)``, ``weight`` the sum of the factors.
Both are moved to a later s by one multiplication with ``decay``.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import Any, NamedTuple

from trainyard.contract.smoothing import Ema, decay

HALF_LIVES = (10, 50, 200, 1000)
"""Half-lives that are stored: those the dashboard offers. Any other is computed from the points."""

BUCKET_FIELDS = (
    "first_step", "step", "attempt", "count", "loss", "loss_mean", "loss_min", "loss_max", "loss_ema",
    "nonfinite_count", "nonfinite",
)  # fmt: skip


class Aggregate(NamedTuple):
    """The sums over a range of steps for one half-life. ``finite_step``: the last finite one, None if there is none."""

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
    """Return the aggregate of one point."""
    if loss is None or not math.isfinite(loss):
        return Aggregate(step, step, attempt, 1, 1, loss, 0.0, None, None, None, 0.0, 0.0)
    return Aggregate(step, step, attempt, 1, 0, loss, loss, loss, loss, step, loss, 1.0)


def sum_of(first_step: int, last_step: int, points: int, loss_sum: float) -> Aggregate:
    """Return the aggregate of finite points that has only their sum and their number."""
    return Aggregate(first_step, last_step, 0, points, 0, None, float(loss_sum), None, None, last_step, 0.0, 0.0)


def bucket_width(last_step: int, max_points: int, first_step: int = 0) -> int:
    """Return the smallest power of two that needs at most ``max_points`` buckets for the steps given."""
    width = 1
    while last_step // width - first_step // width + 1 > max_points:
        width *= 2
    return width


def to_buckets(aggregates: Iterable[Aggregate], width: int, half_life: float) -> Iterator[dict[str, Any]]:
    """Yield a bucket for each ``width`` steps that have points. ``aggregates`` are in step order.

    Buckets start at multiples of ``width``, so those of a growing curve never move. The EMA runs over all aggregates.
    """
    ema = Ema(half_life)
    for _, group in groupby(aggregates, key=lambda part: part.step // width):
        parts = list(group)
        first, last = parts[0], parts[-1]
        count = nonfinite = 0
        finite: list[Aggregate] = []
        for part in parts:
            count += part.points
            nonfinite += part.nonfinite
            if part.finite_step is not None:
                finite.append(part)
                ema.add(part.finite_step, part.total, part.weight)
        yield {
            "first_step": first.first_step,
            "step": last.step,
            "attempt": last.attempt,
            "count": count,
            "loss": last.loss,
            "loss_mean": math.fsum([part.loss_sum for part in finite]) / (count - nonfinite) if finite else None,
            "loss_min": min([part.loss_min for part in finite if part.loss_min is not None], default=None),
            "loss_max": max([part.loss_max for part in finite if part.loss_max is not None], default=None),
            "loss_ema": ema.value if finite else None,
            "nonfinite_count": nonfinite,
            "nonfinite": last.loss is None,
        }


@dataclass
class RollupBucket:
    """The sums over a range of steps as stored: an `Aggregate` for every half-life of HALF_LIVES."""

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
        """Return the bucket of one point."""
        part = aggregate_of(step, loss, attempt)
        count = len(HALF_LIVES)
        return cls(*part[:10], [part.total] * count, [part.weight] * count)

    def add(self, later: "RollupBucket") -> None:
        """Add the bucket that follows."""
        self.step, self.attempt, self.loss = later.step, later.attempt, later.loss
        self.count += later.count
        self.nonfinite += later.nonfinite
        self.loss_sum += later.loss_sum
        if later.finite_step is None:
            return
        assert later.loss_min is not None
        assert later.loss_max is not None
        # If no point was finite so far, totals and weights are 0, and the factor does not matter.
        distance = later.finite_step - (self.finite_step or 0)
        for index, half_life in enumerate(HALF_LIVES):
            factor = decay(distance, half_life)
            self.totals[index] = factor * self.totals[index] + later.totals[index]
            self.weights[index] = factor * self.weights[index] + later.weights[index]
        self.loss_min = later.loss_min if self.loss_min is None else min(self.loss_min, later.loss_min)
        self.loss_max = later.loss_max if self.loss_max is None else max(self.loss_max, later.loss_max)
        self.finite_step = later.finite_step


def aggregate(buckets: Iterable[RollupBucket], width: int) -> list[RollupBucket]:
    """Merge buckets, which are in step order, into buckets of ``width`` steps. Modifies the buckets given."""
    merged: list[RollupBucket] = []
    for bucket in buckets:
        if merged and merged[-1].step // width == bucket.step // width:
            merged[-1].add(bucket)
        else:
            merged.append(bucket)
    return merged
