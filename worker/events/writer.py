"""Append events to ``events.jsonl``: one event per line, one write per line, strict JSON.

Training never waits for another process here. Lines that a full disk rejects are buffered and written later.
"""

import os
import threading
from collections import deque
from pathlib import Path
from typing import Self

from trainyard.contract.events import Event

MAX_BUFFERED_LINES = 100_000
"""Lines buffered while the disk is full. Beyond it the oldest are lost, and training continues."""


class EventWriter:
    """Writes the outbox of one attempt. Only rank 0 has one, and any of its threads may use it."""

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        self._buffer: deque[bytes] = deque(maxlen=MAX_BUFFERED_LINES)
        self._lock = threading.Lock()
        self._torn_at: int | None = None
        self.seq = _truncate_torn_line(self._descriptor)

    def emit(self, event: Event) -> None:
        """Append ``event`` with the next ``seq``. A full or unreachable disk raises no error."""
        with self._lock:
            self.seq += 1
            line = event.model_copy(update={"seq": self.seq}).model_dump_json(exclude_none=False)
            self._buffer.append(line.encode() + b"\n")
            self._drain()

    def close(self) -> None:
        """Write the buffered lines, if the disk allows it, and close the file."""
        with self._lock:
            self._drain()
            os.close(self._descriptor)

    def _drain(self) -> None:
        while self._buffer and self._append(self._buffer[0]):
            self._buffer.popleft()

    def _append(self, line: bytes) -> bool:
        """Append the whole line or nothing; return False if the disk rejected it."""
        try:
            if self._torn_at is not None:
                # Half a line has no newline yet, so no reader has used it.
                os.ftruncate(self._descriptor, self._torn_at)
            self._torn_at = os.fstat(self._descriptor).st_size
            if os.write(self._descriptor, line) < len(line):
                os.ftruncate(self._descriptor, self._torn_at)
                return False
        except OSError:
            return False
        self._torn_at = None
        return True

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class NullEventWriter:
    """The writer of all ranks but 0: it discards events."""

    seq = 0

    def emit(self, event: Event) -> None:
        pass

    def close(self) -> None:
        pass


AnyEventWriter = EventWriter | NullEventWriter


def _truncate_torn_line(descriptor: int) -> int:
    """Remove an incomplete last line; return the number of lines."""
    lines, end, offset = 0, 0, 0
    while block := os.pread(descriptor, 1 << 20, offset):
        lines += block.count(b"\n")
        last = block.rfind(b"\n")
        end = offset + last + 1 if last >= 0 else end
        offset += len(block)
    os.ftruncate(descriptor, end)
    return lines
