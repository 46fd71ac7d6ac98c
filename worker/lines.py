"""A JSONL file, line by line: which lines are documents, which are not and why. Constant memory."""

import hashlib
import io
import json
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn, Self

MAX_LINE_BYTES = 8 << 20
"""A longer line is a bad line: one document is held in memory together with its tokens."""

KEPT_BAD_LINES = 20
"""How many bad lines are named; all are counted."""

BOM = b"\xef\xbb\xbf"
BLANK = b" \t\r\n"


class DataInvalid(ValueError):
    """The corpus cannot be trained on; the message says which file and lines, why, and what to do."""


class BadLine(ValueError):
    """One line is no document; the message says why."""


@dataclass(frozen=True)
class Document:
    """The text of one line, which counts from 1."""

    line: int
    text: str


@dataclass
class Tally:
    """What was found so far. ``named`` holds (line number, why) of the first bad lines."""

    lines: int = 0
    blank_lines: int = 0
    bad_lines: int = 0
    documents: int = 0
    named: list[tuple[int, str]] = field(default_factory=list)

    def add_bad(self, line: int, why: str) -> None:
        """Count a bad line, and name it if few were."""
        self.bad_lines += 1
        self.named = sorted([*self.named, (line, why)])[:KEPT_BAD_LINES]

    def describe_bad(self) -> str:
        """``2 bad lines: line 3: not JSON; line 7: not UTF-8``."""
        listed = "; ".join(f"line {line}: {why}" for line, why in self.named)
        more = self.bad_lines - len(self.named)
        noun = "bad line" if self.bad_lines == 1 else "bad lines"
        return f"{self.bad_lines:,} {noun}: {listed}" + (f"; and {more:,} more" if more else "")

    def why_empty(self, text_field: str) -> str:
        """Why there is nothing to train on, and what to do."""
        if self.bad_lines:
            return f"holds no text under {text_field!r}: {self.describe_bad()}"
        return f'holds no document: it needs one JSON object a line, such as {{"{text_field}": "..."}}'


class LineReader:
    """An open JSONL file that is read once, at most to the size it had when it was opened.

    ``tally`` and ``digest`` (sha256 of what was read) are complete once `documents` has been read to its end; ``done``
    of ``size`` bytes are read.
    Raises DataInvalid at once for anything that is not a readable regular file of UTF-8 text.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.tally = Tally()
        self._hash = hashlib.sha256()
        self._file = open_regular(path)
        self._before = os.fstat(self._file.fileno())
        self.done = 0
        self.size = self._before.st_size

    @property
    def digest(self) -> str:
        """sha256 of the bytes read so far."""
        return self._hash.hexdigest()

    def documents(self, text_field: str) -> Iterator[Document]:
        """Each document in order; everything else is counted in ``tally``. DataInvalid where the file changes."""
        for number, raw in enumerate(self._raw_lines(), start=1):
            self.tally.lines = number
            if raw is not None and not raw.strip(BLANK):
                self.tally.blank_lines += 1
                continue
            try:
                text = text_of(raw, text_field)
            except BadLine as bad:
                self.tally.add_bad(number, str(bad))
                continue
            self.tally.documents += 1
            yield Document(number, text)
        self._require_unchanged()

    def _raw_lines(self) -> Iterator[bytes | None]:
        """Lines without a byte order mark; None for one that is too long."""
        while block := self._read(MAX_LINE_BYTES):
            if self.done == len(block):
                block = block.removeprefix(BOM)
            if len(block) < MAX_LINE_BYTES or block.endswith(b"\n"):
                yield block
            else:
                self._skip_line()
                yield None

    def _skip_line(self) -> None:
        while (block := self._read(MAX_LINE_BYTES)) and not block.endswith(b"\n"):
            pass

    def _read(self, limit: int) -> bytes:
        block = self._file.readline(min(limit, self.size - self.done))
        self._hash.update(block)
        self.done += len(block)
        return block

    def _require_unchanged(self) -> None:
        after = os.fstat(self._file.fileno())
        same = (after.st_size, after.st_mtime_ns) == (self._before.st_size, self._before.st_mtime_ns)
        if not same or self.done != self.size:
            refuse_changed(self.path)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


def refuse_changed(path: Path) -> NoReturn:
    """Raise the DataInvalid of a file that is still being written."""
    raise DataInvalid(f"{path} changed while it was read: wait until it is complete, then start again")


def open_regular(path: Path) -> io.BufferedReader:
    """Open a regular file of UTF-8 text to read. Raises DataInvalid for anything else, without waiting on it."""
    try:
        # O_NONBLOCK: the open of a FIFO nobody writes to would otherwise never return.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise DataInvalid(f"{path} cannot be read: {error.strerror or error}") from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise DataInvalid(f"{path} is not a regular file: give a JSONL file, one document a line")
    file: io.BufferedReader = io.BufferedReader(io.FileIO(descriptor), 1 << 20)
    try:
        _require_utf8(path, file.peek(4096)[:4096])
    except (DataInvalid, OSError):
        file.close()
        raise
    return file


def _require_utf8(path: Path, head: bytes) -> None:
    marked = head.startswith((b"\xff\xfe", b"\xfe\xff"))
    # JSON never holds a raw NUL, and in UTF-16 about every second byte of it is one.
    if marked or head.count(0) > len(head) // 4:
        raise DataInvalid(f"{path} is UTF-16 or binary: save it as UTF-8, one JSON object a line")


def text_of(raw: bytes | None, text_field: str) -> str:
    """The text of one raw line. Raises BadLine with the reason."""
    if raw is None:
        raise BadLine(f"longer than {MAX_LINE_BYTES >> 20} MiB")
    value = _parsed(raw)
    if not isinstance(value, dict):
        raise BadLine(f"not a JSON object but {_kind(value)}")
    if text_field not in value:
        raise BadLine(f"no {text_field!r} in the object")
    text = value[text_field]
    if not isinstance(text, str):
        raise BadLine(f"{text_field!r} is not a string but {_kind(text)}")
    if not text:
        raise BadLine(f"{text_field!r} is empty")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise BadLine(f"{text_field!r} holds a lone surrogate, which is no text") from None
    return text


def _parsed(raw: bytes) -> Any:
    try:
        return json.loads(raw.decode(), parse_constant=_no_constant)
    except UnicodeDecodeError as error:
        raise BadLine(f"not UTF-8 at byte {error.start + 1}") from None
    except json.JSONDecodeError as error:
        raise BadLine(f"not JSON at character {error.pos + 1}") from None
    except RecursionError:
        raise BadLine("nested too deep") from None
    except BadLine:
        raise
    except ValueError:
        # Python reads no integer of more than 4,300 digits.
        raise BadLine("holds a number with too many digits") from None


def _no_constant(name: str) -> NoReturn:
    raise BadLine(f"not JSON: holds {name}")


def _kind(value: object) -> str:
    names = {type(None): "null", bool: "a boolean", str: "a string", list: "a list", dict: "an object"}
    return names.get(type(value), "a number")
