"""Monitors of a run: warnings about loss spikes, about a run that does not learn, and about a slow rank."""

import math
import statistics
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

from trainyard.contract.events import MetricEvent, RankInfo, WarningEvent
from trainyard.worker.distributed import FloatRow

WINDOW, MIN_STEPS = 64, 32
MIN_DEVIATIONS, MIN_RELATIVE_RISE = 10.0, 0.2
QUIET_STEPS = 100
MAX_SPIKE_ROWS = 8


@dataclass(frozen=True)
class Spike:
    """A step whose loss is far above the usual on its rank. ``rows``: of its micro-batch with the highest loss."""

    step: int
    loss: float
    typical: float
    rows: tuple[int, ...]

    def to_row(self) -> FloatRow:
        """Return the spike as a fixed count of numbers, to be gathered."""
        rows = [float(row) for row in self.rows[:MAX_SPIKE_ROWS]]
        return [float(self.step), self.loss, self.typical, *rows, *[-1.0] * (MAX_SPIKE_ROWS - len(rows))]

    @classmethod
    def from_row(cls, row: FloatRow) -> Self:
        """Return the spike that `to_row` gave, at most 8 of its rows."""
        return cls(int(row[0]), row[1], row[2], tuple(int(number) for number in row[3:] if number >= 0))


NO_SPIKE = Spike(0, 0.0, 0.0, ())


@dataclass
class LossSpikeDetector:
    """Finds loss spikes among the steps of one rank.

    A loss is a spike if it is above the median of the last 64 by more than 10 spreads, by more than a fifth of that
    median, and more than twice as far as any of the 64 was. The spread is 1.4826 times the median absolute deviation,
    which is the standard deviation for normally distributed noise.

    The first 32 steps of an attempt are too few to judge. After a spike the detector is quiet for 100 steps: a loss
    that stays high has become the usual by then.
    """

    pending: Spike | None = None
    _recent: deque[float] = field(default_factory=lambda: deque(maxlen=WINDOW))
    _quiet_until: int = 0

    def observe(self, step: int, loss: float, rows: tuple[int, ...]) -> None:
        """Check a step. A spike stays ``pending`` until `take_row`. `nonfinite` handles non-finite losses."""
        if not math.isfinite(loss):
            return
        if len(self._recent) >= MIN_STEPS and step >= self._quiet_until:
            median = statistics.median(self._recent)
            spread = 1.4826 * statistics.median(abs(other - median) for other in self._recent)
            furthest = max(self._recent) - median
            if loss - median > max(MIN_DEVIATIONS * spread, MIN_RELATIVE_RISE * median, 2 * furthest):
                self.pending = Spike(step, loss, median, rows)
                self._quiet_until = step + QUIET_STEPS
        self._recent.append(loss)

    def take_row(self) -> FloatRow:
        """Return the pending spike as a row for `gather` (zeros if there is none) and clear it."""
        spike, self.pending = self.pending or NO_SPIKE, None
        return spike.to_row()


def spike_warning(rows: list[FloatRow]) -> WarningEvent | None:
    """Return a warning about the highest spike of all ranks, or None if no rank had one."""
    spikes = [(spike, rank) for rank, row in enumerate(rows) if (spike := Spike.from_row(row)).step]
    if not spikes:
        return None
    spike, rank = max(spikes, key=lambda pair: pair[0].loss - pair[0].typical)
    where = f" of rank {rank}" if len(rows) > 1 else ""
    message = (
        f"the loss jumped to {spike.loss:.3f} at step {spike.step:,}, where {spike.typical:.3f} is usual; its worst "
        f"micro-batch{where} has rows {', '.join(map(str, spike.rows))}. One of these now and then does no harm; if "
        "they come often, lower training.learning_rate or training.grad_clip, and look at those rows"
    )
    data = {"loss": spike.loss, "usual": spike.typical, "rows": list(spike.rows), "rank": rank}
    return WarningEvent(code="loss_spike", message=message, step=spike.step, data=data)


UNTRAINED_EXCESS = 0.05
"""Nats by which untrained weights are worse than a uniform guess, see `Decoder.initialise`."""

FIRST_LOSS_TOLERANCE = 0.5
FLAT_STEPS, FLAT_NATS = 300, 0.2
VANISHING_NORM, EXPLODING_NORM, CONSECUTIVE_STEPS = 1e-6, 1e3, 20
STARVING_STEPS, STARVING_SHARE = 50, 0.1


