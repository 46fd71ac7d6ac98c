"""Files of bare numbers: written side by side, published by one rename, mapped into memory.

Token shards keep a journal while they are built: how far the corpus is read and what is stored of it. A build that was
killed goes on behind its last entry, and ends with the same bytes as one that was not.
"""

import os
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from trainyard.contract.cache import building_of
from trainyard.contract.rundir import publish_directory, read_json, write_json
from trainyard.worker.data.jsonl import DataInvalid, ParseStats
from trainyard.worker.data.tokenizers import Ids, Tokenizer

JOURNAL = "journal.json"
JOURNAL_SECONDS = 5.0
"""Between entries of the journal: at most so much work is done twice. Each waits for the disk."""

TOKENS, OFFSETS = "tokens.bin", "offsets.bin"


@dataclass(frozen=True)
class JournalEntry:
    """An entry of the journal: so many ``tokens`` are stored, of the documents that ``tally`` counts."""

    tokens: int
    tally: ParseStats

    @classmethod
    def read(cls, directory: Path, token_bytes: int) -> Self | None:
        """The last entry; None where there is none, or where the files hold less than it says."""
        try:
            raw = read_json(directory / JOURNAL)
            if raw is None:
                return None
            named = [(int(line), str(why)) for line, why in raw["tally"].pop("named")]
            found = cls(int(raw["tokens"]), ParseStats(**raw["tally"], examples=named))
            held = [(directory / name).stat().st_size for name in (TOKENS, OFFSETS)]
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None
        enough = all(has >= needs for has, needs in zip(held, found.sizes(token_bytes), strict=True))
        return found if enough else None

    def sizes(self, token_bytes: int) -> tuple[int, int]:
        """Bytes of both files."""
        return self.tokens * token_bytes, (self.tally.documents + 1) * 8


class ShardWriter:
    """The token and offset files while they are written. `worker.data.corpus.scan`'s sink.

    ``begun``: what an earlier build of ``directory`` has stored and this one goes on behind.
    """

    def __init__(self, directory: Path, tokenizer: Tokenizer, token_bytes: int) -> None:
        self.begun = JournalEntry.read(directory, token_bytes)
        self.tokens = self.begun.tokens if self.begun else 0
        self._directory = directory
        self._dtype = np.uint16 if token_bytes == 2 else np.uint32
        self._begin = np.array([tokenizer.bos_id], dtype=self._dtype)
        self._end = np.array([tokenizer.eos_id], dtype=self._dtype)
        self._tally = self.begun.tally if self.begun else ParseStats()
        self._noted_at = time.monotonic()
        sizes = self.begun.sizes(token_bytes) if self.begun else None
        self._columns = ArrayFiles(directory, (TOKENS, OFFSETS), sizes)
        if self.begun is None:
            self._columns.append(np.zeros(0, dtype=self._dtype), np.zeros(1, dtype=np.int64))

    def add(self, documents: Sequence[Ids], tally: ParseStats) -> None:
        """Append documents, each between beginning and end; with them the corpus is read as far as ``tally`` says."""
        if documents:
            parts = [part for ids in documents for part in (self._begin, ids.astype(self._dtype), self._end)]
            ends = self.tokens + np.cumsum([len(ids) + 2 for ids in documents], dtype=np.int64)
            self._columns.append(np.concatenate(parts), ends)
            self.tokens = int(ends[-1])
        self._tally = tally
        if time.monotonic() - self._noted_at >= JOURNAL_SECONDS:
            self._note()

    def _note(self) -> None:
        # First the numbers, then that they are there: the other way round a power cut could leave holes.
        self._columns.flush()
        write_json(self._directory / JOURNAL, asdict(JournalEntry(self.tokens, self._tally)))
        self._noted_at = time.monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is not None and not issubclass(kind, UNUSABLE):
                # Asked to stop: the next attempt begins exactly here, or else at the entry before.
                with suppress(OSError):
                    self._note()
        finally:
            self._columns.close()


class ArrayFiles:
    """Files of bare numbers that are written side by side; given ``sizes``, on behind so many bytes of each."""

    def __init__(self, directory: Path, names: Sequence[str], sizes: Sequence[int] | None = None) -> None:
        self._files = [(directory / name).open("wb" if sizes is None else "r+b") for name in names]
        for file, size in zip(self._files, sizes or (), strict=False):
            file.truncate(size)
            file.seek(size)

    def append(self, *columns: npt.NDArray[Any]) -> None:
        """Add numbers to each file, in the order of the names."""
        for file, column in zip(self._files, columns, strict=True):
            file.write(np.ascontiguousarray(column).data)

    def flush(self) -> None:
        """All of it is on the disk, safe from a power cut."""
        for file in self._files:
            file.flush()
            os.fsync(file.fileno())

    def close(self) -> None:
        """Close the files, safe from a power cut: a rename must not outlive what it publishes."""
        for file in self._files:
            with file:
                file.flush()
                os.fsync(file.fileno())


UNUSABLE = (DataInvalid, OSError)
"""After these what was built is worth nothing, or the disk has no room for it."""


@contextmanager
def build_directory(directory: Path, *, goes_on: bool = False) -> Iterator[Path]:
    """A directory to build in, which becomes ``directory`` when the block ends well. The caller holds a lock on it.

    ``goes_on``: what a build left that was killed or stopped is kept for the next one.
    """
    building = building_of(directory)
    # What stands there is of a build that was killed: the lock is ours, so nobody is writing to it.
    if not goes_on:
        shutil.rmtree(building, ignore_errors=True)
    building.mkdir(parents=True, exist_ok=True)
    try:
        yield building
        # The journal, and what was being written when a build was killed: files are written under a name with a dot.
        for entry in {*building.glob(JOURNAL), *building.glob(".*")}:
            entry.unlink()
        publish_directory(building, directory)
    except UNUSABLE:
        shutil.rmtree(building, ignore_errors=True)
        raise
    finally:
        if not goes_on:
            shutil.rmtree(building, ignore_errors=True)


def memmap_array(path: Path, dtype: type[np.generic], count: int) -> npt.NDArray[Any]:
    """``count`` numbers of a file without a header, memory-mapped. Raises OSError where the file has another size."""
    expected = count * np.dtype(dtype).itemsize
    if path.stat().st_size != expected:
        raise OSError(f"{path} has {path.stat().st_size} bytes, not {expected}: remove {path.parent} to build it again")
    # An empty file cannot be mapped.
    return np.memmap(path, dtype=dtype, mode="r", shape=(count,)) if count else np.zeros(0, dtype=dtype)
