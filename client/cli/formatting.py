"""Numbers, times and tables as people read them. Pure; standard library only."""

from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from itertools import pairwise

from trainyard.contract.units import human_bytes

UNKNOWN = "-"
BLOCKS = "▁▂▃▄▅▆▇█"
GLYPHS = {
    "queued": "~",
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
    """12,400."""
    return UNKNOWN if value is None else f"{value:,.0f}"


def compact_number(value: float | None) -> str:
    """406 M, 1.31 B: three digits are enough for a count of tokens or parameters."""
    if value is None:
        return UNKNOWN
    for size, unit in ((1e12, " T"), (1e9, " B"), (1e6, " M"), (1e3, " k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{unit}" if abs(value) < 1000 * size else f"{value / size:,.0f}{unit}"
    return f"{value:.0f}"


def size(value: float | None) -> str:
    """Bytes: 2.3 GB."""
    return UNKNOWN if value is None else human_bytes(value)


def fixed(value: float | None, digits: int = 3) -> str:
    """2.913."""
    return UNKNOWN if value is None else f"{value:.{digits}f}"


def scientific(value: float | None) -> str:
    """2.61e-04."""
    return UNKNOWN if value is None else f"{value:.2e}"


def duration(seconds: float | None) -> str:
    """2 h 10 min, 3 min 20 s, 28 s: the two largest units."""
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
    """An API time as an aware datetime; None where it is unknown or no time."""
    try:
        found = datetime.fromisoformat(text or "")
    except ValueError:
        return None
    return found if found.tzinfo else found.replace(tzinfo=UTC)


def ago(text: str | None, now: datetime) -> str:
    """How long ago an API time was: "3 min ago"; past a minute nobody counts seconds."""
    then = local_time(text)
    if then is None:
        return UNKNOWN
    seconds = (now - then).total_seconds()
    return f"{duration(seconds if seconds < 60 else seconds // 60 * 60)} ago"


def utc(now: datetime) -> str:
    """2026-01-31T16:31:05Z."""
    return now.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def status_word(status: str) -> str:
    """Glyph and word, never colour alone: "> RUNNING"."""
    return f"{GLYPHS.get(status, '?')} {status.upper()}"


def bar(share: float | None, width: int) -> str:
    """``####----``; a share outside 0..1 is clipped."""
    filled = round(width * min(1.0, max(0.0, share or 0.0)))
    return "#" * filled + "-" * (width - filled)


def sparkline(values: Sequence[float], width: int) -> str:
    """The values as ``width`` blocks at most, each the mean of its stretch, scaled from the least to the greatest."""
    means = _means(values, width)
    if not means:
        return ""
    low, high = min(means), max(means)
    scale = (len(BLOCKS) - 1) / (high - low) if high > low else 0.0
    return "".join(BLOCKS[round((mean - low) * scale)] for mean in means)


def _means(values: Sequence[float], width: int) -> list[float]:
    buckets = min(width, len(values))
    edges = [index * len(values) // buckets for index in range(buckets + 1)] if buckets else []
    stretches = [values[start:end] for start, end in pairwise(edges)]
    return [sum(stretch) / len(stretch) for stretch in stretches]


def table(header: Sequence[str], rows: Iterable[Sequence[str]], right: frozenset[int] = frozenset()) -> list[str]:
    """Aligned columns, two spaces apart; the columns in ``right`` are aligned to the right."""
    everything = [list(header), *(list(row) for row in rows)]
    widths = [max(len(row[column]) for row in everything) for column in range(len(header))]
    return ["  ".join(_cells(row, widths, right)).rstrip() for row in everything]


def _cells(row: Sequence[str], widths: Sequence[int], right: frozenset[int]) -> list[str]:
    cells = zip(row, widths, strict=True)
    return [cell.rjust(width) if index in right else cell.ljust(width) for index, (cell, width) in enumerate(cells)]


def one_line(text: str, width: int) -> str:
    """``text`` as one line of at most ``width`` characters without control characters.

    Names and messages come from others: a terminal must not obey what is in them.
    """
    clean = "".join(character if character.isprintable() else " " for character in text)
    return clean if len(clean) <= width else clean[: max(0, width - 3)] + "..."[:width]


def safe(text: str) -> str:
    """``text`` with its lines and tabs, and without anything else a terminal would obey."""
    return "".join(
        character if character.isprintable() or character in "\n\t" else "\N{REPLACEMENT CHARACTER}"
        for character in text
    )
