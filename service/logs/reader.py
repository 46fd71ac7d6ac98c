"""Pieces of log files: bounded in memory however long the file is."""

import os
from pathlib import Path
from typing import BinaryIO

from trainyard.contract.rundir import AttemptDir
from trainyard.service.errors import LogNotFound

BLOCK = 64 << 10
MAX_CHUNK = 1 << 20
NEWLINE = b"\n"
MAX_CHARACTER_BYTES = 4


def log_file(attempt: AttemptDir, rank: int | None) -> Path:
    """A rank's log; None: the agent's."""
    return attempt.agent_log if rank is None else attempt.rank_log(rank)


def read_from(path: Path, offset: int, limit: int) -> tuple[str, int]:
    """At most ``limit`` bytes from ``offset``, and where to go on. A character is never cut in two."""
    with open_log(path) as file:
        file.seek(offset)
        data = file.read(limit)
        ended = len(data) < limit
    whole = data if ended else _whole_characters(data)
    return whole.decode(errors="replace"), offset + len(whole)


def read_growing(path: Path, offset: int, limit: int, last: bool) -> tuple[str, int]:
    """As `read_from`, of a log that is being written: a character whose rest is still to come waits for it."""
    with open_log(path) as file:
        file.seek(offset)
        data = file.read(limit)
    whole = data if last else _whole_characters(data)
    if not last and len(data) < MAX_CHARACTER_BYTES and _begins_character(data):
        whole = b""
    return whole.decode(errors="replace"), offset + len(whole)


def start_of_tail(path: Path, lines: int, limit: int) -> int:
    """Where the last ``lines`` lines begin, or as many of them as ``limit`` bytes hold."""
    with open_log(path) as file:
        end = file.seek(0, os.SEEK_END)
        return _start_of_tail(file, end, lines, max(0, end - limit))


def read_tail(path: Path, lines: int, limit: int) -> tuple[str, int]:
    """The last ``lines`` lines, at most ``limit`` bytes of them, and where to go on."""
    with open_log(path) as file:
        end = file.seek(0, os.SEEK_END)
        start = _start_of_tail(file, end, lines, max(0, end - limit))
        file.seek(start)
        data = file.read(end - start)
    return data.decode(errors="replace"), start + len(data)


def _start_of_tail(file: BinaryIO, end: int, lines: int, lowest: int) -> int:
    """Walk back block by block until enough newlines are behind."""
    position, wanted = end, lines
    while position > lowest:
        size = min(BLOCK, position - lowest)
        position -= size
        file.seek(position)
        block = file.read(size)
        # The newline that ends the last line does not begin another one.
        search_end = size - 1 if position + size == end else size
        while (found := block.rfind(NEWLINE, 0, search_end)) >= 0:
            wanted -= 1
            if wanted == 0:
                return position + found + 1
            search_end = found
    return lowest if lowest == 0 else _next_line(file, lowest, end)


def _next_line(file: BinaryIO, position: int, end: int) -> int:
    file.seek(position)
    found = file.read(min(BLOCK, end - position)).find(NEWLINE)
    return position + found + 1 if 0 <= found < end - position - 1 else position


def open_log(path: Path) -> BinaryIO:
    """A log for reading. Raises LogNotFound."""
    try:
        return path.open("rb")
    except (OSError, ValueError):
        raise LogNotFound() from None


def _begins_character(data: bytes) -> bool:
    """Whether all of it is the beginning of one character."""
    return len(data) > 0 and data[0] >= 0xC0 and _character_bytes(data[0]) > len(data)


def _character_bytes(first: int) -> int:
    """How many bytes a character has that begins so."""
    return 2 if first < 0xE0 else 3 if first < 0xF0 else 4


def _whole_characters(data: bytes) -> bytes:
    """Without the first bytes of a character whose rest is not here."""
    for back in range(1, min(4, len(data)) + 1):
        byte = data[-back]
        if byte >= 0xC0:
            return data[:-back] if _character_bytes(byte) > back and back < len(data) else data
        if byte < 0x80:
            return data
    return data
