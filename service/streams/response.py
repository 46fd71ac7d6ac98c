"""Sends a stream to one reader, and gives it up when it does not read."""

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Callable

from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from service.streams.frames import COMMENT, HELLO

COMMENT_SECONDS = 15.0
STALL_SECONDS = 10.0
"""A reader that takes nothing for so long is dropped, and comes back with its Last-Event-ID if it still lives."""

log = logging.getLogger("trainyard")


class EventStream(Response):
    """Ends with ``pieces``, or when the reader goes, or does not read; ``closed`` is called whatever it was."""

    media_type = "text/event-stream"

    def __init__(self, pieces: AsyncGenerator[bytes, None], closed: Callable[[], None]) -> None:
        super().__init__()
        self._pieces = pieces
        self._closed = closed
        del self.headers["content-length"]
        # Proxies that collect answers before they pass them on would make the stream useless.
        self.headers["x-accel-buffering"] = "no"

    async def __call__(self, _scope: Scope, receive: Receive, send: Send) -> None:
        """Send until the first of the three."""
        pump = asyncio.ensure_future(self._pump(send))
        gone = asyncio.ensure_future(_gone(receive))
        try:
            await asyncio.wait({pump, gone}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            gone.cancel()
            pump.cancel()
            ended, _ = await asyncio.gather(pump, gone, return_exceptions=True)
            await self._pieces.aclose()
            self._closed()
        if isinstance(ended, TimeoutError):
            log.info("a reader of a stream did not read and was dropped")
        elif isinstance(ended, Exception):
            raise ended

    async def _pump(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        await _sent(send, HELLO)
        said = time.monotonic()
        async for piece in self._pieces:
            if piece:
                await _sent(send, piece)
            if time.monotonic() - said >= COMMENT_SECONDS:
                said = time.monotonic()
                await _sent(send, COMMENT)
        await _sent(send, b"", more=False)


async def _sent(send: Send, body: bytes, more: bool = True) -> None:
    message: Message = {"type": "http.response.body", "body": body, "more_body": more}
    async with asyncio.timeout(STALL_SECONDS):
        await send(message)


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
