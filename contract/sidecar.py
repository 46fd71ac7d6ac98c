"""Messages between the service and its side processes, which run torch for the service.

A side process is connected to the service by a socket pair. Each message is a JSON object on one line. The end of the
stream means that the other side is gone: a side process then exits at once, so none outlives its service.
"""

import json
from typing import Any

SIDECAR = "TRAINYARD_SIDECAR"
"""Environment variable of every side process: the identity of the service that started it, as JSON."""

DESCRIPTOR = "TRAINYARD_SIDECAR_DESCRIPTOR"
"""Environment variable: the number of the open socket to the service."""

MAX_MESSAGE_BYTES = 16 << 20


def encode_message(message: dict[str, Any]) -> bytes:
    """Return the message as one line. Raises ValueError for NaN and infinity."""
    return json.dumps(message, allow_nan=False).encode() + b"\n"
