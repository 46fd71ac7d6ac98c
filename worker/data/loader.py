"""The micro-batches of one rank, step by step, and how much each counts in the step's loss."""

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

import torch

from trainyard.worker.data.packing import Batch, Integers, RowTable
from trainyard.worker.data.sampler import Order
from trainyard.worker.distributed import Ranks
from trainyard.worker.training.step import Micro

Normalization = Literal["global_tokens", "micro_batch_mean"]


@dataclass
class Feed:
    """Feeds one rank. ``waited`` is the time the current step has spent here, in seconds."""

    table: RowTable
    order: Order
    ranks: Ranks
    batch_size: int
    normalization: Normalization
    waited: float = 0.0
    _known: dict[int, Integers] = field(default_factory=dict)

    def micros(self, step: int) -> Iterator[Micro]:
        """The micro-batches of this rank in data step ``step``: at least one, which may predict nothing."""
        self.waited, began = 0.0, time.perf_counter()
        rows = self.rows_of(step)
        factors = self._factors(rows)
        for part in cut(own_share(rows, self.ranks.rank, self.ranks.world), self.batch_size):
            tokens = int(self.table.targets[part].sum())
            batch = on_device(self.table.batch(part), self.ranks.device)
            micro = Micro(batch, factors.of(tokens), tuple(part.tolist()), tokens)
            self.waited += time.perf_counter() - began
            yield micro
            began = time.perf_counter()
        # Whoever takes these looks one ahead, so a GPU is still busy with the micro-batch before the last one.
        self.rows_of(step + 1)
        self.waited += time.perf_counter() - began

    def rows_of(self, step: int) -> Integers:
        """The rows of a data step, of all ranks together. The last few are remembered: they are asked for again."""
        if step not in self._known:
            self._known = {known: rows for known, rows in self._known.items() if known == step - 1}
            self._known[step] = self.order.rows_of(step)
        return self._known[step]

    def tokens(self, step: int) -> int:
        """Predictions of the whole step, over all ranks."""
        return int(self.table.targets[self.rows_of(step)].sum())

    def dummy(self, count: int = 1) -> Micro:
        """A batch of ``count`` rows that predicts nothing: what every rank warms up on."""
        batch = self.table.batch(self.order.rows_of(1)[:1].repeat(count))
        return Micro(on_device(batch._replace(labels=torch.full_like(batch.labels, -100)), self.ranks.device), 1.0)

    def _factors(self, rows: Integers) -> "Factors":
        world = self.ranks.world
        if self.normalization == "global_tokens":
            return Factors(world, tokens=int(self.table.targets[rows].sum()), micros=None)
        shares = [len(own_share(rows, rank, world)) for rank in range(world)]
        return Factors(world, tokens=None, micros=sum(-(-share // self.batch_size) for share in shares))


@dataclass(frozen=True)
class Factors:
    """What a micro-batch's summed loss is multiplied with. DDP takes the mean over ``world`` ranks, so that is undone.

    ``tokens`` given: the step's loss is the mean over all its tokens. ``micros`` given: MiniMind's, the mean over all
    the step's micro-batches of their means, whichever ranks have them.
    """

    world: int
    tokens: int | None
    micros: int | None

    def of(self, micro_tokens: int) -> float:
        """The factor of a micro-batch that predicts so many tokens."""
        if self.micros is None:
            return self.world / max(1, self.tokens or 1)
        return self.world / (self.micros * max(1, micro_tokens))


def own_share(rows: Integers, rank: int, world: int) -> Integers:
    """A rank's rows of a step: contiguous, as even as can be, perhaps none."""
    return rows[rank * len(rows) // world : (rank + 1) * len(rows) // world]


def cut(share: Integers, size: int) -> Iterator[Integers]:
    """Parts of at most ``size`` rows; one empty part where there is nothing, so that a rank takes part in any case."""
    for start in range(0, max(1, len(share)), size):
        yield share[start : start + size]


def on_device(batch: Batch, device: torch.device) -> Batch:
    """The batch where it is computed; to a GPU it is copied while the GPU still works on the one before."""
    return batch.pinned().to(device) if device.type == "cuda" else batch
