"""uvicorn with request timeouts and a shutdown that closes streams first."""

import asyncio
import signal
from collections.abc import Callable
from types import FrameType
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

MAX_REQUEST_SECONDS = 15.0
"""Time for the head of a request, and for the rest of a body that was rejected before it was read.

Bodies that are read have their own deadline, see `service.api.middleware`.
"""

MAX_HEAD_BYTES = 64 << 10
"""Request line and headers together. h11 closes the connection if there is more."""


class TimeoutH11Protocol(H11Protocol):
    """Close a connection whose request head does not arrive in time, however slowly the bytes come."""

    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override] # as uvicorn has it
        super().connection_made(transport)
        self._start_timer()

    def data_received(self, data: bytes) -> None:
        if self._idle() and self._timer is None:
            self._start_timer()
        super().data_received(data)
        if not self._idle() and not self._discards_body():
            self._stop_timer()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        # uvicorn's keep-alive timer runs between two requests, but not while the rest of a rejected body arrives.
        self._stop_timer()
        if self._discards_body():
            self._start_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        super().connection_lost(exc)

    def _idle(self) -> bool:
        return self.conn.their_state is h11.IDLE

    def _discards_body(self) -> bool:
        """Return whether the response was sent before the body had arrived, so that the rest is thrown away."""
        return self.conn.our_state in (h11.DONE, h11.MUST_CLOSE) and self.conn.their_state is h11.SEND_BODY

    def _start_timer(self) -> None:
        self._timer = self.loop.call_later(MAX_REQUEST_SECONDS, self._on_timeout)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _on_timeout(self) -> None:
        self._timer = None
        if self._idle() or self._discards_body():
            self.transport.abort()


class GracefulServer(uvicorn.Server):
    """Calls ``on_exit`` at the first signal, so that open streams end and do not delay the shutdown."""

    def __init__(self, config: uvicorn.Config, on_exit: Callable[[], Any]) -> None:
        super().__init__(config)
        self._on_exit = on_exit

    def handle_exit(self, sig: int, _frame: FrameType | None) -> None:
        # Unlike uvicorn's own method this does not record the signal: uvicorn would raise it again after a clean
        # shutdown, and the exit status would be that of a killed process.
        self._on_exit()
        self.force_exit = self.should_exit and sig == signal.SIGINT
        self.should_exit = True
