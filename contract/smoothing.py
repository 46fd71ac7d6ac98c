"""The exponential moving average of a curve, by steps: what the service shows, and what `limits.target_loss` reads."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

HALF_LIFE = 50.0
"""Of the smoothed loss, in steps."""


def decay(distance: int, half_life: float) -> float:
    """Return the factor by which a weight decays over ``distance`` steps."""
    return float(0.5 ** (distance / half_life)) if half_life > 0 else 0.0


@dataclass
class Ema:
    """An exponential moving average: its weighted sum and the sum of the weights, at ``step``."""

    half_life: float
    total: float = 0.0
    weight: float = 0.0
    step: int = 0

    def add(self, step: int, total: float, weight: float = 1.0) -> None:
        """Add a value, or the sums of several values, of ``step``, which comes after the last one."""
        factor = decay(step - self.step, self.half_life)
        self.total, self.weight, self.step = factor * self.total + total, factor * self.weight + weight, step

    @classmethod
    def from_sums(cls, sums: Sequence[float], half_life: float = HALF_LIFE) -> Self:
        """Return the average whose `sums` these are; [] gives an empty one."""
        return cls(half_life, sums[0], sums[1], int(sums[2])) if sums else cls(half_life)

    @property
    def sums(self) -> list[float]:
        return [self.total, self.weight, self.step]

    @property
    def value(self) -> float:
        return self.total / self.weight
