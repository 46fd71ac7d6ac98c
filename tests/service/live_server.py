"""A rig's application on a real socket, and a reader of its streams that takes one event at a time."""

import asyncio
import contextlib
import json
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import uvicorn

from tests.service.harness import ServiceHarness
from trainyard.service.server import TimeoutH11Protocol

DEADLINE = 60.0


class ClosingServer(uvicorn.Server):
    """Leaves no connection open, so that no later test meets its ResourceWarning.

    uvicorn's own shutdown leaves two kinds open: a connection that a page opens after the shutdown began, and one whose
    client does not read what it was sent.
    """

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        await super().shutdown(sockets)
        for connection in list(self.server_state.connections):
            connection.transport.abort()
        await asyncio.sleep(0)  # the loop calls connection_lost in its next round


@contextlib.contextmanager
def served(rig: ServiceHarness) -> Iterator[tuple[str, int]]:
    """(host, port) where the application answers."""
    listener = socket.create_server(("127.0.0.1", 0))
    # The kernel would take megabytes for a reader that does not read.
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 32 << 10)
    config = uvicorn.Config(
        rig.app,
        http=TimeoutH11Protocol,
        lifespan="off",
        log_level="critical",
        access_log=False,
        timeout_graceful_shutdown=2,
        proxy_headers=False,
    )
    server = ClosingServer(config)
    thread = threading.Thread(target=server.run, args=([listener],))
    thread.start()
    deadline = time.monotonic() + DEADLINE
    while not server.started:
        assert time.monotonic() < deadline
        time.sleep(0.005)
    try:
        yield listener.getsockname()
    finally:
        rig.pulse.stop()
        server.should_exit = True
        thread.join(DEADLINE)
        listener.close()
    assert not thread.is_alive()


class Reader:
    """One stream over a socket of its own; a ``small`` one holds little that nobody has read."""

    def __init__(self, address: tuple[str, int], path: str, small: bool = False, **headers: str) -> None:
        self.socket = socket.socket()
        if small:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        self.socket.settimeout(DEADLINE)
        self.socket.connect(address)
        lines = [f"GET {path} HTTP/1.1", f"Host: 127.0.0.1:{address[1]}", *(f"{k}: {v}" for k, v in headers.items())]
        self.socket.sendall("\r\n".join([*lines, "", ""]).encode())
        self.file = self.socket.makefile("rb")
        self.status = int(self.file.readline().split()[1])
        self.headers = dict(self._head())

    def _head(self) -> Iterator[tuple[str, str]]:
        while line := self.file.readline().strip().decode():
            name, _, value = line.partition(": ")
            yield name.lower(), value

    def blocks(self) -> Iterator[list[str]]:
        """The lines of each event or comment, until the stream ends."""
        text = b""
        while size := int(self.file.readline() or b"0", 16):
            text += self.file.read(size)
            self.file.readline()
            while b"\n\n" in text:
                block, _, text = text.partition(b"\n\n")
                yield block.decode().split("\n")

    def events(self) -> Iterator[dict[str, Any]]:
        """``{id, event, data}`` of each event, without comments."""
        for block in self.blocks():
            fields = dict(line.split(": ", 1) for line in block if not line.startswith(":"))
            if "event" in fields:
                yield {**fields, "data": json.loads(fields["data"])}

    def take(self, count: int) -> list[dict[str, Any]]:
        """The next ``count`` events."""
        self.iterator = getattr(self, "iterator", None) or self.events()
        return [next(self.iterator) for _ in range(count)]

    def close(self) -> None:
        self.file.close()
        self.socket.close()
