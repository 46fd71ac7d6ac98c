"""The order of a weighted mixture: a pure function of the shares, so a resume needs no loader state.

Each position of the sequence of rows belongs to one source. The pattern of sources has a period of ``PERIOD`` positions
and repeats, so any position costs the same.
"""

import hashlib
import heapq
import itertools
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from trainyard.contract.rundir import write_atomically
from trainyard.worker.data.corpus import Corpus
from trainyard.worker.data.documents import Integers
from trainyard.worker.data.sampler import FeistelPermutation, StepSampler, sum_of
from trainyard.worker.data.shards import memmap_array
from trainyard.worker.splitmix import GAMMA, splitmix64

PERIOD = 1 << 20
"""Shares are rounded to one part in this many rows. The smallest share is one part."""

BLOCK = 1 << 12
"""Positions between two stored counts: the most that `MixturePattern.locate` counts to find a position."""


def row_parts(weights: Sequence[float], tokens_per_row: Sequence[float], period: int = PERIOD) -> list[int]:
    """Return how many of ``period`` rows each source gets, so that ``weights`` are its shares of the tokens.

    The parts add up to ``period``. Each is rounded to one of its two neighbours (largest remainder), but is at least 1.
    """
    rates = [weight / tokens for weight, tokens in zip(weights, tokens_per_row, strict=True)]
    total = sum(rates)
    exact = [rate / total * period for rate in rates]
    parts = [max(1, int(part)) for part in exact]
    by_remainder = sorted(range(len(exact)), key=lambda source: (parts[source] - exact[source], source))
    missing = period - sum(parts)
    if missing < 0:  # the parts that were raised to 1 come out of the largest one
        parts[max(range(len(parts)), key=parts.__getitem__)] += missing
        return parts
    for source in by_remainder[:missing]:
        parts[source] += 1
    return parts


