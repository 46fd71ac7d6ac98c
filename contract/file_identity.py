"""What form a corpus file has, by its first bytes and its name: the service looks into lines, the worker reads all.

And a sketch of a file: what tells it from another one at a cost that does not grow with it.
"""

import hashlib
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Self

PLAIN_TEXT = ".txt"
BOM = b"\xef\xbb\xbf"
BLANK = b" \t\r\n"
MAX_NAME_LENGTH, MAX_NAMES = 40, 5
"""Of the keys of a bad line that are listed as what may be its text field."""


class Compression(StrEnum):
    """What the first bytes of a file say it is."""

    NONE = "none"
    GZIP = "gzip"
    ZSTD = "zstd"
    PARQUET = "parquet"


MAGIC = {b"\x1f\x8b": Compression.GZIP, b"\x28\xb5\x2f\xfd": Compression.ZSTD, b"PAR1": Compression.PARQUET}


def compression_of(head: bytes) -> Compression:
    """What a file that begins with ``head`` is."""
    return next((packing for magic, packing in MAGIC.items() if head.startswith(magic)), Compression.NONE)


def is_plain_text(name: str, head: bytes) -> bool:
    """Whether documents are separated by blank lines, and not one a line; ``head`` is that of the unpacked text.

    By name, as no first byte tells text from broken JSON. But JSON objects, which some name .txt, begin as nothing
    else does.
    """
    unpacked = name.lower().removesuffix(".gz").removesuffix(".zst")
    return unpacked.endswith(PLAIN_TEXT) and not head.removeprefix(BOM).lstrip(BLANK).startswith(b'{"')


BLOCKS, BLOCK_BYTES = 64, 4096
"""So many blocks of a file are looked at for its sketch: the first, the last, and what lies evenly between them."""


@dataclass(frozen=True)
class FileFingerprint:
    """A file's size, and the sha256 of blocks of it. Times are no part of it: a copy is the same file.

    Two files of different sketches differ. Of two with the same one, only a full digest tells.
    """

    bytes: int
    sha256: str

    @classmethod
    def of(cls, path: Path) -> Self:
        """Look at a regular file, without waiting on anything else. Raises OSError."""
        # O_NONBLOCK: the open of a FIFO nobody writes to would otherwise never return.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            found = os.fstat(descriptor)
            if not stat.S_ISREG(found.st_mode):
                raise OSError(f"{path} is not a regular file")
            digest = hashlib.sha256()
            for start in _starts(found.st_size):
                digest.update(os.pread(descriptor, BLOCK_BYTES, start))
        finally:
            os.close(descriptor)
        return cls(found.st_size, digest.hexdigest())


def _starts(size: int) -> Iterator[int]:
    """Where the blocks begin; all of a small file is in them."""
    last = max(0, size - BLOCK_BYTES)
    if size <= BLOCKS * BLOCK_BYTES:
        yield from range(0, size, BLOCK_BYTES)
    else:
        yield from (last * number // (BLOCKS - 1) for number in range(BLOCKS))
