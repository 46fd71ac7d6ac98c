"""What form a corpus file has, by its first bytes and its name: the service looks into lines, the worker reads all."""

from enum import StrEnum

PLAIN_TEXT = ".txt"
BOM = b"\xef\xbb\xbf"
BLANK = b" \t\r\n"


class Packing(StrEnum):
    """What the first bytes of a file say it is."""

    NONE = "none"
    GZIP = "gzip"
    ZSTD = "zstd"
    PARQUET = "parquet"


MAGIC = {b"\x1f\x8b": Packing.GZIP, b"\x28\xb5\x2f\xfd": Packing.ZSTD, b"PAR1": Packing.PARQUET}


def packing_of(head: bytes) -> Packing:
    """What a file that begins with ``head`` is."""
    return next((packing for magic, packing in MAGIC.items() if head.startswith(magic)), Packing.NONE)


def is_plain_text(name: str, head: bytes) -> bool:
    """Whether documents are separated by blank lines, and not one a line; ``head`` is that of the unpacked text.

    By name, as no first byte tells text from broken JSON. But JSON objects, which some name .txt, begin as nothing
    else does.
    """
    unpacked = name.lower().removesuffix(".gz").removesuffix(".zst")
    return unpacked.endswith(PLAIN_TEXT) and not head.removeprefix(BOM).lstrip(BLANK).startswith(b'{"')
