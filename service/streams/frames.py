"""Server-sent events as bytes. Pure. Source of the format: WHATWG HTML, section 9.2."""

import json
import re
from typing import Any

HELLO = b"retry: 2000\n: trainyard\n\n"
COMMENT = b": still here\n\n"
ID = re.compile(r"([0-9]{1,9})-([0-9]{1,15})")

Place = tuple[int, int]
"""(attempt, seq) of a metric, (attempt, offset) of a log: how far a reader is."""


def event(kind: str, data: Any, place: Place | None = None) -> bytes:
    """One event; ``place`` becomes its id, which a reader sends back to go on from there."""
    name = f"id: {place[0]}-{place[1]}\n" if place is not None else ""
    # JSON on one line: a data field ends with its line.
    return f"{name}event: {kind}\ndata: {json.dumps(data, allow_nan=False)}\n\n".encode()


def place_of(last_event_id: str) -> Place | None:
    """The place that an id names; None where it is none of ours."""
    match = ID.fullmatch(last_event_id)
    return (int(match.group(1)), int(match.group(2))) if match else None
