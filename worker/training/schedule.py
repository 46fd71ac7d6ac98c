"""What is due at a step: the learning rate, a metric line, an evaluation, a checkpoint. Pure functions of the step.

Steps count from 1. What is due depends on the step and the spec alone, never on the attempt, so that an interrupted
run does the same things at the same steps as one that was left alone.
"""

import math
from dataclasses import dataclass
from typing import Self

from trainyard.contract.spec import JobSpec, TrainingSpec


@dataclass(frozen=True)
class LRSchedule:
    """The rate as a function of the step: linear warm-up, then a decline from ``peak`` to ``peak * floor``.

    ``steps`` and ``warmup`` are counted behind ``base``.
    """

    peak_lr: float
    min_lr: float
    steps: int
    warmup: int = 0
    kind: str = "cosine"
    base: int = 0

    @classmethod
    def of(cls, training: TrainingSpec, steps: int, base: int = 0) -> Self:
        """The schedule of a run that ends with step ``steps``, counted behind step ``base``."""
        kind, own = str(training.lr_scheduler), steps - base
        return cls(training.learning_rate, training.min_lr_ratio, own, training.warmup_steps, kind, base)

    def at(self, step: int) -> float:
        """The rate that step ``step`` is taken with."""
        return lr_at(step - self.base, self.steps, self.peak_lr, self.min_lr, self.warmup, self.kind)


def lr_at(step: int, steps: int, peak: float, floor: float = 0.1, warmup: int = 0, kind: str = "cosine") -> float:
    """MiniMind's rate, with the warm-up it lacks: ``peak * (r + (1-r)/2 * (1 + cos(pi * step / steps)))``, r = floor.

    After a warm-up of w steps the decline runs over the steps that are left: (step - w) / (steps - w).
    """
    if step < warmup:
        return peak * step / warmup
    done = (step - warmup) / max(1, steps - warmup)
    match kind:
        case "cosine":
            return peak * (floor + (1 - floor) / 2 * (1 + math.cos(math.pi * done)))
        case "linear":
            return peak * (floor + (1 - floor) * (1 - done))
        case "constant":
            return peak
        case _:
            raise ValueError(f"no lr_scheduler is called {kind}")


@dataclass(frozen=True)
class StepIntervals:
    """What is due when. ``eval_interval`` 0: nothing is ever evaluated."""

    steps: int
    log_interval: int
    save_interval: int
    eval_interval: int = 0

    @classmethod
    def of(cls, spec: JobSpec, steps: int, *, evaluates: bool) -> Self:
        """The calendar of a run of ``steps`` steps; without eval_interval it is evaluated where it is saved."""
        eval_interval = spec.reporting.eval_interval or spec.checkpoint.save_interval
        return cls(steps, spec.reporting.log_interval, spec.checkpoint.save_interval, eval_interval if evaluates else 0)

    def is_log_step(self, step: int) -> bool:
        """Whether a metric line is due: at each log_interval, with each evaluation and at the end."""
        return step % self.log_interval == 0 or step >= self.steps or self.is_eval_step(step)

    def is_eval_step(self, step: int) -> bool:
        """Whether the held-out data is due."""
        return self.eval_interval > 0 and (step % self.eval_interval == 0 or step >= self.steps)

    def is_save_step(self, step: int) -> bool:
        """Whether a checkpoint is due."""
        return step % self.save_interval == 0 or step >= self.steps


def total_steps(training: TrainingSpec, steps_per_epoch: int) -> int:
    """Optimizer steps of the whole job: ``max_steps`` alone where it is given, else so many epochs."""
    return training.max_steps if training.max_steps is not None else training.epochs * steps_per_epoch
