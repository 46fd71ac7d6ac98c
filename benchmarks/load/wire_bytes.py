"""HTTP/1.1 on a bare socket, kept open: a client that takes almost no processor time from the service it measures."""

import json
import socket
import time
from typing import Any, Self
from urllib.parse import urlsplit

IDLE_SECONDS = 10.0
"""An idle connection is replaced after this time: the service might close it at the moment it is used."""


class Wire:
    """One connection; one request at a time. With ``polls``, a GET sends the tag of the last response to it."""

    def __init__(self, url: str, token: str | None = None, polls: bool = False) -> None:
        parts = urlsplit(url)
        assert parts.hostname is not None
        self._address = parts.hostname, parts.port or 80
        head = [f"Host: {parts.netloc}", "Content-Type: application/json"]
        self._head = "\r\n".join(head + ([f"Authorization: Bearer {token}"] if token else []))
        self._socket: socket.socket | None = None
        self._rest = b""
        self._used_at = 0.0
        self._polls = polls
        self._tagged: dict[str, tuple[str, bytes]] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def request(self, method: str, path: str, body: object = None) -> tuple[int, bytes]:
        """Send a request; return (status, body). Raises OSError if the connection breaks."""
        try:
            return self._send(method, path, b"" if body is None else json.dumps(body).encode())
        except OSError:
            self.close()
            raise

    def json(self, method: str, path: str, body: object = None) -> Any:
        """Send a request; return the answer's JSON. Raises AssertionError on an error status."""
        status, data = self.request(method, path, body)
        assert status < 300, (status, data[:500])
        return json.loads(data)

    def _send(self, method: str, path: str, body: bytes) -> tuple[int, bytes]:
        if time.monotonic() - self._used_at > IDLE_SECONDS:
            self.close()
        self._used_at = time.monotonic()
        if self._socket is None:
            self._socket = socket.create_connection(self._address, timeout=60)
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._rest = b""
        tag, known = self._tagged.get(path, ("", b"")) if method == "GET" else ("", b"")
        condition = f"If-None-Match: {tag}\r\n" if tag else ""
        lines = f"{method} {path} HTTP/1.1\r\n{self._head}\r\n{condition}Content-Length: {len(body)}\r\n\r\n"
        self._socket.sendall(lines.encode() + body)
        head = self._read_until(b"\r\n\r\n").decode("latin-1").lower()
        status = int(head.split(" ", 2)[1])
        if status == 304:
            return 200, known
        length = int(head.partition("content-length: ")[2].partition("\r\n")[0] or 0)
        while len(self._rest) < length:
            self._receive()
        data, self._rest = self._rest[:length], self._rest[length:]
        tag = head.partition("\r\netag: ")[2].partition("\r\n")[0]
        if self._polls and method == "GET" and tag:
            self._tagged[path] = tag, data
        return status, data

    def _read_until(self, mark: bytes) -> bytes:
        while mark not in self._rest:
            self._receive()
        head, _, self._rest = self._rest.partition(mark)
        return head + b"\r\n"

    def _receive(self) -> None:
        assert self._socket is not None
        data = self._socket.recv(1 << 16)
        if not data:
            raise ConnectionResetError("the service closed the connection")
        self._rest += data

    def close(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None
