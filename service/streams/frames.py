"""Server-sent events as bytes. Pure. Source of the format: WHATWG HTML, section 9.2."""

import json
import re
from typing import Any

HELLO = b"retry: 2000\n: trainyard\n\n"
COMMENT = b": still here\n\n"
ID = re.compile(r"([0-9]{1,9})-([0-9]{1,15})")

Place = tuple[int, int]
"""How far a reader is: (attempt, seq) of a metric, (attempt, offset) of a log."""


def event(kind: str, data: Any, place: Place | None = None) -> bytes:
    """Return one event. ``place`` becomes its id, which a reader sends back to resume there."""
    name = f"id: {place[0]}-{place[1]}\n" if place is not None else ""
    # JSON on one line: a data field ends with its line.
    return f"{name}event: {kind}\ndata: {json.dumps(data, allow_nan=False)}\n\n".encode()


def place_of(last_event_id: str) -> Place | None:
    """Return the place that an id stands for, or None if the id is not one of ours."""
    match = ID.fullmatch(last_event_id)
    return (int(match.group(1)), int(match.group(2))) if match else None
