"""Is the run learning at all? Where the curve is not what it should be, says once what was seen and what to try."""

import math
import statistics
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Self

from trainyard.contract.events import WarningEvent
from trainyard.worker.distributed import FloatRow

WINDOW, MIN_STEPS = 64, 32

MIN_DEVIATIONS, MIN_RELATIVE_RISE = 10.0, 0.2

QUIET_STEPS = 100

ROWS = 8


@dataclass(frozen=True)
class Spike:
    """A step whose loss is far from what is usual on its rank; ``rows`` are those of its worst micro-batch."""

    step: int
    loss: float
    typical: float
    rows: tuple[int, ...]

    def row(self) -> FloatRow:
        """As numbers of a fixed count, to be gathered."""
        rows = [float(row) for row in self.rows[:ROWS]]
        return [float(self.step), self.loss, self.typical, *rows, *[-1.0] * (ROWS - len(rows))]

    @classmethod
    def of(cls, row: FloatRow) -> Self:
        """The inverse of `row`."""
        return cls(int(row[0]), row[1], row[2], tuple(int(number) for number in row[3:] if number >= 0))


NO_SPIKE = Spike(0, 0.0, 0.0, ())


@dataclass
class LossSpikeDetector:
    """Watches the steps of one rank.

    A step's loss is a spike where it is above the median of the last 64 by more than 10 spreads, more than a fifth of
    that median, and more than twice as far as any of the 64 was. The spread is 1.4826 times the median distance from
    the median, which for ordinary noise is its standard deviation.

    Fewer than 32 steps are no ground to judge on, so the beginning of every attempt is not watched. After a spike
    nothing is told for 100 steps: a loss that stays up has become usual by then.
    """

    pending: Spike | None = None
    _recent: deque[float] = field(default_factory=lambda: deque(maxlen=WINDOW))
    _quiet_until: int = 0

    def observe(self, step: int, loss: float, rows: tuple[int, ...]) -> None:
        """Judge a step; a spike stays ``pending`` until it is told. What is not finite is somebody else's business."""
        if not math.isfinite(loss):
            return
        if len(self._recent) >= MIN_STEPS and step >= self._quiet_until:
            usual = statistics.median(self._recent)
            spread = 1.4826 * statistics.median(abs(other - usual) for other in self._recent)
            furthest = max(self._recent) - usual
            if loss - usual > max(MIN_DEVIATIONS * spread, MIN_RELATIVE_RISE * usual, 2 * furthest):
                self.pending = Spike(step, loss, usual, rows)
                self._quiet_until = step + QUIET_STEPS
        self._recent.append(loss)

    def row(self) -> FloatRow:
        """What this rank has to tell, perhaps nothing; it is told by that."""
        mine, self.pending = self.pending or NO_SPIKE, None
        return mine.row()


def spike_warning(rows: list[FloatRow]) -> WarningEvent | None:
    """The warning about all ranks' spikes: the highest one is named. None where nobody had any."""
    spikes = [(spike, rank) for rank, row in enumerate(rows) if (spike := Spike.of(row)).step]
    if not spikes:
        return None
    spike, rank = max(spikes, key=lambda found: found[0].loss - found[0].typical)
    where = f" of rank {rank}" if len(rows) > 1 else ""
    message = (
        f"the loss jumped to {spike.loss:.3f} at step {spike.step:,}, where {spike.typical:.3f} is usual; its worst "
        f"micro-batch{where} has rows {', '.join(map(str, spike.rows))}. One of these now and then does no harm; if "
        "they come often, lower training.learning_rate or training.grad_clip, and look at those rows"
    )
    data = {"loss": spike.loss, "usual": spike.typical, "rows": list(spike.rows), "rank": rank}
    return WarningEvent(code="loss_spike", message=message, step=spike.step, data=data)


ABOVE_GUESSING = 0.05

"""Nats by which untrained weights are worse than guessing, see `Decoder.initialise`."""

FIRST_TOLERANCE = 0.5

FLAT_STEPS, FLAT_NATS = 300, 0.2

VANISHING_NORM, EXPLODING_NORM, CONSECUTIVE_STEPS = 1e-6, 1e3, 20


@dataclass
class LearningMonitor:
    """Watches one attempt on rank 0.

    ``vocab_size``: None where the weights were trained before, which makes any first loss a good one. ``warmup_steps``
    are not held against the curve. Rules: the loss of step 1 is within 0.5 of ln V + 0.05; 300 steps behind the warm-up
    it is at least 0.2 below that of step 1; and no 20 steps in a row have a gradient norm below 1e-6 or above 1000.
    """

    vocab_size: int | None
    warmup_steps: int = 0
    first_loss: float | None = None
    _small: int = 0
    _large: int = 0
    _reported: set[str] = field(default_factory=set)

    def observe(self, step: int, loss: float, grad_norm: float) -> Iterator[WarningEvent]:
        """What a step gives reason to say; ``loss`` is this rank's mean in it."""
        if step == 1 and self.vocab_size is not None and math.isfinite(loss):
            self.first_loss = loss
            yield from self._first(loss, math.log(self.vocab_size) + ABOVE_GUESSING)
        if not math.isfinite(grad_norm):
            return
        self._small = self._small + 1 if grad_norm < VANISHING_NORM else 0
        self._large = self._large + 1 if grad_norm > EXPLODING_NORM else 0
        if self._small == CONSECUTIVE_STEPS:
            message = (
                f"the gradient has all but vanished: its norm is {grad_norm:.1e}, and was below {VANISHING_NORM:g} for "
                f"{CONSECUTIVE_STEPS} steps. Look whether the texts are all the same or empty, and raise training.learning_rate"
            )
            yield from self._once("gradients_vanish", step, message)
        if self._large == CONSECUTIVE_STEPS:
            message = (
                f"the gradient blows up: its norm is {grad_norm:.3g}, and was above {EXPLODING_NORM:g} for {CONSECUTIVE_STEPS} steps. "
                "Lower training.learning_rate, set training.warmup_steps, and keep training.grad_clip at 1"
            )
            yield from self._once("gradients_blow_up", step, message)

    def observe_metrics(self, step: int, loss: float | None) -> Iterator[WarningEvent]:
        """What a metric line gives reason to say."""
        first, due = self.first_loss, self.warmup_steps + FLAT_STEPS
        if loss is None or first is None or step < due:
            return
        self.first_loss = None
        if loss > first - FLAT_NATS:
            message = (
                f"the curve is flat: the loss is {loss:.3f} at step {step:,} and was {first:.3f} at step 1. Raise "
                "training.learning_rate (5e-4 is usual), look at what the tokenizer makes of a text, and make sure "
                "that the texts are not random"
            )
            yield from self._once("curve_flat", step, message)

    def _first(self, loss: float, expected: float) -> Iterator[WarningEvent]:
        if abs(loss - expected) <= FIRST_TOLERANCE:
            return
        message = (
            f"the loss of step 1 is {loss:.3f}, and untrained weights with a vocabulary of {self.vocab_size} should "
            f"give {expected:.2f}. Look whether the tokenizer is the one you mean, and at what it makes of a text"
        )
        yield from self._once("first_loss_off", 1, message)

    def _once(self, code: str, step: int, message: str) -> Iterator[WarningEvent]:
        if code not in self._reported:
            self._reported.add(code)
            yield WarningEvent(code=code, message=message, step=step)
