"""Appends events to ``events.jsonl``: one line an event, one write a line, strict JSON.

The training process never waits for anybody here. What a full disk refuses is kept in memory and written later.
"""

import os
import threading
from collections import deque
from pathlib import Path
from typing import Self

from trainyard.contract.events import Event

MAX_BUFFERED_LINES = 100_000
"""Lines kept while the disk takes none; beyond that the oldest are lost, and the run goes on."""


class EventWriter:
    """The outbox of one attempt, written by rank 0 alone, from any of its threads. Other ranks have a `Silent` one."""

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        self._unwritten: deque[bytes] = deque(maxlen=MAX_BUFFERED_LINES)
        self._lock = threading.Lock()
        self.seq = _recover(self._descriptor)

    def emit(self, event: Event) -> None:
        """Append ``event`` under the next ``seq``. Never raises for want of space."""
        with self._lock:
            self.seq += 1
            line = event.model_copy(update={"seq": self.seq}).model_dump_json(exclude_none=False)
            self._unwritten.append(line.encode() + b"\n")
            self._drain()

    def close(self) -> None:
        """Write what is left, as far as the disk allows."""
        with self._lock:
            self._drain()
            os.close(self._descriptor)

    def _drain(self) -> None:
        while self._unwritten and _append(self._descriptor, self._unwritten[0]):
            self._unwritten.popleft()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class NullEventWriter:
    """What ranks other than 0 say: nothing."""

    seq = 0

    def emit(self, event: Event) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Do nothing."""


AnyEventWriter = EventWriter | NullEventWriter


def _append(descriptor: int, line: bytes) -> bool:
    """Append a whole line or nothing of it; False where the disk refused."""
    before = os.fstat(descriptor).st_size
    try:
        if os.write(descriptor, line) == len(line):
            return True
    except OSError:
        pass
    # Half a line has no newline yet, so no reader took it for one.
    os.ftruncate(descriptor, before)
    return False


def _recover(descriptor: int) -> int:
    """The number of complete lines; a torn last one is cut off."""
    lines, whole, offset = 0, 0, 0
    while block := os.pread(descriptor, 1 << 20, offset):
        lines += block.count(b"\n")
        last = block.rfind(b"\n")
        whole = offset + last + 1 if last >= 0 else whole
        offset += len(block)
    os.ftruncate(descriptor, whole)
    return lines
