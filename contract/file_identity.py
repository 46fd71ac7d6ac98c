"""The format of a corpus file, detected from its first bytes and its name, and a cheap fingerprint of a file."""

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, Self

from trainyard.contract.allowed_paths import open_regular_inside

PLAIN_TEXT = ".txt"
BOM = b"\xef\xbb\xbf"
BLANK = b" \t\r\n"
MAX_NAME_LENGTH, MAX_NAMES = 40, 5
"""Limits for the keys of an invalid line that a message lists as possible text fields."""


class Compression(StrEnum):
    """Compression or container format of a corpus file."""

    NONE = "none"
    GZIP = "gzip"
    ZSTD = "zstd"
    PARQUET = "parquet"


MAGIC = {b"\x1f\x8b": Compression.GZIP, b"\x28\xb5\x2f\xfd": Compression.ZSTD, b"PAR1": Compression.PARQUET}


def compression_of(head: bytes) -> Compression:
    """Return the format of a file that begins with ``head``."""
    return next((compression for magic, compression in MAGIC.items() if head.startswith(magic)), Compression.NONE)


def is_plain_text(name: str, head: bytes) -> bool:
    """Return whether a file is plain text, with documents separated by blank lines, and not JSONL.

    The name decides, because the first bytes cannot distinguish text from broken JSON. But a file named .txt that
    begins with a JSON object is JSONL. ``head``: the first bytes, decompressed.
    """
    unpacked = name.lower().removesuffix(".gz").removesuffix(".zst")
    return unpacked.endswith(PLAIN_TEXT) and not head.removeprefix(BOM).lstrip(BLANK).startswith(b'{"')


BLOCKS, BLOCK_BYTES = 64, 4096
"""Number and size of the blocks that a fingerprint reads: the first, the last, and evenly spaced ones in between."""


@dataclass(frozen=True)
class FileFingerprint:
    """The size of a file, and the sha256 of some blocks of it, at a cost that does not grow with the file.

    Files with different fingerprints differ. Files with the same one may differ: only a full digest proves equality.
    Times are not included, so a copy has the same fingerprint.
    """

    bytes: int
    sha256: str

    @classmethod
    def of(cls, path: Path, roots: Sequence[Path] = (), blocks: int = BLOCKS) -> Self:
        """Read the fingerprint of a regular file, from up to ``blocks`` blocks. Raises OSError.

        If ``roots`` are given, the file must be below one of them.
        """
        with open_regular_inside(path, roots) as file:
            size, digest = os.fstat(file.fileno()).st_size, hashlib.sha256()
            for start in _block_starts(size, blocks):
                digest.update(os.pread(file.fileno(), BLOCK_BYTES, start))
        return cls(size, digest.hexdigest())


def _block_starts(size: int, blocks: int) -> Iterator[int]:
    last = max(0, size - BLOCK_BYTES)
    if size <= blocks * BLOCK_BYTES:
        yield from range(0, size, BLOCK_BYTES)
    else:
        yield from (last * number // (blocks - 1) for number in range(blocks))


def input_changes(before: Mapping[str, Any], after: Mapping[str, FileFingerprint]) -> list[str]:
    """Return how files differ from those of ``before``, which was stored as JSON. A file in only one is left out."""
    changes = []
    for name in sorted(before.keys() & after.keys()):
        now, size = after[name], before[name]["bytes"]
        if asdict(now) != before[name]:
            same = "another content of the same size"
            changes.append(f"{name} ({same if now.bytes == size else f'{size:,} bytes then, {now.bytes:,} now'})")
    return changes
