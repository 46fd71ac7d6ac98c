"""The rows a corpus is trained in: which pieces of which documents stand in each, and batches of them.

A document of more than ``max_seq_len`` tokens is cut into pieces that overlap by one token, so that every next token is
predicted exactly once and none but the last piece ends with the end token. With packing "none" a row is one piece;
with "document" whole pieces are packed into rows, where they do not see each other.

Legend: ``B`` rows of a batch, ``S`` = max_seq_len.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from trainyard.worker.data.corpus import Corpus
from trainyard.worker.data.jsonl import DataInvalid
from trainyard.worker.data.shards import ArrayFiles, build_directory, memmap_array
from trainyard.worker.splitmix import GAMMA, splitmix64

Integers = npt.NDArray[np.int64]
Packing = Literal["document", "none"]

FORMAT = 1
IGNORE_INDEX = -100
BLOCK_TOKENS = 1 << 22
"""Documents are packed in blocks of about so many tokens: memory stays bounded, and rows full."""


@dataclass(frozen=True)
class SplitSpec:
    """Which documents: all, or those that are ("eval") or are not ("train") held out at ``fraction``."""

    part: Literal["all", "train", "eval"] = "all"
    fraction: float = 0.0

    def __str__(self) -> str:
        return self.part if self.part == "all" else f"{self.part}-{self.fraction!r}"


class Batch(NamedTuple):
    """Rows as tensors of int64, [B, S] each.

    ``labels[b, t]`` is the token that follows ``input_ids[b, t]`` in its piece, -100 where there is none.
    ``segment_ids`` is
    0 for padding and counts the pieces of a row from 1; ``position_ids`` begin at 0 in each piece. Both are None
    where every row is one piece: the decoder needs neither there, and is faster without. ``offsets`` [P + 1] int32 says
    where each piece begins among all B * S tokens, padding counted as one more piece of its row, and is filled up with
    B * S to a size that depends on B alone; None with the others.
    """

    input_ids: Tensor
    position_ids: Tensor | None
    segment_ids: Tensor | None
    labels: Tensor
    offsets: Tensor | None = None

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch on ``device``; from pinned memory the copy does not wait."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> "Batch":
        """The same batch in memory that a GPU copies from by itself."""
        return self._each(lambda tensor: tensor.pin_memory())

    def _each(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        return Batch(*(None if tensor is None else change(tensor) for tensor in self))  # type: ignore[arg-type]


class PackedDataset:
    """The rows of a corpus, memory-mapped. ``targets`` [rows]: how many tokens each row predicts."""

    def __init__(self, corpus: Corpus, directory: Path, max_seq_len: int, packing: Packing) -> None:
        self.max_seq_len = max_seq_len
        self.packing = packing
        # Kept whole: while somebody has it, the cache does not let it go.
        self._corpus = corpus
        self._tokens = corpus.tokens
        pieces, rows = (directory / "starts.bin").stat().st_size // 8, (directory / "targets.bin").stat().st_size // 4
        self._starts = memmap_array(directory / "starts.bin", np.int64, pieces)
        self._lengths = memmap_array(directory / "lengths.bin", np.int32, pieces)
        self._firsts = memmap_array(directory / "firsts.bin", np.int64, rows + 1)
        self.targets: npt.NDArray[np.int32] = memmap_array(directory / "targets.bin", np.int32, rows)
        self._most_pieces = int(np.diff(self._firsts).max(initial=0))

    @classmethod
    def open(
        cls, corpus: Corpus, *, max_seq_len: int, packing: Packing, split: SplitSpec | None = None
    ) -> "PackedDataset":
        """The table of ``corpus`` for these settings, built first where it is not beside the shards yet.

        Raises DataInvalid where the split leaves no document.
        """
        split = split or SplitSpec()
        directory = corpus.directory / f"rows-{FORMAT}-{max_seq_len}-{packing}-{split}"
        if not directory.exists():
            with corpus.lock():
                if not directory.exists():
                    with build_directory(directory) as building:
                        _write(corpus, building, max_seq_len, packing, Holdout.of(corpus, split))
        return cls(corpus, directory, max_seq_len, packing)

    def __len__(self) -> int:
        return len(self.targets)

    @property
    def tokens(self) -> int:
        """Predictions in one pass over all rows."""
        return int(self.targets.sum(dtype=np.int64))

    def batch(self, rows: Sequence[int] | Integers) -> Batch:
        """The rows of these indices, in this order. None at all gives one row of padding that predicts nothing.

        The last is for a rank that has no row of a short group, and still has to take part in the gradient's sum.
        """
        rows = np.asarray(rows, dtype=np.int64)
        shape = (max(1, len(rows)), self.max_seq_len)
        row, start, length = self._pieces(rows)
        begins = _segment_starts(row, length)
        position = _positions(length)
        source = np.repeat(start, length) + position
        place = np.repeat(row * self.max_seq_len + begins, length) + position
        # The last token of a piece predicts nothing; what follows it is another document's, or past the end.
        last = position == np.repeat(length - 1, length)
        following = np.where(last, IGNORE_INDEX, self._tokens[np.where(last, source, source + 1)].astype(np.int64))
        segments = None if self.packing == "none" else np.repeat(_ordinal(row), length) + 1
        return Batch(
            _hash_documents(shape, 0, place, self._tokens[source].astype(np.int64)),
            None if segments is None else _hash_documents(shape, 0, place, position),
            None if segments is None else _hash_documents(shape, 0, place, segments),
            _hash_documents(shape, IGNORE_INDEX, place, following),
            None if segments is None else self._offsets(shape[0], row * self.max_seq_len + begins, length),
        )

    def _offsets(self, rows: int, begins: Integers, length: Integers) -> Tensor:
        """Where the pieces, and the padding behind them, begin among the tokens of so many rows."""
        edges = np.arange(rows + 1) * self.max_seq_len
        places = np.unique(np.concatenate((begins, begins + length, edges)))
        out = np.full(rows * (self._most_pieces + 1) + 1, edges[-1], dtype=np.int32)
        out[: len(places)] = places
        return torch.from_numpy(out)

    def _pieces(self, rows: Integers) -> tuple[Integers, Integers, Integers]:
        """(place of its row in ``rows``, first token, length) of each piece of these rows."""
        first = self._firsts[rows]
        counts = self._firsts[rows + 1] - first
        pieces = np.repeat(first, counts) + _positions(counts)
        return np.repeat(np.arange(len(rows)), counts), self._starts[pieces], self._lengths[pieces].astype(np.int64)


def _positions(counts: Integers) -> Integers:
    """[2, 3] -> [0, 1, 0, 1, 2]."""
    total = int(counts.sum())
    return np.arange(total) - np.repeat(np.cumsum(counts) - counts, counts)


def _segment_starts(row: Integers, length: Integers) -> Integers:
    """Where in its row each piece begins, for pieces in the order of ``row``."""
    before = np.cumsum(length) - length
    first = np.searchsorted(row, row)
    return before - before[first] if len(row) else before


def _ordinal(row: Integers) -> Integers:
    """The number of each piece within its row, from 0."""
    return np.arange(len(row)) - np.searchsorted(row, row)


def _hash_documents(shape: tuple[int, int], fill: int, place: Integers, values: Integers) -> Tensor:
    out = np.full(shape, fill, dtype=np.int64)
    out.reshape(-1)[place] = values
    return torch.from_numpy(out)


@dataclass(frozen=True)
class Holdout:
    """Which documents a split takes: a function of a document's number alone, the same for every job."""

    split: SplitSpec
    always: int = -1
    never: int = -1

    KEY = 0x5EED_0E7A1
    CHUNK = 1 << 20

    @classmethod
    def of(cls, corpus: Corpus, split: SplitSpec) -> "Holdout":
        """At least one document is held out and at least one is not, however small the fraction or the corpus."""
        documents = corpus.meta.documents
        if split.part == "all":
            return cls(split)
        if documents < 2:
            raise DataInvalid("eval_fraction needs a corpus of at least two documents, and this one has one")
        lowest, highest = (2**64, 0), (-1, 0)
        for start in range(0, documents, cls.CHUNK):
            marks = cls.marks(start, min(start + cls.CHUNK, documents))
            lowest = min(lowest, (int(marks.min()), start + int(marks.argmin())))
            highest = max(highest, (int(marks.max()), start + int(marks.argmax())))
        return cls(split, always=lowest[1], never=highest[1])

    @classmethod
    def marks(cls, start: int, end: int) -> npt.NDArray[np.uint64]:
        """A number for each document from ``start`` to ``end``, uniform below 2 ** 64."""
        return splitmix64(np.arange(start + 1, end + 1, dtype=np.uint64) * GAMMA, cls.KEY)

    def taken(self, start: int, end: int) -> npt.NDArray[np.bool_]:
        """For each document from ``start`` to ``end``: whether the split has it."""
        numbers = np.arange(start, end)
        if self.split.part == "all":
            return np.ones(end - start, dtype=np.bool_)
        held: npt.NDArray[np.bool_] = self.marks(start, end) < np.uint64(
            min(2**64 - 1, int(self.split.fraction * 2**64))
        )
        held = (held | (numbers == self.always)) & (numbers != self.never)
        return held if self.split.part == "eval" else ~held


