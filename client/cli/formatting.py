"""Numbers, times and tables as text for people. Standard library only."""

import re
import unicodedata
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from itertools import pairwise

from trainyard.contract.units import human_bytes

UNKNOWN = "-"
UNSAFE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
"""Control characters, characters that change the direction of text, and surrogates (bytes that were not UTF-8)."""

BLOCKS = "▁▂▃▄▅▆▇█"
GLYPHS = {
    "queued": "~",
    "preparing": "~",
    "starting": ">",
    "running": ">",
    "pausing": "|",
    "paused": "|",
    "cancelling": "x",
    "cancelled": "x",
    "interrupted": "!",
    "succeeded": "=",
    "failed": "!",
}


def count(value: float | None) -> str:
    """Return e.g. "12,400"."""
    return UNKNOWN if value is None else f"{value:,.0f}"


def compact_number(value: float | None) -> str:
    """Return e.g. "406 M" or "1.31 B": three digits, for counts of tokens or parameters."""
    if value is None:
        return UNKNOWN
    for size, unit in ((1e12, " T"), (1e9, " B"), (1e6, " M"), (1e3, " k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{unit}" if abs(value) < 1000 * size else f"{value / size:,.0f}{unit}"
    return f"{value:.0f}"


def size(value: float | None) -> str:
    """Return bytes as e.g. "2.3 GB"."""
    return UNKNOWN if value is None else human_bytes(value)


def fixed(value: float | None, digits: int = 3) -> str:
    """Return e.g. "2.913"."""
    return UNKNOWN if value is None else f"{value:.{digits}f}"


def scientific(value: float | None) -> str:
    """Return e.g. "2.61e-04"."""
    return UNKNOWN if value is None else f"{value:.2e}"


def duration(seconds: float | None) -> str:
    """Return e.g. "2 h 10 min", "3 min 20 s" or "28 s": the two largest units."""
    if seconds is None:
        return UNKNOWN
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return _two(whole // 60, "min", whole % 60, "s")
    if whole < 86400:
        return _two(whole // 3600, "h", whole % 3600 // 60, "min")
    return _two(whole // 86400, "d", whole % 86400 // 3600, "h")


def _two(first: int, first_unit: str, second: int, second_unit: str) -> str:
    return f"{first} {first_unit}" + (f" {second} {second_unit}" if second else "")


def local_time(text: str | None) -> datetime | None:
    """Return an API time as an aware datetime, or None if it is None or not valid."""
    try:
        time = datetime.fromisoformat(text or "")
    except ValueError:
        return None
    return time if time.tzinfo else time.replace(tzinfo=UTC)


def ago(text: str | None, now: datetime) -> str:
    """Return the age of an API time, e.g. "3 min ago", in whole minutes if it is a minute or more."""
    then = local_time(text)
    if then is None:
        return UNKNOWN
    seconds = (now - then).total_seconds()
    return f"{duration(seconds if seconds < 60 else seconds // 60 * 60)} ago"


def utc(now: datetime) -> str:
    """Return e.g. "2026-01-31T16:31:05Z"."""
    return now.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def status_word(status: str) -> str:
    """Return glyph and word, e.g. "> RUNNING", so that colour is never the only sign."""
    return f"{GLYPHS.get(status, '?')} {status.upper()}"


def bar(share: float | None, width: int) -> str:
    """Return e.g. ``####----``. A share outside 0..1 is clipped."""
    filled = round(width * min(1.0, max(0.0, share or 0.0)))
    return "#" * filled + "-" * (width - filled)


def sparkline(values: Sequence[float], width: int) -> str:
    """Return at most ``width`` blocks, each the mean of adjacent values, scaled from the minimum to the maximum."""
    buckets = min(width, len(values))
    edges = [index * len(values) // buckets for index in range(buckets + 1)] if buckets else []
    means = [sum(values[start:end]) / (end - start) for start, end in pairwise(edges)]
    if not means:
        return ""
    low, high = min(means), max(means)
    scale = (len(BLOCKS) - 1) / (high - low) if high > low else 0.0
    return "".join(BLOCKS[round((mean - low) * scale)] for mean in means)


def table(header: Sequence[str], rows: Iterable[Sequence[str]], right: frozenset[int] = frozenset()) -> list[str]:
    """Return lines with aligned columns, two spaces apart; the columns in ``right`` are aligned to the right."""
    lines = [list(header), *(list(row) for row in rows)]
    widths = [max(display_width(row[column]) for row in lines) for column in range(len(header))]
    return ["  ".join(_cells(row, widths, right)).rstrip() for row in lines]


def _cells(row: Sequence[str], widths: Sequence[int], right: frozenset[int]) -> list[str]:
    gaps = [" " * (width - display_width(cell)) for cell, width in zip(row, widths, strict=True)]
    return [
        gap + cell if index in right else cell + gap for index, (cell, gap) in enumerate(zip(row, gaps, strict=True))
    ]


def display_width(text: str) -> int:
    """Return the columns of a terminal that ``text`` takes: two for each Chinese character, none for an accent."""
    return sum(_character_width(character) for character in text)


def _character_width(character: str) -> int:
    if unicodedata.category(character) in ("Mn", "Me", "Cf"):
        return 0
    return 2 if unicodedata.east_asian_width(character) in ("W", "F") else 1


def one_line(text: str, width: int) -> str:
    """Return ``text`` as one line that takes at most ``width`` columns of a terminal, without control characters.

    Names and messages come from other users, so they must not control the terminal.
    """
    clean = "".join(character if character.isprintable() else " " for character in text)
    if display_width(clean) <= width:
        return clean
    kept, left = "", max(0, width - 3)
    for character in clean:
        left -= _character_width(character)
        if left < 0:
            break
        kept += character
    return kept + "..."[:width]


def safe(text: str) -> str:
    """Return ``text`` without control characters except line ends and tabs.

    `str.isprintable` cannot be used: it is False for most spaces, such as U+3000 in Chinese texts.
    """
    return UNSAFE.sub("\N{REPLACEMENT CHARACTER}", text)
