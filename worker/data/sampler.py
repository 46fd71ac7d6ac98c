"""The rows of each optimizer step: a pure function of seed and step, so a resume needs no loader state.

A keyed pseudo-random permutation shuffles the rows of an epoch. It is computed on demand: nothing is stored, and every
step costs the same.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from trainyard.worker.data.documents import Integers
from trainyard.worker.splitmix import GAMMA, splitmix64

ROUNDS = 8


@dataclass(frozen=True)
class FeistelPermutation:
    """A pseudo-random permutation of 0 .. ``size`` - 1, one for each ``seed`` and ``epoch``.

    A Feistel network permutes the smallest power of two that holds ``size``. A value outside ``size`` is permuted again
    until it is inside, which keeps it a permutation (cycle walking: Black and Rogaway, 2002).
    """

    size: int
    seed: int
    epoch: int

    def __call__(self, positions: npt.ArrayLike) -> Integers:
        bits = max(2, (self.size - 1).bit_length())
        keys = self._round_keys()
        values = _feistel(np.asarray(positions, dtype=np.uint64), bits, keys)
        while (outside := values >= self.size).any():
            values[outside] = _feistel(values[outside], bits, keys)
        return values.astype(np.int64)

    def _round_keys(self) -> list[int]:
        base = splitmix64(splitmix64(np.array([self.seed], dtype=np.uint64), 0), self.epoch)
        keys: list[int] = splitmix64(np.arange(1, ROUNDS + 1, dtype=np.uint64) * GAMMA, int(base[0])).tolist()
        return keys


def _feistel(values: npt.NDArray[np.uint64], bits: int, keys: list[int]) -> npt.NDArray[np.uint64]:
    """Permute the integers of ``bits`` bits. If ``bits`` is odd, the left half has one bit more."""
    low, high = bits // 2, bits - bits // 2
    shift, masks = np.uint64(low), (np.uint64((1 << high) - 1), np.uint64((1 << low) - 1))
    left, right = values >> shift, values & masks[1]
    for number, key in enumerate(keys):
        # Each round swaps the halves and their widths. ROUNDS is even, so in the end the left half is the wide one.
        left, right = right, left ^ (splitmix64(right, key) & masks[number % 2])
    return (left << shift) | right


@dataclass(frozen=True)
class StepSampler:
    """Selects the rows of each optimizer step. Steps count from 1 over the whole job.

    ``rows``: those of the corpus. ``global_batch``: rows of a step over all ranks; the last step of an epoch may have
    fewer.
    """

    rows: int
    global_batch: int
    seed: int

    @property
    def steps_per_epoch(self) -> int:
        return -(-self.rows // self.global_batch)

    def epoch_of(self, step: int) -> int:
        """Return the epoch of ``step``, from 0."""
        return (step - 1) // self.steps_per_epoch

    def epochs_done(self, step: int) -> float:
        """Return the number of epochs after ``step``, with the fraction of the current one."""
        if step < 1:
            return 0.0
        return self.epoch_of(step) + self._range(step)[1] / self.rows

    def rows_of(self, step: int) -> Integers:
        """Return the rows of ``step``, over all ranks."""
        first, last = self._range(step)
        return FeistelPermutation(self.rows, self.seed, self.epoch_of(step))(np.arange(first, last))

    def _range(self, step: int) -> tuple[int, int]:
        first = (step - 1) % self.steps_per_epoch * self.global_batch
        return first, min(first + self.global_batch, self.rows)
