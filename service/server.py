"""The server around the application: what HTTP itself needs and uvicorn has not."""

import asyncio
import signal
from collections.abc import Callable
from types import FrameType
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

MAX_REQUEST_SECONDS = 15.0
"""From the first to the last byte of a request's head, and from an early answer to the end of the body that it refused.

Bodies that are read have a deadline of their own.
"""

MAX_HEAD_BYTES = 64 << 10
"""Request line and headers together; beyond that the connection is refused before anything is read of it."""


class TimeoutH11Protocol(H11Protocol):
    """A connection that must say what it wants in time: one that sends a byte now and then is closed."""

    _deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override] # as uvicorn has it
        """The first request may come."""
        super().connection_made(transport)
        self._expect()

    def data_received(self, data: bytes) -> None:
        """Bytes came; where they begin a request the clock runs until its head is whole."""
        if self._idle() and self._deadline is None:
            self._expect()
        super().data_received(data)
        if not self._idle() and not self._answered_early():
            self._forget()

    def on_response_complete(self) -> None:
        """Between two requests the keep-alive timer counts; a body that was refused must end in time all the same."""
        super().on_response_complete()
        self._forget()
        if self._answered_early():
            self._expect()

    def connection_lost(self, exc: Exception | None) -> None:
        """It is over."""
        self._forget()
        super().connection_lost(exc)

    def _idle(self) -> bool:
        """Whether no request is being answered."""
        return self.conn.their_state is h11.IDLE

    def _answered_early(self) -> bool:
        """Whether the answer is out and the request's body still comes, of which nobody reads any more."""
        return self.conn.our_state in (h11.DONE, h11.MUST_CLOSE) and self.conn.their_state is h11.SEND_BODY

    def _expect(self) -> None:
        self._deadline = self.loop.call_later(MAX_REQUEST_SECONDS, self._late)

    def _forget(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _late(self) -> None:
        self._deadline = None
        if self._idle() or self._answered_early():
            self.transport.abort()


class GracefulServer(uvicorn.Server):
    """Says at the first signal that it is ending: streams would keep it waiting."""

    def __init__(self, config: uvicorn.Config, ending: Callable[[], Any]) -> None:
        super().__init__(config)
        self._ending = ending

    def handle_exit(self, sig: int, _frame: FrameType | None) -> None:
        """SIGTERM or SIGINT came. uvicorn would raise it once more at the end: a clean end is no death by signal."""
        self._ending()
        self.force_exit = self.should_exit and sig == signal.SIGINT
        self.should_exit = True