@dataclass
class LearningMonitor:
    """Warns, each code once in an attempt, if a run does not learn. Only the events of rank 0 count.

    Rules: the loss of step 1 is within 0.5 of ln V + 0.05; 300 steps after the warm-up it is at least 0.2 below that of
    step 1; no 20 steps in a row have a gradient norm below 1e-6 or above 1000; each expert gets a tenth of an even
    share in some metric line of any 50 steps after the warm-up. ``vocab_size``: None if the weights were trained
    before; then any first loss is valid.
    """

    vocab_size: int | None
    warmup_steps: int = 0
    first_loss: float | None = None
    _small: int = 0
    _large: int = 0
    _last_line: int | None = None
    _starving_since: dict[int, int] = field(default_factory=dict)
    _reported: set[str] = field(default_factory=set)

    def observe(self, step: int, loss: float, grad_norm: float) -> Iterator[WarningEvent]:
        """Yield the warnings that a step gives reason for. ``loss``: this rank's mean."""
        self._last_line = step - 1 if self._last_line is None else self._last_line
        if step == 1 and self.vocab_size is not None and math.isfinite(loss):
            self.first_loss = loss
            expected = math.log(self.vocab_size) + UNTRAINED_EXCESS
            if abs(loss - expected) > FIRST_LOSS_TOLERANCE:
                message = (
                    f"the loss of step 1 is {loss:.3f}, and untrained weights with a vocabulary of {self.vocab_size} "
                    f"should give {expected:.2f}. Check that the tokenizer is the one you mean, and what it makes of "
                    "a text"
                )
                yield from self._once("first_loss_off", 1, message)
        if not math.isfinite(grad_norm):
            return
        self._small = self._small + 1 if grad_norm < VANISHING_NORM else 0
        self._large = self._large + 1 if grad_norm > EXPLODING_NORM else 0
        if self._small == CONSECUTIVE_STEPS:
            message = (
                f"the gradient has almost vanished: its norm is {grad_norm:.1e}, and was below {VANISHING_NORM:g} for "
                f"{CONSECUTIVE_STEPS} steps. Check whether the texts are all the same or empty, and raise "
                "training.learning_rate"
            )
            yield from self._once("gradients_vanish", step, message)
        if self._large == CONSECUTIVE_STEPS:
            message = (
                f"the gradient blows up: its norm is {grad_norm:.3g}, and was above {EXPLODING_NORM:g} for "
                f"{CONSECUTIVE_STEPS} steps. Lower training.learning_rate, set training.warmup_steps, and keep "
                "training.grad_clip at 1"
            )
            yield from self._once("gradients_blow_up", step, message)

    def observe_metrics(self, metric: MetricEvent) -> Iterator[WarningEvent]:
        """Yield the warnings that a metric line gives reason for."""
        yield from self._observe_experts(metric.step, metric.expert_load or [])
        yield from self._observe_curve(metric.step, metric.loss)

    def _observe_experts(self, step: int, load: list[float]) -> Iterator[WarningEvent]:
        began, self._last_line = self._last_line, step
        if began is None or began < self.warmup_steps or step <= began:  # after a rollback, count again
            self._starving_since = {}
            return
        starving = [expert for expert, share in enumerate(load) if share < STARVING_SHARE / len(load)]
        self._starving_since = {expert: self._starving_since.get(expert, began) for expert in starving}
        long = [expert for expert, since in self._starving_since.items() if step - since >= STARVING_STEPS]
        if long:
            since = max(self._starving_since[expert] for expert in long)
            shares = ", ".join(f"{expert} ({load[expert]:.1%})" for expert in long)
            message = (
                f"some of the {len(load)} experts get almost no tokens since step {since:,}: {shares}; an even share "
                f"is {1 / len(load):.0%}. They learn nothing: raise model.router_aux_loss_coef, or use fewer experts"
            )
            yield from self._once("experts_starve", step, message, {"experts": long, "expert_load": load})

    def _observe_curve(self, step: int, loss: float | None) -> Iterator[WarningEvent]:
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

    def _once(self, code: str, step: int, message: str, data: dict[str, Any] | None = None) -> Iterator[WarningEvent]:
        if code not in self._reported:
            self._reported.add(code)
            yield WarningEvent(code=code, message=message, step=step, data=data or {})


STRAGGLER_SPREAD, STRAGGLER_LINES = 1.2, 5


@dataclass
class StragglerMonitor:
    """Warns, once for each rank, if one computes longer than the others: by a fifth, in five metric lines in a row.

    ``places``: host and device of each rank.
    """

    places: Sequence[RankInfo]
    _rank: int | None = None
    _lines: int = 0
    _reported: set[int] = field(default_factory=set)

    def observe(self, metric: MetricEvent) -> Iterator[WarningEvent]:
        rank, spread = metric.step_seconds_max_rank, metric.step_seconds_spread
        if rank is None or spread is None or spread < STRAGGLER_SPREAD:
            rank = None
        self._lines = self._lines + 1 if rank == self._rank else 1
        self._rank = rank
        if rank is None or spread is None or self._lines < STRAGGLER_LINES or rank in self._reported:
            return
        self._reported.add(rank)
        message = (
            f"{self.places[rank]} computes {spread:.2f} times as long as the median rank, since {self._lines} points "
            "of the curve, and all others wait for it. Look for another program on its device or its cores, or for a "
            "device that is hot and lowers its clock"
        )
        data = {"rank": rank, "spread": spread, **self.places[rank].model_dump(mode="json", exclude={"rank"})}
        yield WarningEvent(code="straggler", message=message, step=metric.step, data=data)
