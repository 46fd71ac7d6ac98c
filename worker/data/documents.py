"""Tokenized documents in constant memory: blocks of them, hashes of their texts, and the number of duplicates."""

from collections.abc import Iterator
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from trainyard.worker.data.shards import ArrayFiles, memmap_array
from trainyard.worker.splitmix import splitmix64

Integers = npt.NDArray[np.int64]
Hashes = npt.NDArray[np.uint64]

BLOCK_TOKENS = 1 << 22
"""Documents are processed in blocks of about this size: small enough for memory, large enough to be fast."""

TEXT_KEY = 0x5EED_0E7A1
CHUNK = 1 << 20
"""Hashes that are in memory at once, or a small multiple of it."""


def blocks(offsets: Integers, tokens: int | None = None) -> Iterator[tuple[int, int]]:
    """Yield (first, last) ranges of documents of about ``tokens`` tokens, by default BLOCK_TOKENS."""
    tokens = tokens or BLOCK_TOKENS
    edges = np.searchsorted(offsets, np.arange(0, int(offsets[-1]) + tokens, tokens))
    edges = np.unique(np.minimum(edges, len(offsets) - 1))
    yield from zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True)


def positions(counts: Integers) -> Integers:
    """Count from 0 in each group: [2, 3] -> [0, 1, 0, 1, 2]."""
    total = int(counts.sum())
    return np.arange(total) - np.repeat(np.cumsum(counts) - counts, counts)


def text_hashes(tokens: npt.NDArray[Any], offsets: Integers) -> Hashes:
    """Return a hash of the tokens of each document: the sum of hashes of (position, token)."""
    first, last = int(offsets[0]), int(offsets[-1])
    position = positions(np.diff(offsets)).astype(np.uint64)
    mixed = splitmix64((position << np.uint64(32)) | tokens[first:last].astype(np.uint64), TEXT_KEY)
    return splitmix64(np.add.reduceat(mixed, offsets[:-1] - first), TEXT_KEY)


class HashFile:
    """The text hashes of all documents, in a file and not in memory: a corpus may have a billion documents.

    The file is deleted at the end of the block.
    """

    def __init__(self, directory: Path) -> None:
        self._path = directory / "hashes.bin"
        self._file = ArrayFiles(directory, (self._path.name,))

    def append(self, hashes: Hashes) -> None:
        self._file.append(hashes)

    def read(self, documents: int) -> Hashes:
        """Return all hashes, memory-mapped: valid also after the file is deleted."""
        self._file.flush(durable=False)
        hashes: Hashes = memmap_array(self._path, np.uint64, documents)
        return hashes

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(OSError):
            self._file.close(durable=False)
        self._path.unlink(missing_ok=True)


def count_distinct(hashes: Hashes) -> int:
    """Count different hashes, in ranges of hashes that fit into memory."""
    ranges = -(-len(hashes) // (16 * CHUNK))
    edges = [number * 2**64 // ranges for number in range(ranges)]
    count = 0
    for low, high in pairwise([*edges, 2**64]):
        chunks = (hashes[start : start + CHUNK] for start in range(0, len(hashes), CHUNK))
        selected = [chunk[(chunk >= np.uint64(low)) & (chunk <= np.uint64(high - 1))] for chunk in chunks]
        count += len(np.unique(np.concatenate(selected)))
    return count