def _write(corpus: Corpus, directory: Path, max_seq_len: int, packing: Packing, held: Holdout) -> None:
    """Write the table's files, block by block."""
    columns = ArrayFiles(directory, ("starts.bin", "lengths.bin", "firsts.bin", "targets.bin"))
    nothing = np.zeros(0, dtype=np.int64)
    columns.append(nothing, nothing, np.zeros(1, dtype=np.int64), nothing)
    pieces = 0
    for first, last in _blocks(corpus.offsets):
        starts, lengths = segments_of(corpus.offsets[first : last + 1], held.taken(first, last), max_seq_len)
        row = np.arange(len(lengths)) if packing == "none" else best_fit(lengths, max_seq_len)
        pieces = _append(columns, pieces, starts, lengths, row)
    columns.close()


def _blocks(offsets: Integers) -> Iterator[tuple[int, int]]:
    """Ranges of documents of about ``BLOCK_TOKENS`` tokens."""
    edges = np.searchsorted(offsets, np.arange(0, int(offsets[-1]) + BLOCK_TOKENS, BLOCK_TOKENS))
    edges = np.unique(np.minimum(edges, len(offsets) - 1))
    yield from zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True)


def segments_of(offsets: Integers, taken: npt.NDArray[np.bool_], max_seq_len: int) -> tuple[Integers, Integers]:
    """(first token, length) of each piece of the ``taken`` documents, which lie between consecutive ``offsets``."""
    begins, sizes = offsets[:-1][taken], np.diff(offsets)[taken]
    stride = max_seq_len - 1
    counts = -(-(sizes - 1) // stride)
    ahead = _positions(counts) * stride
    return np.repeat(begins, counts) + ahead, np.minimum(max_seq_len, np.repeat(sizes, counts) - ahead)


def best_fit(lengths: Integers, capacity: int) -> Integers:
    """The row of each piece: the longest first, each into the fullest row that still has room.

    Rows are found by the room they have left, through an integer whose bit r says that some row has room r.
    """
    row = np.zeros(len(lengths), dtype=np.int64)
    sizes, rows = lengths.tolist(), 0
    with_room: dict[int, list[int]] = {}
    rooms = 0
    for piece in np.argsort(-lengths, kind="stable").tolist():
        size = sizes[piece]
        fitting = rooms >> size
        if fitting:
            room = size + (fitting & -fitting).bit_length() - 1
            chosen = with_room[room].pop()
            rooms ^= 0 if with_room[room] else 1 << room
        else:
            room, chosen, rows = capacity, rows, rows + 1
        row[piece] = chosen
        if room > size:
            with_room.setdefault(room - size, []).append(chosen)
            rooms |= 1 << (room - size)
    return row


def _append(columns: ArrayFiles, pieces: int, starts: Integers, lengths: Integers, row: Integers) -> int:
    """Write a block's pieces in the order of their rows; the number of pieces so far."""
    if not len(row):
        return pieces
    order = np.argsort(row, kind="stable")
    ends = pieces + np.cumsum(np.bincount(row))
    targets = np.bincount(row, weights=lengths - 1)
    columns.append(starts[order], lengths[order].astype(np.int32), ends, targets.astype(np.int32))
    return int(ends[-1])