def source_pattern(parts: Sequence[int]) -> npt.NDArray[np.uint8]:
    """Return the source of each position of one period. Any prefix of n rows has n * share rows of each source, +- 1.

    Source: R. Tijdeman, "The chairman assignment problem", Discrete Mathematics 32 (1980). With k sources the
    difference is at most 1 - 1 / (2k - 2). At each position, take the source whose next row is due first, among those
    whose next row is not too early.
    """
    period, width = sum(parts), max(2, 2 * len(parts) - 2)

    def earliest(source: int, taken: int) -> int:
        return -(-(period + width * period * taken) // (width * parts[source]))

    def due(source: int, taken: int) -> int:
        return -(-(width * period * (taken + 1) - period) // (width * parts[source]))

    taken = [0] * len(parts)
    waiting = [(earliest(source, 0), source) for source in range(len(parts))]
    heapq.heapify(waiting)
    ready: list[tuple[int, int]] = []
    pattern = bytearray(period)
    for position in range(period):
        while waiting and waiting[0][0] <= position + 1:
            source = heapq.heappop(waiting)[1]
            heapq.heappush(ready, (due(source, taken[source]), source))
        source = heapq.heappop(ready)[1]
        pattern[position] = source
        taken[source] += 1
        heapq.heappush(waiting, (earliest(source, taken[source]), source))
    return np.frombuffer(pattern, dtype=np.uint8)


def load_pattern(parts: Sequence[int], corpus: Corpus) -> npt.NDArray[np.uint8]:
    """Return `source_pattern`. It takes a second, so it is stored in the directory of ``corpus`` the first time."""
    name = hashlib.sha256(json.dumps(list(parts)).encode()).hexdigest()[:32]
    stored = corpus.directory / f"mixture-{name}.bin"
    if not stored.exists():
        with corpus.lock():
            if not stored.exists():
                write_atomically(stored, source_pattern(parts).tobytes())
    return memmap_array(stored, np.uint8, sum(parts))


class MixturePattern:
    """The repeated `source_pattern` of a mixture. Finds the source of any position in constant time."""

    def __init__(self, pattern: npt.NDArray[np.uint8], sources: int) -> None:
        self.period = len(pattern)
        self._pattern = pattern
        counts = [
            np.bincount(pattern[start : start + BLOCK], minlength=sources) for start in range(0, len(pattern), BLOCK)
        ]
        self._before = np.concatenate((np.zeros((1, sources), np.int64), np.cumsum(counts, axis=0)))

    def locate(self, first: int, last: int) -> tuple[Integers, Integers]:
        """Return (source, number of its rows before it) of each position from ``first`` to ``last - 1``."""
        period = len(self._pattern)
        sources = self._pattern[np.arange(first, last) % period].astype(np.int64)
        rank = np.empty(last - first, dtype=np.int64)
        for source, before in enumerate(self.counts(first)):
            mask = sources == source
            rank[mask] = before + np.arange(int(mask.sum()))
        return sources, rank

    def counts(self, position: int) -> Integers:
        """Return how many rows each source has before ``position``."""
        periods, rest = divmod(position, len(self._pattern))
        block = rest // BLOCK
        rest_counts = np.bincount(self._pattern[block * BLOCK : rest], minlength=self._before.shape[1])
        counts: Integers = periods * self._before[-1] + self._before[block] + rest_counts
        return counts


@dataclass(frozen=True)
class MixtureSampler(StepSampler):
    """Selects the rows of each optimizer step of a weighted mixture. Every step has ``global_batch`` rows.

    ``sizes``: the rows of each source; rows are numbered one source after the other. A source that is used up starts
    its next pass in a new permutation. One epoch is as many rows as all sources have together.
    """

    sizes: tuple[int, ...]
    pattern: MixturePattern

    def epochs_done(self, step: int) -> float:
        return max(0, step) * self.global_batch / self.rows

    def steps_until(self, tokens: int, data_step: int, targets_of: Callable[[Integers], Integers]) -> int:
        per_pass = [sum_of(targets_of, first, last) for first, last in pairwise(self._bounds())]
        shares = self.pattern.counts(self.pattern.period) / self.pattern.period
        mean = self.global_batch * sum(
            share * n / size for share, n, size in zip(shares, per_pass, self.sizes, strict=True)
        )
        # A step's distance from the mean never adds up to more than one pass over each source. So jump to where at most
        # this much is missing, and count the rest.
        jump = max(0, int((tokens - 2 * sum(per_pass)) / mean))
        if jump > 0:
            before, after = (self._tokens_before(step, per_pass, targets_of) for step in (data_step, data_step + jump))
            tokens -= after - before
        return jump + self._count(tokens, data_step + jump, 2**53, targets_of)[0]

    def _tokens_before(self, data_step: int, per_pass: list[int], targets_of: Callable[[Integers], Integers]) -> int:
        """Return the predictions of the first ``data_step`` steps. ``per_pass``: those of each source."""
        total = 0
        counts = self.pattern.counts(data_step * self.global_batch).tolist()
        for source, (count, first) in enumerate(zip(counts, self._bounds(), strict=False)):
            size = self.sizes[source]
            passes, rest = divmod(count, size)
            permutation = FeistelPermutation(size, source_seed(self.seed, source), passes)

            def targets_at(
                positions: Integers, first: int = first, order: FeistelPermutation = permutation
            ) -> Integers:
                return targets_of(first + order(positions))

            total += passes * per_pass[source] + sum_of(targets_at, 0, rest)
        return total

    def _bounds(self) -> list[int]:
        return [0, *itertools.accumulate(self.sizes)]

    def rows_of_steps(self, first_step: int, count: int) -> tuple[Integers, list[int]]:
        first, length = (first_step - 1) * self.global_batch, count * self.global_batch
        sources, ranks = self.pattern.locate(first, first + length)
        rows = np.empty(length, dtype=np.int64)
        offset = 0
        for source, size in enumerate(self.sizes):
            seed = source_seed(self.seed, source)
            passes = ranks // size
            for number in np.unique(passes[sources == source]).tolist():
                mask = (sources == source) & (passes == number)
                rows[mask] = offset + FeistelPermutation(size, seed, number)(ranks[mask] % size)
            offset += size
        return rows, [self.global_batch] * count

    def passes(self, steps: int) -> list[float]:
        """Return how many times ``steps`` steps read each source."""
        counts = self.pattern.counts(steps * self.global_batch)
        return [int(count) / size for count, size in zip(counts, self.sizes, strict=True)]


def source_seed(seed: int, source: int) -> int:
    """Return the seed of a source, so that two sources of the same size are permuted differently."""
    return int(splitmix64(np.array([(seed + 1) * int(GAMMA) % 2**64], dtype=np.uint64), source + 1)[0] >> np.uint64(32))
