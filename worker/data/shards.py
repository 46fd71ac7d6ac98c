"""Array files without headers: written in parallel, published by one rename, memory-mapped.

A build of token shards keeps a journal: how far the corpus is read, and how many tokens are stored. The next build
resumes a killed one at its last journal entry, and produces the same bytes as an uninterrupted build.
"""

import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from trainyard.contract.cache import building_of
from trainyard.contract.rundir import publish_directory, read_json, write_json
from trainyard.worker.data.file import ReadPosition
from trainyard.worker.data.jsonl import DataInvalid, ParseStats
from trainyard.worker.data.tokenizers import Ids, Tokenizer

JOURNAL = "journal.json"
JOURNAL_SECONDS = 5.0
"""Interval of journal entries: at most this much work is repeated. Each entry waits for an fsync."""

TOKENS, OFFSETS = "tokens.bin", "offsets.bin"


@dataclass(frozen=True)
class JournalEntry:
    """A journal entry: ``tokens`` are stored, of the documents that ``stats`` counts.

    ``position``: the bytes of the corpus that were read for them, which the next build must find again.
    """

    tokens: int
    stats: ParseStats
    position: ReadPosition

    @classmethod
    def read(cls, directory: Path, token_bytes: int) -> Self | None:
        """Return the last entry; None if there is none, or if the files are shorter than it says."""
        try:
            raw = read_json(directory / JOURNAL)
            if raw is None:
                return None
            examples = [(int(line), str(reason)) for line, reason in raw["tally"].pop("named")]
            # Without "read" it is of release 0.1, whose builds did not compare what they had stored.
            position = ReadPosition(int(raw["read"]["bytes"]), str(raw["read"]["sha256"]))
            entry = cls(int(raw["tokens"]), ParseStats(**raw["tally"], examples=examples), position)
            sizes = [(directory / name).stat().st_size for name in (TOKENS, OFFSETS)]
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None
        complete = all(size >= needed for size, needed in zip(sizes, entry.sizes(token_bytes), strict=True))
        return entry if complete else None

    def write(self, directory: Path) -> None:
        """Write the entry, with the keys that every release has used."""
        counts = asdict(self.stats)
        counts["named"] = counts.pop("examples")
        write_json(directory / JOURNAL, {"tokens": self.tokens, "tally": counts, "read": asdict(self.position)})

    def sizes(self, token_bytes: int) -> tuple[int, int]:
        return self.tokens * token_bytes, (self.stats.documents + 1) * 8


class ShardWriter:
    """Writes the token and offset files; the sink of `worker.data.corpus.tokenize_file`.

    ``resumed_from``: the journal entry of an earlier build of ``directory`` that this one continues, or None.
    ``position``: returns how far the corpus was read. ``durable``: the files survive a power cut once they are closed.
    """

    def __init__(
        self,
        directory: Path,
        tokenizer: Tokenizer,
        token_bytes: int,
        position: Callable[[], ReadPosition],
        *,
        durable: bool = True,
    ) -> None:
        self.position = position
        self.resumed_from = JournalEntry.read(directory, token_bytes)
        self.tokens = self.resumed_from.tokens if self.resumed_from else 0
        self._directory, self._durable = directory, durable
        self._dtype = np.uint16 if token_bytes == 2 else np.uint32
        self._bos = np.array([tokenizer.bos_id], dtype=self._dtype)
        self._eos = np.array([tokenizer.eos_id], dtype=self._dtype)
        self._stats = self.resumed_from.stats if self.resumed_from else ParseStats()
        self._journaled_at = time.monotonic()
        sizes = self.resumed_from.sizes(token_bytes) if self.resumed_from else None
        self._files = ArrayFiles(directory, (TOKENS, OFFSETS), sizes)
        if self.resumed_from is None:
            self._files.append(np.zeros(0, dtype=self._dtype), np.zeros(1, dtype=np.int64))

    def add(self, documents: Sequence[Ids], stats: ParseStats) -> None:
        """Append documents, each between BOS and EOS; ``stats`` counts the corpus up to the last of them."""
        if documents:
            parts = [part for ids in documents for part in (self._bos, ids.astype(self._dtype), self._eos)]
            ends = self.tokens + np.cumsum([len(ids) + 2 for ids in documents], dtype=np.int64)
            self._files.append(np.concatenate(parts), ends)
            self.tokens = int(ends[-1])
        self._stats = stats
        if time.monotonic() - self._journaled_at >= JOURNAL_SECONDS:
            self._write_journal()

    def _write_journal(self) -> None:
        # Data first, then the entry: in the other order a power cut could leave an entry without its data.
        self._files.flush()
        JournalEntry(self.tokens, self._stats, self.position()).write(self._directory)
        self._journaled_at = time.monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is not None and not issubclass(kind, DISCARD_ERRORS):
                # A stop request: the next attempt resumes exactly here, or at the entry before if this write fails.
                with suppress(OSError):
                    self._write_journal()
        finally:
            self._files.close(durable=self._durable)


class ArrayFiles:
    """Array files without headers that grow together; with ``sizes``, each is continued after that many bytes."""

    def __init__(self, directory: Path, names: Sequence[str], sizes: Sequence[int] | None = None) -> None:
        self._files = [(directory / name).open("wb" if sizes is None else "r+b") for name in names]
        for file, size in zip(self._files, sizes or (), strict=False):
            file.truncate(size)
            file.seek(size)

    def append(self, *columns: npt.NDArray[Any]) -> None:
        """Append one array to each file, in the order of the names."""
        for file, column in zip(self._files, columns, strict=True):
            file.write(np.ascontiguousarray(column).data)

    def flush(self, *, durable: bool = True) -> None:
        for file in self._files:
            file.flush()
            if durable:
                os.fsync(file.fileno())

    def close(self, *, durable: bool = True) -> None:
        """Fsync and close the files: after a power cut, a published directory must not have empty files.

        Not ``durable``: only close them.
        """
        try:
            self.flush(durable=durable)
        finally:
            for file in self._files:
                file.close()


DISCARD_ERRORS = (DataInvalid, OSError)
"""After these errors an unfinished build is removed: its corpus is invalid, or the disk may be full."""


@contextmanager
def build_directory(directory: Path, *, resumable: bool = False) -> Iterator[Path]:
    """Yield a temporary directory that is renamed to ``directory`` if the block succeeds. The caller holds its lock.

    ``resumable``: keep the unfinished files of a killed or stopped build for the next one.
    """
    building = building_of(directory)
    if not resumable:
        # Left by a killed build: we hold the lock, so no process is writing to it.
        shutil.rmtree(building, ignore_errors=True)
    building.mkdir(parents=True, exist_ok=True)
    try:
        yield building
        # The journal, and the temporary files (their names start with a dot) of a write that was killed.
        for entry in {*building.glob(JOURNAL), *building.glob(".*")}:
            entry.unlink()
        publish_directory(building, directory)
    except DISCARD_ERRORS:
        shutil.rmtree(building, ignore_errors=True)
        raise
    finally:
        if not resumable:
            shutil.rmtree(building, ignore_errors=True)


def memmap_array(path: Path, dtype: type[np.generic], count: int) -> npt.NDArray[Any]:
    """Memory-map a file of ``count`` numbers without a header. Raises OSError if the file has another size."""
    expected = count * np.dtype(dtype).itemsize
    if path.stat().st_size != expected:
        raise OSError(f"{path} has {path.stat().st_size} bytes, not {expected}: remove {path.parent} to build it again")
    # mmap rejects an empty file.
    return np.memmap(path, dtype=dtype, mode="r", shape=(count,)) if count else np.zeros(0, dtype=dtype)
