"""Lines of a log by their numbers, and a search through all of it, however long it is.

Of each file is remembered how many lines end before each of its blocks; a log only grows, so only what is new is read.
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
"""Bytes of a line that are sent; what is behind them is named by an ellipsis."""

MAX_BYTES = 1 << 20
"""Of lines, in one answer."""

MAX_BYTES_COUNTED = 4 << 30
"""Bytes that one look counts the lines of; the next one goes on."""

SEARCH_BLOCK = 1 << 20
MAX_BYTES_SEARCHED = 256 << 20
MAX_FILES_INDEXED = 64
ELLIPSIS = "…"


class Match(NamedTuple):
    """A line that has what was looked for; ``line`` counts from 1, ``offset`` is in bytes."""

    line: int
    offset: int
    text: str


@dataclass
class LineIndex:
    """``ended[i]`` lines end before byte ``i * BLOCK``, ``tail`` more behind; ``last``: the last whole block's end."""

    lines_before: list[int] = field(default_factory=lambda: [0])
    size: int = 0
    tail: int = 0
    last: bytes = NEWLINE

    @property
    def total(self) -> int:
        """Lines that are known, one without its end included."""
        return self.lines_before[-1] + self.tail

    def extend(self, file: BinaryIO, most: int = MAX_BYTES_COUNTED) -> None:
        """Count what was written since, at most ``most`` bytes of it."""
        size = os.fstat(file.fileno()).st_size
        if size < self.size:
            self.lines_before, self.size, self.tail, self.last = [0], 0, 0, NEWLINE
        if size == self.size:
            return
        file.seek((len(self.lines_before) - 1) * BLOCK)
        for _ in range(-(-most // BLOCK)):
            block = file.read(BLOCK)
            if len(block) < BLOCK:
                self._end_with(block)
                return
            self.lines_before.append(self.lines_before[-1] + block.count(NEWLINE))
            self.last = block[-1:]
        self.size, self.tail = (len(self.lines_before) - 1) * BLOCK, 0

    def _end_with(self, block: bytes) -> None:
        self.size = (len(self.lines_before) - 1) * BLOCK + len(block)
        # A line that was begun in an earlier block counts as well.
        begun = (block or self.last)[-1:] != NEWLINE
        self.tail = block.count(NEWLINE) + begun

    def start_of(self, file: BinaryIO, line: int) -> int:
        """The byte at which ``line`` begins, counted from 1; the end where there is no such line."""
        if line <= 1:
            return 0
        block = bisect_left(self.lines_before, line - 1) - 1
        return _after_newline(file, block * BLOCK, line - 1 - self.lines_before[block], self.size)


def _after_newline(file: BinaryIO, position: int, wanted: int, end: int) -> int:
    """Behind the newline number ``wanted`` from ``position`` on; ``end`` where there are fewer."""
    file.seek(position)
    while position < end and (block := file.read(BLOCK)):
        found = -1
        while wanted and (found := block.find(NEWLINE, found + 1)) >= 0:
            wanted -= 1
        if not wanted:
            return position + found + 1
        position += len(block)
    return end


class LineIndexCache:
    """The indexes of the logs that were read last."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._known: OrderedDict[tuple[str, int], tuple[LineIndex, threading.Lock]] = OrderedDict()

    def read(self, path: Path, first: int, count: int) -> tuple[list[str], LineIndex]:
        """At most ``count`` lines from number ``first`` on, and the index. Raises LogNotFound."""
        with open_log(path) as file:
            index, lock = self._entry(path, file)
            with lock:
                index.extend(file)
                return list(_lines(file, index, first, count)), index

    def search(self, path: Path, wanted: str, after: int, limit: int) -> tuple[list[Match], int, bool]:
        """(matches behind line ``after``, the last line that was looked at, whether that was the end of the log)."""
        with open_log(path) as file:
            index, lock = self._entry(path, file)
            with lock:
                index.extend(file)
                size, total = index.size, index.total
                start = index.start_of(file, after + 1)
            found = Search(file, wanted.encode().lower(), size)
            matches = found.run(start, after, limit)
            ended = found.position >= size
            return matches, max(after, total if ended else found.line), ended

    def _entry(self, path: Path, file: BinaryIO) -> tuple[LineIndex, threading.Lock]:
        key = str(path), os.fstat(file.fileno()).st_ino
        with self._lock:
            known = self._known.pop(key, None) or (LineIndex(), threading.Lock())
            self._known[key] = known
            while len(self._known) > MAX_FILES_INDEXED:
                self._known.popitem(last=False)
            return known


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
    """A line without its end, cut where it is too long."""
    text = line[:MAX_LINE_BYTES].decode(errors="ignore" if len(line) > MAX_LINE_BYTES else "replace").rstrip("\r\n")
    return text + ELLIPSIS if len(line.rstrip(NEWLINE)) > MAX_LINE_BYTES else text


@dataclass
class Search:
    """One look through a log from block to block. ``line`` lines lie before ``position``."""

    file: BinaryIO
    text: bytes
    size: int
    position: int = 0
    line: int = 0

    def run(self, start: int, line: int, limit: int) -> list[Match]:
        """The next ``limit`` lines that have it; ASCII letters match in either case."""
        self.position, self.line = start, line
        found: list[Match] = []
        while self.position < min(self.size, start + MAX_BYTES_SEARCHED) and len(found) < limit:
            self.file.seek(self.position)
            block = self.file.read(min(SEARCH_BLOCK, self.size - self.position))
            if not block:
                break
            whole = block.rfind(NEWLINE) + 1
            found += self._search_block(block[:whole] if whole else block, limit - len(found))
        return found

    def _search_block(self, block: bytes, limit: int) -> list[Match]:
        """Matches in a block of whole lines, or in the beginning of one that is longer; moves on behind them."""
        folded, found, at, line = block.lower(), list[Match](), 0, self.line
        while len(found) < limit and (hit := folded.find(self.text, at)) >= 0:
            begin = block.rfind(NEWLINE, 0, hit) + 1
            end = block.find(NEWLINE, hit) + 1 or len(block)
            line += block.count(NEWLINE, at, begin) + 1
            found.append(Match(line, self.position + begin, line_text(block[begin:end])))
            at = end
        behind = at if len(found) == limit else len(block)
        self.line = line + block.count(NEWLINE, at, behind)
        self.position += behind
        if not block.endswith(NEWLINE, 0, behind):
            self.line += at < behind
            self._skip_line()
        return found

    def _skip_line(self) -> None:
        """The rest of a line that is longer than a block is not looked through."""
        self.position = _after_newline(self.file, self.position, 1, self.size)
