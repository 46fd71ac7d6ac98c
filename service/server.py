"""uvicorn with request timeouts, a limit of connections, and a shutdown that closes streams first."""

import asyncio
import logging
import signal
import socket
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from trainyard.service import descriptors

log = logging.getLogger("trainyard")

MAX_REQUEST_SECONDS = 15.0
"""Time for the head of a request, and for the rest of a body that was rejected before it was read.

Bodies that are read have their own deadline, see `service.api.middleware`.
"""

MAX_HEAD_BYTES = 64 << 10
"""Request line and headers together. h11 closes the connection if there is more."""

LISTEN_BACKLOG = 512
"""Connections that the kernel keeps until they are accepted."""

ACCEPTS_PER_ROUND = 16
"""Maximum number of connections that the event loop accepts per round. The oldest are closed after each round."""


class TimeoutH11Protocol(H11Protocol):
    """Close a connection whose request head does not arrive in time, however slowly the bytes come.

    If there are too many connections, those that have waited longest for a request are closed.
    """

    _timer: asyncio.TimerHandle | None = None
    waiting_since = 0.0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override] # as uvicorn has it
        super().connection_made(transport)
        self.waiting_since = time.monotonic()
        self._start_timer()
        if len(self.connections) > descriptors.max_connections():
            self._make_room()

    def data_received(self, data: bytes) -> None:
        if self._idle() and self._timer is None:
            self._start_timer()
        super().data_received(data)
        if not self._idle() and not self._discards_body():
            self._stop_timer()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self.waiting_since = time.monotonic()
        # uvicorn's keep-alive timer runs between two requests, but not while the rest of a rejected body arrives.
        self._stop_timer()
        if self._discards_body():
            self._start_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        super().connection_lost(exc)

    def _make_room(self) -> None:
        """Close the connections that have waited longest for a complete request head, or this one if there is none."""
        descriptors.warn("connections without a request are closed to make room for others")
        others = (other for other in self.connections if isinstance(other, TimeoutH11Protocol) and other is not self)
        waiting = sorted((other for other in others if other.waits()), key=lambda other: other.waiting_since)
        # Several at once, so that a flood of connections does not sort them all again for each one.
        for oldest in waiting[: 1 + len(waiting) // 16] or [self]:
            oldest.transport.abort()

    def waits(self) -> bool:
        """Return whether no complete request head has arrived."""
        return (self._idle() or self._discards_body()) and not self.transport.is_closing()

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
    """Ends after the first signal.

    ``before_exit`` runs first, in a thread, while requests are answered as usual; a second signal ends the server
    without waiting for it. ``on_exit`` is called at the end, so that open streams close and do not delay the shutdown.
    """

    def __init__(
        self, config: uvicorn.Config, on_exit: Callable[[], Any], before_exit: Callable[[], Any] | None = None
    ) -> None:
        super().__init__(config)
        self._on_exit = on_exit
        self._before_exit = before_exit
        self._signal: signal.Signals | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        asyncio.get_running_loop().set_exception_handler(_log_loop_error)
        await super().startup(sockets)
        for listener in sockets or ():
            # asyncio accepts as many connections at once as it was given as the backlog. The kernel may hold more.
            listener.listen(LISTEN_BACKLOG)

    def handle_exit(self, sig: int, _frame: FrameType | None) -> None:
        # Unlike uvicorn's own method this does not record the signal: uvicorn would raise it again after a clean
        # shutdown, and the exit status would be that of a killed process. Nothing is logged and no thread is started
        # here: the signal may have come in the middle of either.
        is_first, self._signal = self._signal is None, signal.Signals(sig)
        if is_first and self.started and self._before_exit is not None:
            return
        self._on_exit()
        self.force_exit = self.should_exit and sig == signal.SIGINT
        self.should_exit = True

    async def on_tick(self, counter: int) -> bool:
        if self._signal is not None and self._before_exit is not None:
            work, self._before_exit = self._before_exit, None
            threading.Thread(target=self._work_and_exit, args=(work,), name="before-exit", daemon=True).start()
        return await super().on_tick(counter)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        log.info("stopping", extra={"signal": self._signal.name if self._signal is not None else None})
        await super().shutdown(sockets)

    def _work_and_exit(self, work: Callable[[], Any]) -> None:
        try:
            work()
        except Exception:
            log.exception("the work before the end failed")
        self._on_exit()
        self.should_exit = True


def _log_loop_error(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    # asyncio reports each connection that it could not accept with a traceback, hundreds of times a second.
    if descriptors.is_exhausted(context.get("exception")):
        descriptors.warn("new connections wait")
    else:
        loop.default_exception_handler(context)
