"""The micro-batches of one rank, step by step, and how much each counts in the step's loss."""

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

import torch

from trainyard.worker.data.microbatch import MicroBatch
from trainyard.worker.data.packing import Batch, Integers, PackedDataset
from trainyard.worker.data.sampler import StepSampler
from trainyard.worker.distributed import DistributedContext

Normalization = Literal["global_tokens", "micro_batch_mean"]


@dataclass
class MicroBatchLoader:
    """Feeds one rank. ``waited`` is the time the current step has spent here, in seconds."""

    dataset: PackedDataset
    sampler: StepSampler
    ranks: DistributedContext
    batch_size: int
    normalization: Normalization
    data_seconds: float = 0.0
    _known: dict[int, Integers] = field(default_factory=dict)

    def microbatches(self, step: int) -> Iterator[MicroBatch]:
        """The micro-batches of this rank in data step ``step``: at least one, which may predict nothing."""
        self.data_seconds, began = 0.0, time.perf_counter()
        rows = self.rows_of(step)
        factors = self._factors(rows)
        for part in split_microbatches(rank_slice(rows, self.ranks.rank, self.ranks.world), self.batch_size):
            tokens = int(self.dataset.targets[part].sum())
            batch = to_device(self.dataset.batch(part), self.ranks.device)
            micro = MicroBatch(batch, factors.of(tokens), tuple(part.tolist()), tokens)
            self.data_seconds += time.perf_counter() - began
            yield micro
            began = time.perf_counter()
        # Whoever takes these looks one ahead, so a GPU is still busy with the micro-batch before the last one.
        self.rows_of(step + 1)
        self.data_seconds += time.perf_counter() - began

    def rows_of(self, step: int) -> Integers:
        """The rows of a data step, of all ranks together. The last few are remembered: they are asked for again."""
        if step not in self._known:
            self._known = {known: rows for known, rows in self._known.items() if known == step - 1}
            self._known[step] = self.sampler.rows_of(step)
        return self._known[step]

    def tokens(self, step: int) -> int:
        """Predictions of the whole step, over all ranks."""
        return int(self.dataset.targets[self.rows_of(step)].sum())

    def dummy(self, count: int = 1) -> MicroBatch:
        """A batch of ``count`` rows that predicts nothing: what every rank warms up on."""
        batch = self.dataset.batch(self.sampler.rows_of(1)[:1].repeat(count))
        return MicroBatch(to_device(batch._replace(labels=torch.full_like(batch.labels, -100)), self.ranks.device), 1.0)

    def _factors(self, rows: Integers) -> "LossScale":
        world = self.ranks.world
        if self.normalization == "global_tokens":
            return LossScale(world, tokens=int(self.dataset.targets[rows].sum()), micros=None)
        shares = [len(rank_slice(rows, rank, world)) for rank in range(world)]
        return LossScale(world, tokens=None, micros=sum(-(-share // self.batch_size) for share in shares))


@dataclass(frozen=True)
class LossScale:
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


def rank_slice(rows: Integers, rank: int, world: int) -> Integers:
    """A rank's rows of a step: contiguous, as even as can be, perhaps none."""
    return rows[rank * len(rows) // world : (rank + 1) * len(rows) // world]


def split_microbatches(share: Integers, size: int) -> Iterator[Integers]:
    """Parts of at most ``size`` rows; one empty part where there is nothing, so that a rank takes part in any case."""
    for start in range(0, max(1, len(share)), size):
        yield share[start : start + size]


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The batch where it is computed; to a GPU it is copied while the GPU still works on the one before."""
    return batch.pin_memory().to(device) if device.type == "cuda" else batch
