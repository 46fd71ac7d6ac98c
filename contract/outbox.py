"""Reading an attempt's outbox while it is being written. Standard library only."""

import json
from pathlib import Path
from typing import Any

CHUNK = 1 << 20


class OutboxReader:
    """Complete lines of one ``events.jsonl``, each once, in order. ``seq`` is the line's number, from 1.

    The worker appends and may die in the middle of a line: what stands behind the last newline is not a line yet.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.seq = 0
        self._offset = 0

    def read(self, limit: int) -> list[dict[str, Any]]:
        """The next lines, at most ``limit``; [] where there is no complete one yet.

        A line that is not a JSON object comes as ``{"kind": "unreadable"}``, so that it is neither lost nor in the way.
        """
        found = []
        for raw in self._complete_lines(limit):
            self.seq += 1
            self._offset += len(raw)
            found.append({**_parse(raw), "seq": self.seq})
        return found

    def seek_after(self, seq: int) -> None:
        """Make the next `read` begin behind line ``seq``: the last one that is known to be stored."""
        if seq < self.seq:
            self.seq, self._offset = 0, 0
        while self.seq < seq:
            skipped = self._complete_lines(seq - self.seq)
            if not skipped:
                return
            self.seq += len(skipped)
            self._offset += sum(map(len, skipped))

    def skip_to_end(self) -> int:
        """The number of complete lines."""
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


def _refuse(word: str) -> None:
    raise ValueError(f"{word} is not JSON")


def _parse(raw: bytes) -> dict[str, Any]:
    try:
        value = json.loads(raw, parse_constant=_refuse)
    except (ValueError, RecursionError):
        value = None
    return value if isinstance(value, dict) else {"kind": "unreadable", "bytes": len(raw)}
