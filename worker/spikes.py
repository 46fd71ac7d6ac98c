"""Sudden jumps of the loss: found on each rank by what is usual there, told once by rank 0 with the rows it was on."""

import math
import statistics
from collections import deque
from dataclasses import dataclass, field
from typing import Self

from trainyard.contract.events import Warned
from trainyard.worker.distributed import Row

WINDOW, LEAST = 64, 32
SPREADS, SHARE = 10.0, 0.2
QUIET_STEPS = 100
ROWS = 8


@dataclass(frozen=True)
class Spike:
    """A step whose loss is far from what is usual on its rank; ``rows`` are those of its worst micro-batch."""

    step: int
    loss: float
    usual: float
    rows: tuple[int, ...]

    def row(self) -> Row:
        """As numbers of a fixed count, to be gathered."""
        rows = [float(row) for row in self.rows[:ROWS]]
        return [float(self.step), self.loss, self.usual, *rows, *[-1.0] * (ROWS - len(rows))]

    @classmethod
    def of(cls, row: Row) -> Self:
        """The inverse of `row`."""
        return cls(int(row[0]), row[1], row[2], tuple(int(number) for number in row[3:] if number >= 0))


NOTHING = Spike(0, 0.0, 0.0, ())


@dataclass
class Spikes:
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

    def look(self, step: int, loss: float, rows: tuple[int, ...]) -> None:
        """Judge a step; a spike stays ``pending`` until it is told. What is not finite is somebody else's business."""
        if not math.isfinite(loss):
            return
        if len(self._recent) >= LEAST and step >= self._quiet_until:
            usual = statistics.median(self._recent)
            spread = 1.4826 * statistics.median(abs(other - usual) for other in self._recent)
            furthest = max(self._recent) - usual
            if loss - usual > max(SPREADS * spread, SHARE * usual, 2 * furthest):
                self.pending = Spike(step, loss, usual, rows)
                self._quiet_until = step + QUIET_STEPS
        self._recent.append(loss)

    def row(self) -> Row:
        """What this rank has to tell, perhaps nothing; it is told by that."""
        mine, self.pending = self.pending or NOTHING, None
        return mine.row()


def told(rows: list[Row]) -> Warned | None:
    """The warning about all ranks' spikes: the highest one is named. None where nobody had any."""
    spikes = [(spike, rank) for rank, row in enumerate(rows) if (spike := Spike.of(row)).step]
    if not spikes:
        return None
    spike, rank = max(spikes, key=lambda found: found[0].loss - found[0].usual)
    where = f" of rank {rank}" if len(rows) > 1 else ""
    message = (
        f"the loss jumped to {spike.loss:.3f} at step {spike.step:,}, where {spike.usual:.3f} is usual; its worst "
        f"micro-batch{where} has rows {', '.join(map(str, spike.rows))}. One of these now and then does no harm; if "
        "they come often, lower training.learning_rate or training.grad_clip, and look at those rows"
    )
    data = {"loss": spike.loss, "usual": spike.usual, "rows": list(spike.rows), "rank": rank}
    return Warned(code="loss_spike", message=message, step=spike.step, data=data)
