"""Read a log's lines by number and search it, however long it is.

An index counts the lines that end before each block of a file. A log only grows, so only its new part is read.
"""

import os
import threading
from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, NamedTuple

from trainyard.service.logs.reader import BLOCK, NEWLINE, open_log

MAX_LINE_BYTES = 4096
"""Bytes of a line that are sent; an ellipsis stands for the rest."""

MAX_BYTES = 1 << 20
"""Bytes of lines in one response."""

MAX_BYTES_COUNTED = 4 << 30
"""Bytes that one request indexes; the next request continues."""

SEARCH_BLOCK = 1 << 20
MAX_BYTES_SEARCHED = 256 << 20
MAX_FILES_INDEXED = 64
ELLIPSIS = "…"


class Match(NamedTuple):
    """A line with the text searched for; ``line`` counts from 1, ``offset`` is in bytes."""

    line: int
    offset: int
    text: str


@dataclass
class LineIndex:
    """``lines_before[i]`` lines end before byte ``i * BLOCK``, and ``tail`` more after the last whole block.

    ``last``: the last byte of the last whole block.
    """

    lines_before: list[int] = field(default_factory=lambda: [0])
    size: int = 0
    tail: int = 0
    last: bytes = NEWLINE

    @property
    def total(self) -> int:
        """The number of lines indexed, including one without its newline."""
        return self.lines_before[-1] + self.tail

    def extend(self, file: BinaryIO, max_bytes: int = MAX_BYTES_COUNTED) -> None:
        """Index what was written since the last call, at most ``max_bytes`` of it."""
        size = os.fstat(file.fileno()).st_size
        if size < self.size:  # truncated: start again
            self.lines_before, self.size, self.tail, self.last = [0], 0, 0, NEWLINE
        if size == self.size:
            return
        file.seek((len(self.lines_before) - 1) * BLOCK)
        for _ in range(-(-max_bytes // BLOCK)):
            block = file.read(BLOCK)
            if len(block) < BLOCK:
                self._end_with(block)
                return
            self.lines_before.append(self.lines_before[-1] + block.count(NEWLINE))
            self.last = block[-1:]
        self.size, self.tail = (len(self.lines_before) - 1) * BLOCK, 0

    def _end_with(self, block: bytes) -> None:
        self.size = (len(self.lines_before) - 1) * BLOCK + len(block)
        # A line that began in an earlier block counts as well.
        has_open_line = (block or self.last)[-1:] != NEWLINE
        self.tail = block.count(NEWLINE) + has_open_line

    def start_of(self, file: BinaryIO, line: int) -> int:
        """Return the offset in bytes of ``line``, counted from 1, or the file's size if there is no such line."""
        if line <= 1:
            return 0
        block = bisect_left(self.lines_before, line - 1) - 1
        return _after_newline(file, block * BLOCK, line - 1 - self.lines_before[block], self.size)


def _after_newline(file: BinaryIO, position: int, count: int, end: int) -> int:
    """Return the offset after the ``count``-th newline from ``position`` on, or ``end`` if there are fewer."""
    file.seek(position)
    while position < end and (block := file.read(BLOCK)):
        newline = -1
        while count and (newline := block.find(NEWLINE, newline + 1)) >= 0:
            count -= 1
        if not count:
            return position + newline + 1
        position += len(block)
    return end


class LineIndexCache:
    """The indexes of the most recently read logs. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._entries: OrderedDict[tuple[str, int], tuple[LineIndex, threading.Lock]] = OrderedDict()

    def read(self, path: Path, first: int, count: int) -> tuple[list[str], LineIndex]:
        """Return at most ``count`` lines from number ``first`` on, and the index. Raises LogNotFound."""
        with open_log(path) as file:
            index, lock = self._entry(path, file)
            with lock:
                index.extend(file)
                return list(_lines(file, index, first, count)), index

    def search(self, path: Path, text: str, after: int, limit: int) -> tuple[list[Match], int, bool]:
        """Return the matches after line ``after``, the last line searched, and whether that is the log's end."""
        with open_log(path) as file:
            index, lock = self._entry(path, file)
            with lock:
                index.extend(file)
                size, total = index.size, index.total
                start = index.start_of(file, after + 1)
            search = Search(file, text.encode().lower(), size)
            matches = search.run(start, after, limit)
            ended = search.position >= size
            return matches, max(after, total if ended else search.line), ended

    def _entry(self, path: Path, file: BinaryIO) -> tuple[LineIndex, threading.Lock]:
        key = str(path), os.fstat(file.fileno()).st_ino
        with self._lock:
            entry = self._entries.pop(key, None) or (LineIndex(), threading.Lock())
            self._entries[key] = entry
            while len(self._entries) > MAX_FILES_INDEXED:
                self._entries.popitem(last=False)
            return entry


def _lines(file: BinaryIO, index: LineIndex, first: int, count: int) -> Iterator[str]:
    last, sent = min(first + count - 1, index.total), 0
    file.seek(index.start_of(file, first))
    for number in range(first, last + 1):
        line = file.readline(MAX_LINE_BYTES + 1)
        sent += len(line)
        yield line_text(line)
        if sent > MAX_BYTES:
            return
        if not line.endswith(NEWLINE):
            file.seek(index.start_of(file, number + 1))


def line_text(line: bytes) -> str:
    """Return a line as text without its newline, cut if it is too long."""
    text = line[:MAX_LINE_BYTES].decode(errors="ignore" if len(line) > MAX_LINE_BYTES else "replace").rstrip("\r\n")
    return text + ELLIPSIS if len(line.rstrip(NEWLINE)) > MAX_LINE_BYTES else text


@dataclass
class Search:
    """A search through a log, block by block. ``line`` lines end before ``position``."""

    file: BinaryIO
    text: bytes
    size: int
    position: int = 0
    line: int = 0

    def run(self, start: int, line: int, limit: int) -> list[Match]:
        """Return the next ``limit`` matching lines; ASCII letters match in either case."""
        self.position, self.line = start, line
        matches: list[Match] = []
        while self.position < min(self.size, start + MAX_BYTES_SEARCHED) and len(matches) < limit:
            self.file.seek(self.position)
            block = self.file.read(min(SEARCH_BLOCK, self.size - self.position))
            if not block:
                break
            whole = block.rfind(NEWLINE) + 1
            matches += self._search_block(block[:whole] if whole else block, limit - len(matches))
        return matches

    def _search_block(self, block: bytes, limit: int) -> list[Match]:
        """Search a block of whole lines, or the beginning of a longer line, and advance."""
        folded, matches, at, line = block.lower(), list[Match](), 0, self.line
        while len(matches) < limit and (hit := folded.find(self.text, at)) >= 0:
            begin = block.rfind(NEWLINE, 0, hit) + 1
            end = block.find(NEWLINE, hit) + 1 or len(block)
            line += block.count(NEWLINE, at, begin) + 1
            matches.append(Match(line, self.position + begin, line_text(block[begin:end])))
            at = end
        end = at if len(matches) == limit else len(block)
        self.line = line + block.count(NEWLINE, at, end)
        self.position += end
        if not block.endswith(NEWLINE, 0, end):
            # The rest of a line that is longer than a block is not searched.
            self.line += at < end
            self.position = _after_newline(self.file, self.position, 1, self.size)
        return matches
