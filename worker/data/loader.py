"""The micro-batches of one rank for each step, and the factor of each in the step's loss."""

import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

import torch

from trainyard.worker.data.documents import Integers
from trainyard.worker.data.microbatch import MicroBatch
from trainyard.worker.data.packing import Batch, PackedDataset
from trainyard.worker.data.sampler import StepSampler
from trainyard.worker.distributed import DistributedContext

Normalization = Literal["global_tokens", "micro_batch_mean"]


@dataclass
class MicroBatchLoader:
    """Makes the micro-batches of one rank.

    ``min_rows``: shorter micro-batches are padded to this many rows. A compiled model needs this: it is compiled for
    each shape, and ``fixed_shape`` makes the number of segments no part of it. ``prefetches``: a thread makes the next
    micro-batch in pinned memory, also that of the next step, while the device works. ``equal_counts``: every rank gets
    as many micro-batches as the one with the most, the last ones without rows if need be. FSDP needs this: all ranks
    run each layer together. ``data_seconds``: time that the current step has waited for data.
    """

    dataset: PackedDataset
    sampler: StepSampler
    ranks: DistributedContext
    batch_size: int
    normalization: Normalization
    min_rows: int = 1
    fixed_shape: bool = False
    prefetches: bool = False
    equal_counts: bool = False
    data_seconds: float = 0.0
    _rows_by_step: dict[int, Integers] = field(default_factory=dict)
    _thread: ThreadPoolExecutor | None = None
    _prefetched: tuple[tuple[int, int], Future[Batch]] | None = None

    def microbatches(self, step: int) -> Iterator[MicroBatch]:
        """Yield this rank's micro-batches of data step ``step``: at least one, which may predict nothing."""
        self.data_seconds, began = 0.0, time.perf_counter()
        rows = self.rows_of(step)
        loss_scale = self._loss_scale(rows)
        parts = self._parts(rows)
        for index, part in enumerate(parts):
            tokens = int(self.dataset.targets_of(part).sum())
            host_batch = self._take(step, index, part)
            if self.prefetches:
                self._prefetch(step, index + 1, parts)
            batch = to_device(host_batch, self.ranks.device)
            micro_batch = MicroBatch(batch, loss_scale.factor(tokens), tuple(part.tolist()), tokens)
            self.data_seconds += time.perf_counter() - began
            yield micro_batch
            began = time.perf_counter()
        # The caller reads one micro-batch ahead, so the GPU is still busy with the second to last one here.
        self.rows_of(step + 1)
        self.data_seconds += time.perf_counter() - began

    def _take(self, step: int, index: int, part: Integers) -> Batch:
        prefetched, self._prefetched = self._prefetched, None
        # After a rollback, another step is next than the one that was prefetched.
        if prefetched is not None and prefetched[0] == (step, index):
            return prefetched[1].result()
        return self._make(part)

    def _prefetch(self, step: int, index: int, parts: list[Integers]) -> None:
        if index == len(parts):
            step, index, parts = step + 1, 0, self._parts(self.rows_of(step + 1))
        if self._thread is None:
            # The thread's own current device: without it, it would use the first one, which another rank has.
            start = partial(torch.cuda.set_device, self.ranks.device) if self.ranks.device.type == "cuda" else None
            self._thread = ThreadPoolExecutor(1, "batches", initializer=start)
        self._prefetched = ((step, index), self._thread.submit(self._make, parts[index]))

    def _make(self, part: Integers) -> Batch:
        batch = self.dataset.batch(part, self.min_rows, fixed_offsets=self.fixed_shape)
        return batch.pin_memory() if self.ranks.device.type == "cuda" else batch

    def _parts(self, rows: Integers) -> list[Integers]:
        parts = list(split_microbatches(rank_slice(rows, self.ranks.rank, self.ranks.world), self.batch_size))
        largest_share = -(-len(rows) // self.ranks.world)
        count = -(-largest_share // self.batch_size) if self.equal_counts else 0
        return parts + [rows[:0]] * (count - len(parts))

    def rows_of(self, step: int) -> Integers:
        """Return the rows of a data step, over all ranks. The rows of the last two steps are cached."""
        if step not in self._rows_by_step:
            self._rows_by_step = {known: rows for known, rows in self._rows_by_step.items() if known == step - 1}
            self._rows_by_step[step] = self.sampler.rows_of(step)
        return self._rows_by_step[step]

    def tokens(self, step: int) -> int:
        """Return how many tokens the whole step predicts, over all ranks."""
        return int(self.dataset.targets_of(self.rows_of(step)).sum())

    def dummy(self) -> MicroBatch:
        """Return a micro-batch of ``min_rows`` rows that predicts nothing, for the warm-up."""
        rows = self.sampler.rows_of(1)[:1].repeat(self.min_rows)
        batch = self.dataset.batch(rows, fixed_offsets=self.fixed_shape)
        return MicroBatch(to_device(batch._replace(labels=torch.full_like(batch.labels, -100)), self.ranks.device), 1.0)

    def _loss_scale(self, rows: Integers) -> "LossScale":
        world = self.ranks.world
        if self.normalization == "global_tokens":
            return LossScale(world, tokens=int(self.dataset.targets_of(rows).sum()), micro_batches=None)
        counts = [len(rank_slice(rows, rank, world)) for rank in range(world)]
        return LossScale(world, tokens=None, micro_batches=sum(-(-count // self.batch_size) for count in counts))


@dataclass(frozen=True)
class LossScale:
    """The factor of a micro-batch's summed loss. It includes ``world``, because DDP averages gradients over the ranks.

    With ``tokens`` the step's loss is the mean over all its tokens. With ``micro_batches`` it is MiniMind's: the mean
    over the step's micro-batches, of all ranks, of their means.
    """

    world: int
    tokens: int | None
    micro_batches: int | None

    def factor(self, micro_batch_tokens: int) -> float:
        """Return the factor of a micro-batch that predicts this many tokens."""
        if self.micro_batches is None:
            return self.world / max(1, self.tokens or 1)
        return self.world / (self.micro_batches * max(1, micro_batch_tokens))


def rank_slice(rows: Integers, rank: int, world: int) -> Integers:
    """Return a rank's rows of a step: contiguous, evenly split, possibly none."""
    return rows[rank * len(rows) // world : (rank + 1) * len(rows) // world]


def split_microbatches(rows: Integers, size: int) -> Iterator[Integers]:
    """Yield parts of at most ``size`` rows; one empty part if there are none: the rank must join the collectives."""
    for start in range(0, max(1, len(rows)), size):
        yield rows[start : start + size]


def to_device(batch: Batch, device: torch.device) -> Batch:
    """Move the batch to ``device``; to a GPU from pinned memory, so that the copy overlaps the computation."""
    return batch.pin_memory().to(device) if device.type == "cuda" else batch
