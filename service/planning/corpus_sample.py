"""A bounded read of a corpus: at most 4 MiB, however long it is."""

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from io import BufferedReader
from pathlib import Path
from typing import BinaryIO

from trainyard.contract.allowed_paths import open_regular_inside
from trainyard.contract.file_identity import (
    BLANK,
    BOM,
    MAX_NAME_LENGTH,
    MAX_NAMES,
    Compression,
    compression_of,
    is_plain_text,
)

MAX_SAMPLED_FILES = 64
"""Files of a corpus that are read; each gets an equal part of ``SAMPLE_BYTES``."""

HEAD_BYTES = 4096
SAMPLE_BYTES = 4 << 20
BLOCKS = 16


@dataclass
class SampledLines:
    """Counts and texts of the sampled lines.

    Attributes:
        size: bytes of the whole file.
        sampled_bytes: bytes of the sampled lines; equal to ``size`` if the file was read completely.
        texts: the documents.
        bad_lines: lines that are neither blank nor a document.
        names: keys with text values in the first bad line, if it is an object.
    """

    size: int
    sampled_bytes: int = 0
    texts: list[str] = field(default_factory=list)
    bad_lines: int = 0
    names: tuple[str, ...] = ()

    @property
    def is_complete(self) -> bool:
        """Whether the whole file was read, so that its counts are exact."""
        return self.sampled_bytes == self.size

    @property
    def scale(self) -> float:
        """Factor from counts of the sample to counts of the file; 0 if no complete line was read."""
        return self.size / self.sampled_bytes if self.sampled_bytes else 0.0

    def add(self, raw: bytes, text_field: str) -> None:
        """Add one line, with its line end."""
        self.sampled_bytes += len(raw)
        if not raw.strip(BLANK):
            return
        value = _value_of(raw)
        text = _text_of(value, text_field)
        if text is None:
            self.names = self.names if self.bad_lines else _names_in(value)
            self.bad_lines += 1
        else:
            self.texts.append(text)


def sample_files(
    paths: Sequence[Path], text_field: str, roots: Sequence[Path] = (), limit: int = SAMPLE_BYTES
) -> SampledLines | None:
    """Sample some of the files, at equal distances, and extrapolate to all of them by size.

    At most ``limit`` bytes are read. Return None if `sample_lines` returns None for one of them.
    """
    if len(paths) == 1:
        return sample_lines(paths[0], text_field, roots, limit)
    try:
        sizes = [path.stat().st_size for path in paths]
    except OSError:
        return None
    chosen = sampled_paths(paths)
    total = SampledLines(sum(sizes))
    for path in chosen:
        sample = sample_lines(path, text_field, roots, limit // len(chosen))
        if sample is None:
            return None
        total.sampled_bytes += sample.sampled_bytes
        total.texts += sample.texts
        total.bad_lines += sample.bad_lines
        total.names = total.names or sample.names
    return total


def sampled_paths(paths: Sequence[Path]) -> list[Path]:
    """Return the files of a corpus that are read: all, or some in equal distances."""
    step = max(1, len(paths) / MAX_SAMPLED_FILES)
    return [paths[int(number * step)] for number in range(min(len(paths), MAX_SAMPLED_FILES))]


def sample_lines(
    path: Path, text_field: str, roots: Sequence[Path] = (), limit: int | None = None
) -> SampledLines | None:
    """Read a file of up to ``limit`` bytes completely, of a longer one blocks at equal distances.

    ``roots``: the directories below which it must lie, if any. Return None if it cannot be read, or is not plain JSONL:
    a part of a compressed file says nothing about the rest.
    """
    try:
        with BufferedReader(open_regular_inside(path, roots)) as file:
            head = file.read(HEAD_BYTES)
            if compression_of(head) is not Compression.NONE or is_plain_text(path.name, head):
                return None
            file.seek(0)
            sample = SampledLines(os.fstat(file.fileno()).st_size)
            for raw in _lines(file, sample.size, limit or SAMPLE_BYTES):
                sample.add(raw, text_field)
            return sample
    except (OSError, ValueError):
        return None


def other_format(path: Path, roots: Sequence[Path] = ()) -> str | None:
    """Return the format of a readable corpus that is not JSONL, else None."""
    try:
        with BufferedReader(open_regular_inside(path, roots)) as file:
            head = file.read(HEAD_BYTES)
    except (OSError, ValueError):
        return None
    if (compression := compression_of(head)) is not Compression.NONE:
        return str(compression)
    return "plain text" if head and is_plain_text(path.name, head) else None


def _lines(file: BinaryIO, size: int, limit: int) -> Iterator[bytes]:
    if size <= limit:
        yield from _whole_lines(file.read(limit), from_start=True, to_end=True)
        return
    block = limit // BLOCKS
    for number in range(BLOCKS):
        start = number * (size - block) // (BLOCKS - 1)
        file.seek(start)
        yield from _whole_lines(file.read(block), from_start=number == 0, to_end=number == BLOCKS - 1)


def _whole_lines(data: bytes, from_start: bool, to_end: bool) -> Iterator[bytes]:
    parts = data.split(b"\n")
    lines = [part + b"\n" for part in parts[:-1]] + ([parts[-1]] if parts[-1] else [])
    if not from_start:
        lines = lines[1:]
    if not to_end and lines and not lines[-1].endswith(b"\n"):
        lines = lines[:-1]
    yield from lines


def _value_of(raw: bytes) -> object:
    try:
        return json.loads(raw.removeprefix(BOM).decode())
    except (ValueError, RecursionError):
        return None


def _text_of(value: object, text_field: str) -> str | None:
    text = value.get(text_field) if isinstance(value, dict) else None
    return text if isinstance(text, str) and text and _is_text(text) else None


def _names_in(value: object) -> tuple[str, ...]:
    if not isinstance(value, dict):
        return ()
    names = (name for name, text in value.items() if isinstance(text, str) and name.isprintable())
    return tuple(name for name in names if len(name) <= MAX_NAME_LENGTH)[:MAX_NAMES]


def _is_text(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
