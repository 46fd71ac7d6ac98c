"""A reader of an attempt's outbox that works while it is being written. Standard library only."""

import json
from pathlib import Path
from typing import Any

CHUNK = 1 << 20


class OutboxReader:
    """Reads the complete lines of an ``events.jsonl`` once, in order. ``seq`` is the line number, from 1.

    The worker may die in the middle of a line, so the text after the last newline is no line yet.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.seq = 0
        self._offset = 0
        self._stored = (0, 0)

    def read(self, limit: int) -> list[dict[str, Any]]:
        """Return the next complete lines, at most ``limit``.

        A line that is not a JSON object is returned as ``{"kind": "unreadable"}``, so that it blocks no later line.
        """
        events = []
        for raw in self._complete_lines(limit):
            self.seq += 1
            self._offset += len(raw)
            events.append({**_parse(raw), "seq": self.seq})
        return events

    def seek_after(self, seq: int) -> None:
        """Make the next `read` start after line ``seq``, the last one that is known to be stored."""
        if seq < self.seq:
            # The service has not stored all lines that were read. Start at the last stored line, not at the first: the
            # file may be long, and while the service is down this happens at each retry.
            self.seq, self._offset = self._stored if self._stored[0] <= seq else (0, 0)
        while self.seq < seq:
            skipped = self._complete_lines(seq - self.seq)
            if not skipped:
                return
            self.seq += len(skipped)
            self._offset += sum(map(len, skipped))
        self._stored = (self.seq, self._offset)

    def skip_to_end(self) -> int:
        """Skip all complete lines and return their number."""
        while lines := self._complete_lines(100_000):
            self.seq += len(lines)
            self._offset += sum(map(len, lines))
        return self.seq

    def _complete_lines(self, limit: int) -> list[bytes]:
        try:
            with self.path.open("rb") as file:
                file.seek(self._offset)
                block = file.read(CHUNK)
                while b"\n" not in block and (more := file.read(CHUNK)):
                    block += more
        except FileNotFoundError:
            return []
        return block[: block.rfind(b"\n") + 1].splitlines(keepends=True)[:limit]


def _reject_constant(word: str) -> None:
    raise ValueError(f"{word} is not JSON")


def _parse(raw: bytes) -> dict[str, Any]:
    try:
        value = json.loads(raw, parse_constant=_reject_constant)
    except (ValueError, RecursionError):
        value = None
    return value if isinstance(value, dict) else {"kind": "unreadable", "bytes": len(raw)}
