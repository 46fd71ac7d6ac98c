"""The response that sends a stream to one reader, and drops a reader that does not read."""

import asyncio
import contextlib
import json
import logging
import re
import time
from collections.abc import AsyncGenerator, Callable
from typing import Any

from fastapi.sse import EventSourceResponse
from starlette.types import Message, Receive, Scope, Send

HELLO = b"retry: 2000\n: trainyard\n\n"

KEEPALIVE = b": still here\n\n"

ID = re.compile(r"([0-9]{1,9})-([0-9]{1,15})")

Cursor = tuple[int, int]

"""How far a reader is: (attempt, seq) of a metric, (attempt, offset) of a log."""


def event(kind: str, data: Any, place: Cursor | None = None) -> bytes:
    """Return one event. ``place`` becomes its id, which a reader sends back to resume there."""
    name = f"id: {place[0]}-{place[1]}\n" if place is not None else ""
    # JSON on one line: a data field ends with its line.
    return f"{name}event: {kind}\ndata: {json.dumps(data, allow_nan=False)}\n\n".encode()


def parse_last_event_id(last_event_id: str) -> Cursor | None:
    """Return the place that an id stands for, or None if the id is not one of ours."""
    match = ID.fullmatch(last_event_id)
    return (int(match.group(1)), int(match.group(2))) if match else None


KEEPALIVE_SECONDS = 15.0

STALL_SECONDS = 10.0

"""A reader that takes nothing for so long is dropped; it can come back with its Last-Event-ID."""

log = logging.getLogger("trainyard")


class SseResponse(EventSourceResponse):
    """Ends with ``pieces``, or if the reader leaves or does not read; ``closed`` is called in every case.

    The events come encoded: many readers share the bytes, which FastAPI's own encoding of a generator would make again
    for each of them (docs/decisions/0014).
    """

    def __init__(self, pieces: AsyncGenerator[bytes, None], closed: Callable[[], None]) -> None:
        self._pieces = _with_keepalive(pieces)
        self._closed = closed
        # A proxy that buffers responses would make the stream useless.
        super().__init__(self._pieces, headers={"X-Accel-Buffering": "no"})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send until the first of the three."""
        try:
            await super().__call__(scope, receive, send)
        except TimeoutError:
            log.info("a reader of a stream did not read and was dropped")
        finally:
            await self._pieces.aclose()
            self._closed()

    async def stream_response(self, send: Send) -> None:
        """Send the pieces. Raises TimeoutError if the reader does not take one in time."""

        async def send_in_time(message: Message) -> None:
            async with asyncio.timeout(STALL_SECONDS):
                await send(message)

        await super().stream_response(send_in_time)


async def _with_keepalive(pieces: AsyncGenerator[bytes, None]) -> AsyncGenerator[bytes, None]:
    """Add what keeps the connection open. An empty piece is not sent: it only lets a comment come in between."""
    async with contextlib.aclosing(pieces):
        yield HELLO
        last_comment = time.monotonic()
        async for piece in pieces:
            if piece:
                yield piece
            if time.monotonic() - last_comment >= KEEPALIVE_SECONDS:
                last_comment = time.monotonic()
                yield KEEPALIVE
