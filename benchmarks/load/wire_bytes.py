"""HTTP/1.1 on a bare socket, kept open: a client that costs next to nothing of the cores it measures on."""

import json
import socket
import time
from typing import Any, Self
from urllib.parse import urlsplit

IDLE_SECONDS = 10.0
"""A connection that nobody used for longer may be hung up by the service at the very moment it is used."""


class Wire:
    """One connection; one request at a time."""

    def __init__(self, url: str, token: str | None = None) -> None:
        parts = urlsplit(url)
        assert parts.hostname is not None
        self._address = parts.hostname, parts.port or 80
        head = [f"Host: {parts.netloc}", "Content-Type: application/json"]
        self._head = "\r\n".join(head + ([f"Authorization: Bearer {token}"] if token else []))
        self._socket: socket.socket | None = None
        self._rest = b""
        self._used_at = 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def ask(self, method: str, path: str, body: object = None) -> tuple[int, bytes]:
        """(status, body). Raises OSError where the connection breaks; the next request makes another."""
        try:
            return self._ask(method, path, b"" if body is None else json.dumps(body).encode())
        except OSError:
            self.close()
            raise

    def json(self, method: str, path: str, body: object = None) -> Any:
        """The answer's JSON. Raises AssertionError where the service says no."""
        status, data = self.ask(method, path, body)
        assert status < 300, (status, data[:500])
        return json.loads(data)

    def _ask(self, method: str, path: str, body: bytes) -> tuple[int, bytes]:
        if time.monotonic() - self._used_at > IDLE_SECONDS:
            self.close()
        self._used_at = time.monotonic()
        if self._socket is None:
            self._socket = socket.create_connection(self._address, timeout=60)
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._rest = b""
        lines = f"{method} {path} HTTP/1.1\r\n{self._head}\r\nContent-Length: {len(body)}\r\n\r\n"
        self._socket.sendall(lines.encode() + body)
        head = self._until(b"\r\n\r\n").decode("latin-1").lower()
        length = int(head.partition("content-length: ")[2].partition("\r\n")[0] or 0)
        while len(self._rest) < length:
            self._more()
        data, self._rest = self._rest[:length], self._rest[length:]
        return int(head.split(" ", 2)[1]), data

    def _until(self, mark: bytes) -> bytes:
        while mark not in self._rest:
            self._more()
        found, _, self._rest = self._rest.partition(mark)
        return found + b"\r\n"

    def _more(self) -> None:
        assert self._socket is not None
        data = self._socket.recv(1 << 16)
        if not data:
            raise ConnectionResetError("the service hung up")
        self._rest += data

    def close(self) -> None:
        """Hang up."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None
