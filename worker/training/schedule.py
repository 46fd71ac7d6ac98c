"""Pure functions of the step: whether a metric line, an evaluation or a checkpoint is due.

Steps count from 1. Everything depends on the step and the spec alone, never on the attempt, so that a resumed run does
the same things at the same steps as an uninterrupted one.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

from trainyard.contract.spec import JobSpec, TrainingSpec
from trainyard.worker.data.documents import Integers
from trainyard.worker.data.sampler import StepSampler
from trainyard.worker.training.state import TrainProgress

POINTS = 100
"""Approximate number of points of a curve whose ``log_interval`` is null."""


@dataclass(frozen=True)
class StepIntervals:
    """Which steps are logged, evaluated and saved, and at which tasks are scored. An interval of 0: at none."""

    steps: int
    log_interval: int
    save_interval: int
    eval_interval: int = 0
    task_interval: int = 0

    @classmethod
    def from_spec(cls, spec: JobSpec, steps: int, *, evaluates: bool) -> Self:
        """Return the intervals of a run of ``steps`` steps. By default it evaluates as often as it saves."""
        eval_interval = spec.reporting.eval_interval or spec.checkpoint.save_interval
        log_interval = spec.reporting.log_interval or max(1, steps // POINTS)
        task_interval = spec.evaluation.interval or spec.checkpoint.save_interval
        return cls(
            steps,
            log_interval,
            spec.checkpoint.save_interval,
            eval_interval if evaluates else 0,
            task_interval if spec.evaluation.tasks else 0,
        )

    def is_log_step(self, step: int) -> bool:
        """Return whether a metric line is due: at each log_interval, with each evaluation and at the end."""
        return step % self.log_interval == 0 or step >= self.steps or self.is_eval_step(step)

    def is_eval_step(self, step: int) -> bool:
        return self.eval_interval > 0 and (step % self.eval_interval == 0 or step >= self.steps)

    def is_task_step(self, step: int) -> bool:
        return self.task_interval > 0 and step > 0 and (step % self.task_interval == 0 or step >= self.steps)

    def is_save_step(self, step: int) -> bool:
        return step % self.save_interval == 0 or step >= self.steps


def last_step(
    training: TrainingSpec, progress: TrainProgress, sampler: StepSampler, targets_of: Callable[[Integers], Integers]
) -> int:
    """Return the last step of the run, as it is after ``progress``.

    With ``max_tokens`` this is the first step at which so many tokens are trained. After a rollback, which skips data,
    it may be another one. ``targets_of``: see `StepSampler.steps_until`.
    """
    if training.max_tokens is not None:
        left = training.max_tokens - (progress.tokens - progress.base_tokens)
        return progress.step + sampler.steps_until(left, progress.step + progress.data_offset, targets_of)
    steps = training.max_steps if training.max_steps is not None else training.epochs * sampler.steps_per_epoch
    return progress.base_step + steps


def is_finished(training: TrainingSpec, progress: TrainProgress, steps_per_epoch: int) -> bool:
    """Return whether nothing is left to train after ``progress``."""
    if training.max_tokens is not None:
        return progress.tokens - progress.base_tokens >= training.max_tokens
    steps = training.max_steps if training.max_steps is not None else training.epochs * steps_per_epoch
    return progress.step - progress.base_step >= steps
