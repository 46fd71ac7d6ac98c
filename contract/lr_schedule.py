"""The learning rate of each step: a pure function of the spec, the length of the run and the step."""

import math
from dataclasses import dataclass, replace
from typing import Self

from trainyard.contract.spec import TrainingSpec

DEFAULT_DECAY_FRACTION = 0.2


@dataclass(frozen=True)
class LRSchedule:
    """The learning rate by step: linear warm-up, then a decay from ``peak_lr`` to ``peak_lr * min_lr_ratio``.

    ``steps`` and ``warmup`` are counted from ``base_step``. ``kind`` wsd (warm-up, stable, decay) stays at the peak and
    decays in its last steps: ``decay_steps`` of them, or ``decay_fraction`` of all, in the shape ``decay_shape``.

    ``continued_at``: (step, last step of the run until then), in order, for each time that a resume made the run longer
    and continued its decay. After such a step the rate decays from the one it had there, in the shape of ``kind``, to
    the next such length, or to the end.
    """

    peak_lr: float
    min_lr_ratio: float
    steps: int
    warmup: int = 0
    kind: str = "cosine"
    base_step: int = 0
    continued_at: tuple[tuple[int, int], ...] = ()
    decay_steps: int | None = None
    decay_fraction: float | None = None
    decay_shape: str = "sqrt"

    @classmethod
    def from_spec(cls, training: TrainingSpec, steps: int, base_step: int = 0) -> Self:
        """Return the schedule of a run from ``base_step`` to step ``steps``."""
        return cls(
            peak_lr=training.learning_rate,
            min_lr_ratio=training.min_lr_ratio,
            steps=steps - base_step,
            warmup=training.warmup_steps,
            kind=str(training.lr_scheduler),
            base_step=base_step,
            continued_at=tuple(training.continued_at),
            decay_steps=training.decay_steps,
            decay_fraction=training.decay_fraction,
            decay_shape=str(training.decay_shape),
        )

    def at(self, step: int) -> float:
        ends = [*(end for _, end in self.continued_at), self.base_step + self.steps]
        number = sum(start < step for start, _ in self.continued_at)
        if number == 0:
            length = ends[0] - self.base_step
            return self._decayed(step - self.base_step, length, self.peak_lr, self._decay_start(length), self.warmup)
        start, end = self.continued_at[number - 1]
        earlier = replace(self, steps=end - self.base_step, continued_at=self.continued_at[: number - 1])
        return self._decayed(step - start, ends[number] - start, earlier.at(start))

    def _decayed(self, step: int, steps: int, peak: float, decay_start: int = 0, warmup: int = 0) -> float:
        lowest = self.peak_lr * self.min_lr_ratio
        ratio = self.min_lr_ratio if peak == self.peak_lr else lowest / peak if peak else 1.0
        if self.kind != "wsd":
            return lr_at(step, steps, peak, ratio, warmup, self.kind)
        if step < warmup or step <= decay_start:
            return lr_at(step, steps, peak, ratio, warmup, "constant")
        return lr_at(step - decay_start, steps - decay_start, peak, ratio, 0, self.decay_shape)

    def _decay_start(self, length: int) -> int:
        """Return the step, from ``base_step`` on, after which a run of ``length`` steps depends on its length."""
        if self.kind != "wsd":
            return self.warmup
        fraction = self.decay_fraction if self.decay_fraction is not None else DEFAULT_DECAY_FRACTION
        decay = self.decay_steps if self.decay_steps is not None else max(1, round(fraction * length))
        return max(self.warmup, length - decay)

    def continuations(self, step: int) -> list[tuple[int, int]]:
        """Return ``continued_at`` of a run that is made longer at ``step`` and continues its decay from there."""
        kept = [pair for pair in self.continued_at if pair[0] < step]
        end = next((end for start, end in self.continued_at if start >= step), self.base_step + self.steps)
        if not kept and step - self.base_step <= self._decay_start(end - self.base_step):
            return kept  # before the decay the rate does not depend on the length
        return [*kept, (step, end)]

    def curve(self, first: int, points: int = 200) -> list[tuple[int, float]]:
        """Return (step, rate) of at most ``points`` steps from ``first`` to the last, with all those where it bends."""
        last = self.base_step + self.steps
        if last < first:
            return []
        ends = [end for _, end in self.continued_at] or [last]
        bends = [self.base_step + self.warmup, self.base_step + self._decay_start(ends[0] - self.base_step)]
        wanted = {first, last, *bends, *(start for start, _ in self.continued_at)}
        wanted = set(sorted(step for step in wanted if first <= step <= last)[-points:])
        others = points - len(wanted)
        if last - first < points:
            wanted |= set(range(first, last + 1))
        elif others > 0:
            wanted |= {first + round((last - first) * (n + 1) / (others + 1)) for n in range(others)}
        return [(step, self.at(step)) for step in sorted(wanted)]


def lr_at(step: int, steps: int, peak: float, min_ratio: float = 0.1, warmup: int = 0, kind: str = "cosine") -> float:
    """Return MiniMind's learning rate: ``peak * (r + (1-r)/2 * (1 + cos(pi * step / steps)))``, r = ``min_ratio``.

    MiniMind has no warm-up. After a warm-up of w steps, the decay runs over the rest: (step - w) / (steps - w).
    """
    if step < warmup:
        return peak * step / warmup
    # A length that is an estimate may be too short: after its end the rate stays at its last value.
    done = min(1.0, (step - warmup) / max(1, steps - warmup))
    match kind:
        case "cosine":
            return peak * (min_ratio + (1 - min_ratio) / 2 * (1 + math.cos(math.pi * done)))
        case "linear":
            return peak * (min_ratio + (1 - min_ratio) * (1 - done))
        case "sqrt":
            return peak * (min_ratio + (1 - min_ratio) * (1 - math.sqrt(done)))
        case "constant":
            return peak
        case _:
            raise ValueError(f"no lr_scheduler is called {kind}")
