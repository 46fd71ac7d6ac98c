"""The loss and the bits per byte of each held-out set, computed by all ranks together."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from trainyard.contract.events import HeldOutResult
from trainyard.contract.failpoints import hit
from trainyard.worker.data.documents import Integers
from trainyard.worker.data.loader import split_microbatches, to_device
from trainyard.worker.data.prepare import HeldOutSet
from trainyard.worker.distributed import DistributedContext
from trainyard.worker.errors import StopRequested
from trainyard.worker.training.bits_per_byte import ByteCounter, bits_per_byte
from trainyard.worker.training.state import TrainState

SetRows = tuple[int, Integers]
"""The index of a held-out set, and some of its rows."""


@dataclass(frozen=True)
class HeldOutResults:
    """The results over the tokens of all sets together, and those of each set by name."""

    loss: float | None
    bpb: float | None
    sets: dict[str, HeldOutResult]


@dataclass(frozen=True)
class HeldOutEvaluator:
    """Evaluates ``sets`` in batches of ``batch_size`` rows. All ranks call it together.

    ``counter``: None if the bytes of the tokens are unknown. ``stop_requested``: whether this rank has seen a request.
    """

    sets: Sequence[HeldOutSet]
    ranks: DistributedContext
    batch_size: int
    counter: ByteCounter | None
    stop_requested: Callable[[], bool] = lambda: False

    def evaluate(self, state: TrainState) -> HeldOutResults:
        """Return the mean cross-entropies, without dropout, and the bits per byte: the same on all ranks.

        A stop request that any rank sees before a batch raises StopRequested on all of them.
        """
        # In float64: the sum over a whole set would lose digits in float32. All sums stay on the device until the end.
        device = self.ranks.device
        losses = torch.zeros(len(self.sets), dtype=torch.float64, device=device)
        text_bytes = torch.zeros(len(self.sets), dtype=torch.int64, device=device)
        with state.scoring() as loss_sum:
            for number, rows in self._batches():
                batch = to_device(self.sets[number].rows.batch(rows), device)
                losses[number] += loss_sum(batch)
                if self.counter is not None:
                    text_bytes[number] += self.counter.count(batch)
        gathered = self.ranks.gather([*losses.tolist(), *map(float, text_bytes.tolist())])
        sums = [sum(column) for column in zip(*gathered, strict=True)]
        return self._results(sums[: len(self.sets)], sums[len(self.sets) :])

    def _results(self, losses: list[float], text_bytes: list[float]) -> HeldOutResults:
        tokens = [held_out.rows.tokens for held_out in self.sets]
        found = map(_result, losses, tokens, text_bytes)
        whole = _result(sum(losses), sum(tokens), sum(text_bytes))
        names = (held_out.name for held_out in self.sets)
        return HeldOutResults(whole.loss, whole.bpb, dict(zip(names, found, strict=True)))

    def _batches(self) -> Iterator[SetRows]:
        own = share_of_rank([len(each.rows) for each in self.sets], self.ranks.rank, self.ranks.world, self.batch_size)
        for index, batch in enumerate(own):
            hit("evaluation.batch", index)
            if any(requested for (requested,) in self.ranks.gather([float(self.stop_requested())])):
                raise StopRequested
            yield batch


def _result(loss_sum: float, tokens: int, text_bytes: float) -> HeldOutResult:
    loss = loss_sum / max(1, tokens)
    return HeldOutResult(loss=loss if math.isfinite(loss) else None, bpb=bits_per_byte(loss_sum, text_bytes))


def share_of_rank(sizes: Sequence[int], rank: int, world: int, batch_size: int) -> list[SetRows]:
    """Return the batches of a rank, each of one set; ``sizes`` are the rows of the sets.

    The rows of all sets together are split evenly over the ranks: with a few rows in each of many sets, a split of each
    set would leave most ranks without work most of the time. All ranks get the same number of batches, so that they
    take part in the same number of collectives; the last ones may be empty.
    """
    own = [
        (number, rows)
        for number, first, last in _overlaps(sizes, rank, world)
        for rows in split_microbatches(np.arange(first, last), batch_size)
    ]
    most = max(
        sum(-(-(last - first) // batch_size) for _, first, last in _overlaps(sizes, each, world))
        for each in range(world)
    )
    return own + [(0, np.zeros(0, dtype=np.int64))] * (max(1, most) - len(own))


def _overlaps(sizes: Sequence[int], rank: int, world: int) -> Iterator[tuple[int, int, int]]:
    """Yield (number of a set, first row, last row + 1) of the sets that a rank has rows of."""
    begin, end = (share * sum(sizes) // world for share in (rank, rank + 1))
    start = 0
    for number, size in enumerate(sizes):
        first, last = max(begin, start) - start, min(end, start + size) - start
        if first < last:
            yield number, first, last
        start += size
