"""Split documents into segments, pack the segments into rows of ``max_seq_len`` tokens, and make batches of rows.

A document of more than ``max_seq_len`` tokens is split into segments that overlap by one token: every next token is
predicted exactly once, and only the last segment ends with EOS. With packing "none" a row is one segment; with
"document" a row is packed with whole segments, and attention stays within a segment.

Legend: ``B`` rows of a batch, ``S`` = max_seq_len.
"""

from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from trainyard.worker.data.corpus import Corpus
from trainyard.worker.data.documents import (
    BLOCK_TOKENS,
    CHUNK,
    TEXT_KEY,
    Hashes,
    HashFile,
    Integers,
    blocks,
    count_distinct,
    positions,
    text_hashes,
)
from trainyard.worker.data.jsonl import DataInvalid
from trainyard.worker.data.shards import ArrayFiles, build_directory, memmap_array
from trainyard.worker.splitmix import GAMMA, splitmix64

if TYPE_CHECKING:
    # The process that prepares a corpus packs its rows without torch, which takes seconds to load.
    import torch
    from torch import Tensor

Packing = Literal["document", "none"]
SplitBy = Literal["number", "text"]

FORMAT = 1
IGNORE_INDEX = -100
DUPLICATES_FILE, DOCUMENTS_FILE = "duplicates", "documents"


@dataclass(frozen=True)
class SplitSpec:
    """Which documents to use: all, the held-out ones ("eval") or the others ("train"). ``fraction`` is held out.

    ``by``: what decides on a document. By its "text", documents with the same text are on the same side. By its
    "number" in the corpus they may be on both: runs that release 0.1 has begun stay so. ``documents``: use at most
    this number, from the first on.
    """

    part: Literal["all", "train", "eval"] = "all"
    fraction: float = 0.0
    by: SplitBy = "text"
    documents: int | None = None

    def __str__(self) -> str:
        if self.part == "all":
            return self.part if self.documents is None else f"first-{self.documents}"
        return f"{self.part}-{self.fraction!r}" + ("" if self.by == "number" else f"-{self.by}")


OFFSETS_STEP = 64
"""Numbers of segments are rounded up to a multiple of this, so that a GPU's allocator sees few sizes."""


