"""Encoding of server-sent events, and the response that sends a stream to one reader."""

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

KEEPALIVE_SECONDS = 15.0
STALL_SECONDS = 10.0
"""A reader that takes nothing for this long is disconnected; it can reconnect with its Last-Event-ID."""

Cursor = tuple[int, int]
"""A reader's position: (attempt, seq) of a metric, (attempt, offset) of a log."""

log = logging.getLogger("trainyard")


def event(kind: str, data: Any, cursor: Cursor | None = None) -> bytes:
    """Encode one event. ``cursor`` becomes its id, which a reader sends back to resume there."""
    event_id = f"id: {cursor[0]}-{cursor[1]}\n" if cursor is not None else ""
    # JSON on one line, because a newline ends the data field.
    return f"{event_id}event: {kind}\ndata: {json.dumps(data, allow_nan=False)}\n\n".encode()


def parse_last_event_id(last_event_id: str) -> Cursor | None:
    """Return the cursor of an event id, or None if the id is invalid."""
    match = ID.fullmatch(last_event_id)
    return (int(match.group(1)), int(match.group(2))) if match else None


class SseResponse(EventSourceResponse):
    """Sends ``chunks`` until they end, the reader disconnects, or it stops reading; then calls ``closed``.

    The chunks are encoded already, because many readers share them; FastAPI would encode them again for each reader
    (docs/decisions/0014).
    """

    def __init__(self, chunks: AsyncGenerator[bytes, None], closed: Callable[[], None], hello: bytes = HELLO) -> None:
        self._chunks = _with_keepalive(chunks, hello)
        self._closed = closed
        # A proxy that buffers responses would make the stream useless.
        super().__init__(self._chunks, headers={"X-Accel-Buffering": "no"})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        except TimeoutError:
            log.info("a reader of a stream did not read and was disconnected")
        finally:
            await self._chunks.aclose()
            self._closed()

    async def stream_response(self, send: Send) -> None:
        """Send the chunks. Raises TimeoutError if the reader does not take one in time."""

        async def send_in_time(message: Message) -> None:
            async with asyncio.timeout(STALL_SECONDS):
                await send(message)

        await super().stream_response(send_in_time)


async def _with_keepalive(chunks: AsyncGenerator[bytes, None], hello: bytes) -> AsyncGenerator[bytes, None]:
    """Add keep-alive comments. An empty chunk is not sent: it only gives a chance to send a comment."""
    async with contextlib.aclosing(chunks):
        yield hello
        last_comment = time.monotonic()
        async for chunk in chunks:
            if chunk:
                yield chunk
            if time.monotonic() - last_comment >= KEEPALIVE_SECONDS:
                last_comment = time.monotonic()
                yield KEEPALIVE
