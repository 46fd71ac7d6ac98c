"""The order of a weighted mixture: a pure function of the shares, so a resume needs no loader state.

Each position of the sequence of rows belongs to one source. The pattern of sources has a period of ``PERIOD`` positions
and repeats, so any position costs the same.
"""

import hashlib
import heapq
import json
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from trainyard.contract.rundir import write_atomically
from trainyard.worker.data.corpus import Corpus
from trainyard.worker.data.documents import Integers
from trainyard.worker.data.sampler import FeistelPermutation, StepSampler
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

    def rows_of(self, step: int) -> Integers:
        first = (step - 1) * self.global_batch
        sources, ranks = self.pattern.locate(first, first + self.global_batch)
        rows = np.empty(self.global_batch, dtype=np.int64)
        offset = 0
        for source, size in enumerate(self.sizes):
            seed = source_seed(self.seed, source)
            passes = ranks // size
            for number in np.unique(passes[sources == source]).tolist():
                mask = (sources == source) & (passes == number)
                rows[mask] = offset + FeistelPermutation(size, seed, number)(ranks[mask] % size)
            offset += size
        return rows

    def passes(self, steps: int) -> list[float]:
        """Return how many times ``steps`` steps read each source."""
        counts = self.pattern.counts(steps * self.global_batch)
        return [int(count) / size for count, size in zip(counts, self.sizes, strict=True)]


def source_seed(seed: int, source: int) -> int:
    """Return the seed of a source, so that two sources of the same size are permuted differently."""
    return int(splitmix64(np.array([(seed + 1) * int(GAMMA) % 2**64], dtype=np.uint64), source + 1)[0] >> np.uint64(32))