class Batch(NamedTuple):
    """Rows as int64 tensors, [B, S] each.

    ``labels[b, t]`` is the token after ``input_ids[b, t]`` in its segment, or -100 if there is none. ``segment_ids``
    is 0 for padding and numbers the segments of a row from 1; ``position_ids`` starts at 0 in each segment. Both are
    None if every row is one segment: the decoder does not need them then, and is faster without. ``offsets`` [P + 1]
    int32 is the start of each segment among all B * S tokens; the padding of a row counts as one more segment. The rest
    of ``offsets`` is filled with B * S. None if ``segment_ids`` is None.
    """

    input_ids: "Tensor"
    position_ids: "Tensor | None"
    segment_ids: "Tensor | None"
    labels: "Tensor"
    offsets: "Tensor | None" = None

    def to(self, device: "torch.device | str") -> "Batch":
        """Copy the batch to ``device``; from pinned memory the copy is asynchronous."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> "Batch":
        return self._map(lambda tensor: tensor.pin_memory())

    def _map(self, function: "Callable[[Tensor], Tensor]") -> "Batch":
        return Batch(*(None if tensor is None else function(tensor) for tensor in self))  # type: ignore[arg-type]


class RowFiles:
    """The memory-mapped rows of one corpus: row r has the segments ``firsts[r]`` to ``firsts[r + 1] - 1``."""

    def __init__(self, corpus: Corpus, directory: Path) -> None:
        # The reference to the corpus keeps its lock: it is not evicted from the cache while the rows are in use.
        self.corpus = corpus
        segments, rows = (directory / "starts.bin").stat().st_size // 8, (directory / "targets.bin").stat().st_size // 4
        self.starts = memmap_array(directory / "starts.bin", np.int64, segments)
        self.lengths = memmap_array(directory / "lengths.bin", np.int32, segments)
        self.firsts = memmap_array(directory / "firsts.bin", np.int64, rows + 1)
        self.targets: npt.NDArray[np.int32] = memmap_array(directory / "targets.bin", np.int32, rows)
        self.max_segments = int(np.diff(self.firsts).max(initial=0))
        self.duplicates = _read_count(directory / DUPLICATES_FILE)
        self.documents = _read_count(directory / DOCUMENTS_FILE)

    def segments(self, rows: Integers) -> tuple[Integers, Integers, Integers]:
        """Return (index of its row in ``rows``, first token, length) of each segment of these rows."""
        first = self.firsts[rows]
        counts = self.firsts[rows + 1] - first
        segments = np.repeat(first, counts) + positions(counts)
        return np.repeat(np.arange(len(rows)), counts), self.starts[segments], self.lengths[segments].astype(np.int64)


def _read_count(file: Path) -> int | None:
    return int(file.read_text()) if file.exists() else None


class PackedDataset:
    """The rows of one corpus, or of several, numbered one corpus after the other: ``parts``, one of each corpus.

    ``duplicates``: documents of a corpus whose text is that of an earlier one in it, or None if no corpus was split by
    text. ``documents``: those in the rows, or None if release 0.1 made the rows.
    """

    def __init__(self, parts: Sequence[RowFiles], max_seq_len: int, packing: Packing) -> None:
        self.max_seq_len = max_seq_len
        self.packing = packing
        self.parts = tuple(parts)
        self._bounds = np.cumsum([0, *(len(part.targets) for part in parts)])
        self._max_segments = max(part.max_segments for part in parts)
        counted = [part.duplicates for part in parts if part.duplicates is not None]
        self.duplicates = sum(counted) if counted else None
        documents = [part.documents for part in parts if part.documents is not None]
        self.documents = sum(documents) if len(documents) == len(parts) else None

    @classmethod
    def open(
        cls, corpus: Corpus, *, max_seq_len: int, packing: Packing, split: SplitSpec | None = None
    ) -> "PackedDataset":
        """Open the rows of ``corpus`` for these settings. Build them first if its directory does not have them.

        Raises DataInvalid if a corpus of fewer than two different documents is to be split.
        """
        split = split or SplitSpec()
        directory = corpus.directory / f"rows-{FORMAT}-{max_seq_len}-{packing}-{split}"
        if not directory.exists():
            with corpus.lock():
                if not directory.exists():
                    with build_directory(directory) as building:
                        _write(corpus, building, max_seq_len, packing, _holdout(corpus, building, split))
        return cls([RowFiles(corpus, directory)], max_seq_len, packing)

    @classmethod
    def concat(cls, datasets: "Sequence[PackedDataset]") -> "PackedDataset":
        """Return the rows of all ``datasets``, which have the same length and packing, one after the other."""
        parts = [part for dataset in datasets for part in dataset.parts]
        return cls(parts, datasets[0].max_seq_len, datasets[0].packing)

    def __len__(self) -> int:
        return int(self._bounds[-1])

    @property
    def tokens(self) -> int:
        """Number of predictions in one pass over all rows."""
        return sum(int(part.targets.sum(dtype=np.int64)) for part in self.parts)

    def targets_of(self, rows: Sequence[int] | Integers) -> Integers:
        """Return how many tokens each of these rows predicts."""
        rows = np.asarray(rows, dtype=np.int64)
        targets = np.zeros(len(rows), dtype=np.int64)
        for number, mask, local in self._by_part(rows):
            targets[mask] = self.parts[number].targets[local]
        return targets

    @property
    def attention_length(self) -> float:
        """Sum of the squared segment lengths, for each prediction: see `model.costs.flops_per_token`."""
        blocks = (
            part.lengths[at : at + BLOCK_TOKENS]
            for part in self.parts
            for at in range(0, len(part.lengths), BLOCK_TOKENS)
        )
        return sum(int(np.square(block, dtype=np.int64).sum()) for block in blocks) / max(1, self.tokens)

    def batch(self, rows: Sequence[int] | Integers, min_rows: int = 1, *, fixed_offsets: bool = False) -> Batch:
        """Return the rows of these indices, in this order, and after them padding that predicts nothing.

        There are at least ``min_rows`` rows, and at least one: a rank that has no row in a short micro-batch must still
        join the gradient all-reduce. ``fixed_offsets``: the shape of ``offsets`` depends on the number of rows alone.
        """
        rows = np.asarray(rows, dtype=np.int64)
        shape = (max(min_rows, len(rows)), self.max_seq_len)
        # One value per segment:
        row, part, first_token, length = self._segments(rows)
        start = row * self.max_seq_len + _starts_in_row(row, length)
        # One value per token; ``source`` is an index into the corpus, ``destination`` one into the batch:
        position = positions(length)
        source = np.repeat(first_token, length) + position
        destination = np.repeat(start, length) + position
        # The last token of a segment predicts nothing: the next one belongs to another document, or is past the end.
        last = position == np.repeat(length - 1, length)
        token_part = np.repeat(part, length)
        labels = np.where(last, IGNORE_INDEX, self._tokens(token_part, np.where(last, source, source + 1)))
        segments = None if self.packing == "none" else np.repeat(_numbers_in_row(row), length) + 1
        return Batch(
            _scatter(shape, 0, destination, self._tokens(token_part, source)),
            None if segments is None else _scatter(shape, 0, destination, position),
            None if segments is None else _scatter(shape, 0, destination, segments),
            _scatter(shape, IGNORE_INDEX, destination, labels),
            None if segments is None else self._offsets(shape[0], start, length, fixed_offsets),
        )

    def _offsets(self, rows: int, start: Integers, length: Integers, fixed: bool) -> "Tensor":
        """Return the starts of all segments, and of the padding after them, among the tokens of ``rows`` rows."""
        edges = np.arange(rows + 1) * self.max_seq_len
        starts = np.unique(np.concatenate((start, start + length, edges)))
        # Flash attention's backward pass takes memory and blocks for each segment, also for an empty one. The maximum
        # is often five times the number of real ones, because packing puts the shortest documents together.
        most = rows * (self._max_segments + 1)
        segments = most if fixed else min(most, -(-(len(starts) - 1) // OFFSETS_STEP) * OFFSETS_STEP)
        out = np.full(segments + 1, edges[-1], dtype=np.int32)
        out[: len(starts)] = starts
        return _as_tensor(out)

    def _by_part(self, rows: Integers) -> Iterator[tuple[int, Integers, Integers]]:
        """Yield (number of a part, indices into ``rows`` of its rows, their numbers in the part), part by part."""
        number = np.searchsorted(self._bounds, rows, side="right") - 1
        for index in np.unique(number).tolist():
            mask = np.flatnonzero(number == index)
            yield index, mask, rows[mask] - self._bounds[index]

    def _segments(self, rows: Integers) -> tuple[Integers, Integers, Integers, Integers]:
        """Return (index of its row in ``rows``, part, first token, length) of each segment, sorted by row."""
        columns = [np.zeros((4, 0), dtype=np.int64)]
        for number, mask, local in self._by_part(rows):
            row, first, length = self.parts[number].segments(local)
            columns.append(np.stack((mask[row], np.full(len(row), number), first, length)))
        joined = np.concatenate(columns, axis=1)
        row, part, first, length = joined[:, np.argsort(joined[0], kind="stable")]
        return row, part, first, length

    def _tokens(self, part: Integers, source: Integers) -> Integers:
        """Return the tokens at the positions ``source`` of the corpora of the parts ``part``, one per element."""
        if len(self.parts) == 1:
            tokens: Integers = self.parts[0].corpus.tokens[source].astype(np.int64)
            return tokens
        tokens = np.empty(len(source), dtype=np.int64)
        for index in np.unique(part).tolist():
            mask = part == index
            tokens[mask] = self.parts[index].corpus.tokens[source[mask]]
        return tokens


def _starts_in_row(row: Integers, length: Integers) -> Integers:
    """Return the start of each segment within its row; the segments are sorted by ``row``."""
    before = np.cumsum(length) - length
    first = np.searchsorted(row, row)
    return before - before[first] if len(row) else before


def _numbers_in_row(row: Integers) -> Integers:
    return np.arange(len(row)) - np.searchsorted(row, row)


def _scatter(shape: tuple[int, int], fill: int, destination: Integers, values: Integers) -> "Tensor":
    out = np.full(shape, fill, dtype=np.int64)
    out.reshape(-1)[destination] = values
    return _as_tensor(out)


def _as_tensor(array: npt.NDArray[Any]) -> "Tensor":
    import torch

    return torch.from_numpy(array)


@dataclass(frozen=True)
class Holdout:
    """The documents of a split. A function of ``hashes`` [documents], so it is the same for every job.

    Documents with the hash ``always_held_out`` are held out, those with ``never_held_out`` are not.
    """

    split: SplitSpec
    hashes: Hashes | None = None
    always_held_out: int = 0
    never_held_out: int = 0

    @classmethod
    def of(cls, split: SplitSpec, documents: int, hashes: Hashes | None = None) -> "Holdout":
        """Return the holdout of ``split``: of numbered documents, or by their text's ``hashes``.

        At least one document is held out and at least one is not. Raises DataInvalid if that is impossible.
        """
        if split.part == "all":
            return cls(split)
        if documents < 2:
            raise DataInvalid(
                "eval_fraction needs a corpus of at least two documents, and this one has one: add documents, or "
                "hold out another corpus with eval_data_path"
            )
        lowest, highest = 2**64, -1
        for start in range(0, documents, CHUNK):
            chunk = cls(split, hashes).hashes_of(start, min(start + CHUNK, documents))
            lowest, highest = min(lowest, int(chunk.min())), max(highest, int(chunk.max()))
        if lowest == highest:
            raise DataInvalid("eval_fraction needs two different documents, and all of this corpus have the same text")
        return cls(split, hashes, always_held_out=lowest, never_held_out=highest)

    def hashes_of(self, start: int, end: int) -> Hashes:
        if self.hashes is not None:
            return self.hashes[start:end]
        return splitmix64(np.arange(start + 1, end + 1, dtype=np.uint64) * GAMMA, TEXT_KEY)

    def mask(self, start: int, end: int) -> npt.NDArray[np.bool_]:
        """Return whether the split has each of the documents ``start`` to ``end - 1``."""
        if self.split.part == "all":
            return np.ones(end - start, dtype=np.bool_)
        threshold = np.uint64(min(2**64 - 1, int(self.split.fraction * 2**64)))
        hashes = self.hashes_of(start, end)
        held_out: npt.NDArray[np.bool_] = hashes < threshold
        held_out = (held_out | (hashes == np.uint64(self.always_held_out))) & (hashes != np.uint64(self.never_held_out))
        return held_out if self.split.part == "eval" else ~held_out


def _holdout(corpus: Corpus, building: Path, split: SplitSpec) -> Holdout:
    """Return the holdout of ``split``. If it is by text, write the number of duplicates into ``building``."""
    documents = corpus.meta.documents
    if split.part == "all" or split.by == "number" or documents < 2:
        return Holdout.of(split, documents)
    with HashFile(building) as file:
        for first, last in blocks(corpus.offsets):
            file.append(text_hashes(corpus.tokens, corpus.offsets[first : last + 1]))
        hashes = file.read(documents)
    (building / DUPLICATES_FILE).write_text(str(documents - count_distinct(hashes)))
    return Holdout.of(split, documents, hashes)


def _write(corpus: Corpus, directory: Path, max_seq_len: int, packing: Packing, holdout: Holdout) -> None:
    files = ArrayFiles(directory, ("starts.bin", "lengths.bin", "firsts.bin", "targets.bin"))
    empty = np.zeros(0, dtype=np.int64)
    files.append(empty, empty, np.zeros(1, dtype=np.int64), empty)
    written = documents = 0
    wanted = holdout.split.documents
    for first, last in blocks(corpus.offsets if wanted is None else corpus.offsets[: wanted + 1]):
        selected = holdout.mask(first, last)
        documents += int(np.count_nonzero(selected))
        starts, lengths = segments_of(corpus.offsets[first : last + 1], selected, max_seq_len)
        row = np.arange(len(lengths)) if packing == "none" else best_fit(lengths, max_seq_len)
        written = _append(files, written, starts, lengths, row)
    files.close()
    (directory / DOCUMENTS_FILE).write_text(str(documents))


def documents_within(offsets: Integers, max_tokens: int) -> int:
    """Return how many of the first documents predict at most ``max_tokens`` tokens together; at least 1.

    ``offsets``: the bounds of the documents. A document predicts all its tokens but the first.
    """
    # By bisection: the offsets of a billion documents are not read.
    fitting = bisect_right(range(len(offsets)), max_tokens, key=lambda count: int(offsets[count] - offsets[0]) - count)
    return max(1, fitting - 1)


def segments_of(offsets: Integers, selected: npt.NDArray[np.bool_], max_seq_len: int) -> tuple[Integers, Integers]:
    """Return (first token, length) of each segment of the ``selected`` documents; ``offsets`` are their bounds."""
    starts, sizes = offsets[:-1][selected], np.diff(offsets)[selected]
    stride = max_seq_len - 1
    counts = -(-(sizes - 1) // stride)
    shift = positions(counts) * stride
    return np.repeat(starts, counts) + shift, np.minimum(max_seq_len, np.repeat(sizes, counts) - shift)


def best_fit(lengths: Integers, capacity: int) -> Integers:
    """Return the row of each segment by best-fit decreasing: longest first, each into the fullest row with room."""
    row = np.zeros(len(lengths), dtype=np.int64)
    sizes, rows = lengths.tolist(), 0
    rows_by_room: dict[int, list[int]] = {}
    room_bits = 0  # bit r is set if a row has room for r tokens, so that the smallest sufficient room is the lowest bit
    for segment in np.argsort(-lengths, kind="stable").tolist():
        size = sizes[segment]
        fitting = room_bits >> size
        if fitting:
            room = size + (fitting & -fitting).bit_length() - 1
            chosen = rows_by_room[room].pop()
            room_bits ^= 0 if rows_by_room[room] else 1 << room
        else:
            room, chosen, rows = capacity, rows, rows + 1
        row[segment] = chosen
        if room > size:
            rows_by_room.setdefault(room - size, []).append(chosen)
            room_bits |= 1 << (room - size)
    return row


def _append(files: ArrayFiles, written: int, starts: Integers, lengths: Integers, row: Integers) -> int:
    """Append a block's segments in the order of their rows; return the number of segments ``written`` so far."""
    if not len(row):
        return written
    order = np.argsort(row, kind="stable")
    ends = written + np.cumsum(np.bincount(row))
    targets = np.bincount(row, weights=lengths - 1)
    files.append(starts[order], lengths[order].astype(np.int32), ends, targets.astype(np.int32))
    return int(ends[-1])
