"""The learning rate of each step: a pure function of the spec, the length of the run and the step."""

import math
from dataclasses import dataclass, replace
from typing import Self

from trainyard.contract.spec import TrainingSpec


@dataclass(frozen=True)
class LRSchedule:
    """The learning rate by step: linear warm-up, then a decay from ``peak_lr`` to ``peak_lr * min_lr_ratio``.

    ``steps`` and ``warmup`` are counted from ``base_step``. ``continued_at``: (step, last step of the run until then),
    in order, for each time that a resume made the run longer and continued its decay. After such a step the rate decays
    from the one it had there, in the shape of ``kind``, to the next such length, or to the end.
    """

    peak_lr: float
    min_lr_ratio: float
    steps: int
    warmup: int = 0
    kind: str = "cosine"
    base_step: int = 0
    continued_at: tuple[tuple[int, int], ...] = ()

    @classmethod
    def from_spec(cls, training: TrainingSpec, steps: int, base_step: int = 0) -> Self:
        """Return the schedule of a run from ``base_step`` to step ``steps``."""
        kind, length = str(training.lr_scheduler), steps - base_step
        continued_at = tuple(training.continued_at)
        return cls(
            training.learning_rate, training.min_lr_ratio, length, training.warmup_steps, kind, base_step, continued_at
        )

    def at(self, step: int) -> float:
        ends = [*(end for _, end in self.continued_at), self.base_step + self.steps]
        number = sum(start < step for start, _ in self.continued_at)
        if number == 0:
            return lr_at(
                step - self.base_step,
                ends[0] - self.base_step,
                self.peak_lr,
                self.min_lr_ratio,
                self.warmup,
                self.kind,
            )
        start, end = self.continued_at[number - 1]
        earlier = replace(self, steps=end - self.base_step, continued_at=self.continued_at[: number - 1])
        rate, lowest = earlier.at(start), self.peak_lr * self.min_lr_ratio
        return lr_at(step - start, ends[number] - start, rate, lowest / rate if rate else 1.0, kind=self.kind)

    def continuations(self, step: int) -> list[tuple[int, int]]:
        """Return ``continued_at`` of a run that is made longer at ``step`` and continues its decay from there."""
        kept = [pair for pair in self.continued_at if pair[0] < step]
        if step - self.base_step <= self.warmup:
            return kept  # before the decay the rate does not depend on the length
        end = next((end for start, end in self.continued_at if start >= step), self.base_step + self.steps)
        return [*kept, (step, end)]


def lr_at(step: int, steps: int, peak: float, min_ratio: float = 0.1, warmup: int = 0, kind: str = "cosine") -> float:
    """Return MiniMind's learning rate: ``peak * (r + (1-r)/2 * (1 + cos(pi * step / steps)))``, r = ``min_ratio``.

    MiniMind has no warm-up. After a warm-up of w steps, the decay runs over the rest: (step - w) / (steps - w).
    """
    if step < warmup:
        return peak * step / warmup
    done = (step - warmup) / max(1, steps - warmup)
    match kind:
        case "cosine":
            return peak * (min_ratio + (1 - min_ratio) / 2 * (1 + math.cos(math.pi * done)))
        case "linear":
            return peak * (min_ratio + (1 - min_ratio) * (1 - done))
        case "constant":
            return peak
        case _:
            raise ValueError(f"no lr_scheduler is called {kind}")
