"""Read parts of log files, with bounded memory however long a file is."""

import os
from pathlib import Path
from typing import BinaryIO

from trainyard.contract.rundir import AttemptDir
from trainyard.service.errors import LogNotFound

BLOCK = 64 << 10
MAX_CHUNK = 1 << 20
NEWLINE = b"\n"
MAX_CHARACTER_BYTES = 4
SHORT_LINE = 1024
"""If the limit of a tail cuts a line, the rest of it is left out if it is shorter than this."""


def log_file(attempt: AttemptDir, rank: int | None) -> Path:
    """Return the path of a rank's log; None: the agent's."""
    return attempt.agent_log if rank is None else attempt.rank_log(rank)


def read_from(path: Path, offset: int, limit: int) -> tuple[str, int]:
    """Return the text of at most ``limit`` bytes from ``offset``, and the next offset. Never splits a character."""
    with open_log(path) as file:
        file.seek(offset)
        data = file.read(limit)
        ended = len(data) < limit
    whole = data if ended else _whole_characters(data)
    return whole.decode(errors="replace"), offset + len(whole)


def read_growing(path: Path, offset: int, limit: int, last: bool) -> tuple[str, int]:
    """Like `read_from`, but of a log that is being written: an incomplete character waits for its rest.

    ``last``: nothing more will be written.
    """
    with open_log(path) as file:
        file.seek(offset)
        data = file.read(limit)
    whole = data if last else _whole_characters(data)
    if not last and len(data) < MAX_CHARACTER_BYTES and _begins_character(data):
        whole = b""
    return whole.decode(errors="replace"), offset + len(whole)


def start_of_tail(path: Path, lines: int, limit: int) -> int:
    """Return the offset of the last ``lines`` lines, or of as many as fit into ``limit`` bytes."""
    with open_log(path) as file:
        end = file.seek(0, os.SEEK_END)
        return _start_of_tail(file, end, lines, max(0, end - limit))


def read_tail(path: Path, lines: int, limit: int) -> tuple[str, int]:
    """Return the last ``lines`` lines, at most ``limit`` bytes of them, and the next offset.

    If the limit cuts a long line, the end of that line comes first.
    """
    with open_log(path) as file:
        end = file.seek(0, os.SEEK_END)
        start = _start_of_tail(file, end, lines, max(0, end - limit))
        file.seek(start)
        data = file.read(end - start)
    return data.decode(errors="replace"), start + len(data)


def _start_of_tail(file: BinaryIO, end: int, lines: int, lowest: int) -> int:
    position = end
    while position > lowest:
        size = min(BLOCK, position - lowest)
        position -= size
        file.seek(position)
        block = file.read(size)
        # The newline that ends the last line does not begin another one.
        search_end = size - 1 if position + size == end else size
        while (newline := block.rfind(NEWLINE, 0, search_end)) >= 0:
            lines -= 1
            if lines == 0:
                return position + newline + 1
            search_end = newline
    return lowest if lowest == 0 else _start_of_cut(file, lowest, end)


def _start_of_cut(file: BinaryIO, position: int, end: int) -> int:
    # Start at the next line. If this line is long, start at its first whole character: it may be the whole tail.
    file.seek(position)
    block = file.read(min(SHORT_LINE, end - position))
    newline = block.find(NEWLINE)
    if 0 <= newline < end - position - 1:
        return position + newline + 1
    return position + next((i for i, byte in enumerate(block[:MAX_CHARACTER_BYTES]) if byte & 0xC0 != 0x80), 0)


def open_log(path: Path) -> BinaryIO:
    """Open a log for reading. Raises LogNotFound."""
    try:
        return path.open("rb")
    except (OSError, ValueError):
        raise LogNotFound() from None


def _begins_character(data: bytes) -> bool:
    # True if all of `data` is the start of one UTF-8 character.
    return len(data) > 0 and data[0] >= 0xC0 and _character_bytes(data[0]) > len(data)


def _character_bytes(first: int) -> int:
    return 2 if first < 0xE0 else 3 if first < 0xF0 else 4


def _whole_characters(data: bytes) -> bytes:
    # Without an incomplete UTF-8 character at the end.
    for back in range(1, min(4, len(data)) + 1):
        byte = data[-back]
        if byte >= 0xC0:
            return data[:-back] if _character_bytes(byte) > back and back < len(data) else data
        if byte < 0x80:
            return data
    return data
