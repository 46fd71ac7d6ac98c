"""The rows of each optimizer step: a pure function of seed and step, so a resume needs no loader state.

A keyed pseudo-random permutation shuffles the rows of an epoch. It is computed on demand: nothing is stored, and every
step costs the same.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from trainyard.worker.data.documents import Integers
from trainyard.worker.splitmix import GAMMA, splitmix64

ROUNDS = 8

MAX_ROWS_COUNTED = 1 << 18
"""Rows whose tokens are counted at once."""

FIRST_STEPS_COUNTED = 64
"""Steps that are counted first. Each further chunk has twice as many."""


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
        return self.rows_of_steps(step, 1)[0]

    def steps_until(self, tokens: int, data_step: int, targets_of: Callable[[Integers], Integers]) -> int:
        """Return how many steps after ``data_step`` are needed to predict at least ``tokens`` tokens.

        ``targets_of(rows)``: the number of predictions of each row. Whole epochs are not counted row by row.
        """
        steps = 0
        if tokens > 0 and (first := data_step % self.steps_per_epoch):
            steps, tokens = self._count(tokens, data_step, self.steps_per_epoch - first, targets_of)
        if tokens > 0:
            per_epoch = sum_of(targets_of, 0, self.rows)
            epochs = (tokens - 1) // per_epoch
            steps += epochs * self.steps_per_epoch
            tokens -= epochs * per_epoch
            steps += self._count(tokens, data_step + steps, self.steps_per_epoch, targets_of)[0]
        return steps

    def _count(
        self, tokens: int, data_step: int, at_most: int, targets_of: Callable[[Integers], Integers]
    ) -> tuple[int, int]:
        """Return the steps after ``data_step`` that predict ``tokens``, at most ``at_most``, and the tokens left."""
        largest = max(1, MAX_ROWS_COUNTED // self.global_batch)
        # Small at first: a mixture of small sources needs a permutation for each of their passes in the chunk.
        done, chunk = 0, min(FIRST_STEPS_COUNTED, largest)
        while tokens > 0 and done < at_most:
            count = min(chunk, at_most - done)
            chunk = min(2 * chunk, largest)
            rows, sizes = self.rows_of_steps(data_step + done + 1, count)
            sums = np.cumsum(targets_of(rows))[np.cumsum(sizes) - 1]
            if sums[-1] >= tokens:
                return done + int(np.searchsorted(sums, tokens)) + 1, 0
            done, tokens = done + count, tokens - int(sums[-1])
        return done, tokens

    def rows_of_steps(self, first_step: int, count: int) -> tuple[Integers, list[int]]:
        """Return the rows of ``count`` steps of one epoch, one step after the other, and how many each step has."""
        ranges = [self._range(step) for step in (first_step, first_step + count - 1)]
        rows = FeistelPermutation(self.rows, self.seed, self.epoch_of(first_step))(
            np.arange(ranges[0][0], ranges[1][1])
        )
        return rows, [self.global_batch] * (count - 1) + [ranges[1][1] - ranges[1][0]]

    def _range(self, step: int) -> tuple[int, int]:
        first = (step - 1) % self.steps_per_epoch * self.global_batch
        return first, min(first + self.global_batch, self.rows)


def sum_of(targets_of: Callable[[Integers], Integers], first: int, last: int) -> int:
    """Return the sum over the rows ``first`` .. ``last`` - 1, a part at a time."""
    parts = (np.arange(at, min(at + MAX_ROWS_COUNTED, last)) for at in range(first, last, MAX_ROWS_COUNTED))
    return sum(int(targets_of(part).sum()) for part in parts)
