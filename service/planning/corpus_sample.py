"""A bounded look at a corpus: at most 4 MiB of it are read, however long it is."""

import json
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from trainyard.contract.file_identity import (
    BLANK,
    BOM,
    MAX_NAME_LENGTH,
    MAX_NAMES,
    Compression,
    compression_of,
    is_plain_text,
)

HEAD_BYTES = 4096
SAMPLE_BYTES = 4 << 20
BLOCKS = 16


@dataclass
class SampledLines:
    """What the lines that were looked at hold.

    Attributes:
        size: bytes of the whole file.
        seen: bytes of the lines that were looked at; ``size`` where that is all of it.
        texts: the documents.
        bad_lines: lines that are neither blank nor a document.
        names: where the first of those is an object, the names under which it has texts.
    """

    size: int
    seen: int = 0
    texts: list[str] = field(default_factory=list)
    bad_lines: int = 0
    names: tuple[str, ...] = ()

    @property
    def whole(self) -> bool:
        """Whether nothing was left out, so that counts are no estimates."""
        return self.seen == self.size

    @property
    def scale(self) -> float:
        """Counts of the whole file are those of the sample times this; 0 where no whole line was seen."""
        return self.size / self.seen if self.seen else 0.0

    def add(self, raw: bytes, text_field: str) -> None:
        """Take one line in, with its end."""
        self.seen += len(raw)
        if not raw.strip(BLANK):
            return
        value = _value_of(raw)
        text = _text_of(value, text_field)
        if text is None:
            self.names = self.names if self.bad_lines else _names_in(value)
            self.bad_lines += 1
        else:
            self.texts.append(text)


def sample_lines(path: Path, text_field: str) -> SampledLines | None:
    """Look at the file. A short one is read whole, a long one in equal distances.

    None where it cannot be read, or is not JSONL: a part of a packed file says nothing of the rest.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with os.fdopen(descriptor, "rb") as file:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                return None
            head = file.read(HEAD_BYTES)
            if compression_of(head) is not Compression.NONE or is_plain_text(path.name, head):
                return None
            file.seek(0)
            found = SampledLines(os.fstat(descriptor).st_size)
            for raw in _lines(file, found.size):
                found.add(raw, text_field)
            return found
    except (OSError, ValueError):
        return None


def other_format(path: Path) -> str | None:
    """What form a readable corpus has that is not JSONL; else None."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with os.fdopen(descriptor, "rb") as file:
            head = file.read(HEAD_BYTES) if stat.S_ISREG(os.fstat(descriptor).st_mode) else b""
    except (OSError, ValueError):
        return None
    if (packing := compression_of(head)) is not Compression.NONE:
        return str(packing)
    return "plain text" if head and is_plain_text(path.name, head) else None


def _lines(file: BinaryIO, size: int) -> Iterator[bytes]:
    if size <= SAMPLE_BYTES:
        yield from _whole_lines(file.read(SAMPLE_BYTES), from_start=True, to_end=True)
        return
    block = SAMPLE_BYTES // BLOCKS
    for number in range(BLOCKS):
        start = number * (size - block) // (BLOCKS - 1)
        file.seek(start)
        yield from _whole_lines(file.read(block), from_start=number == 0, to_end=number == BLOCKS - 1)


def _whole_lines(data: bytes, from_start: bool, to_end: bool) -> Iterator[bytes]:
    """The lines that begin and end in ``data``."""
    parts = data.split(b"\n")
    lines = [part + b"\n" for part in parts[:-1]] + ([parts[-1]] if parts[-1] else [])
    if not from_start:
        lines = lines[1:]
    if not to_end and lines and not lines[-1].endswith(b"\n"):
        lines = lines[:-1]
    yield from lines


def _value_of(raw: bytes) -> object:
    """What the line holds; None where it is no JSON."""
    try:
        return json.loads(raw.removeprefix(BOM).decode())
    except (ValueError, RecursionError):
        return None


def _text_of(value: object, text_field: str) -> str | None:
    """The text of a line, or None where it is no document."""
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
