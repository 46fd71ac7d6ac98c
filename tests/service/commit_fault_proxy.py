"""A proxy in front of Postgres that cuts a connection at COMMIT: before the database hears it, or once it is done."""

import contextlib
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from sqlalchemy.engine import make_url

COMMIT = b"Q\x00\x00\x00\x0bCOMMIT\x00"
"""The message as the protocol has it, and psycopg sends it."""

When = Literal["before", "after"]


class CommitFaultProxy:
    """`cut` arms it for the next COMMIT of any connection; ``cuts`` counts those it has cut."""

    def __init__(self, database: Path, listening: Path) -> None:
        self._database = database
        self._armed: When | None = None
        self._lock = threading.Lock()
        self.cuts = 0
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(listening))
        self._listener.listen(64)
        self._thread = threading.Thread(target=self._accept, daemon=True)
        self._thread.start()

    def cut(self, when: When) -> None:
        with self._lock:
            self._armed = when

    def disarm(self) -> None:
        with self._lock:
            self._armed = None

    def close(self) -> None:
        # A thread that waits in accept is not woken by a close.
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join(10)

    def _accept(self) -> None:
        while True:
            try:
                client = self._listener.accept()[0]
            except OSError:
                return
            line = Line(client, socket.socket(socket.AF_UNIX))
            line.server.connect(str(self._database))
            threading.Thread(target=self._ask, args=(line,), daemon=True).start()
            threading.Thread(target=line.answer, daemon=True).start()

    def _ask(self, line: "Line") -> None:
        with contextlib.suppress(OSError):
            while data := line.client.recv(65536):
                when = self._due(data)
                if when is not None:
                    line.cut(data, when)
                    break
                line.server.sendall(data)
        line.leave()

    def _due(self, data: bytes) -> When | None:
        with self._lock:
            if COMMIT not in data or self._armed is None:
                return None
            when, self._armed = self._armed, None
            self.cuts += 1
            return when


class Line:
    """One connection of the service, and ours to the database."""

    def __init__(self, client: socket.socket, server: socket.socket) -> None:
        self.client, self.server = client, server
        self._dropped = False
        self._over = threading.Event()
        self._lock = threading.Lock()
        self._left = 0

    def answer(self) -> None:
        """What the database says, as long as anybody is to hear it."""
        with contextlib.suppress(OSError):
            while data := self.server.recv(65536):
                if not self._dropped:
                    self.client.sendall(data)
        self._over.set()
        self.leave()

    def cut(self, data: bytes, when: When) -> None:
        """The service hears no answer. ``after``: it notices only once the database has done what it was sent."""
        self._dropped = True
        if when == "after":
            self.server.sendall(data)
            self.server.shutdown(socket.SHUT_WR)
            assert self._over.wait(60), "Postgres ends a session whose other side has gone"

    def leave(self) -> None:
        """One direction has ended, so that the other one will; the last of the two tidies up."""
        with self._lock:
            self._left += 1
            for end in (self.client, self.server):
                with contextlib.suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)
                if self._left == 2:
                    end.close()


@contextlib.contextmanager
def commit_fault_proxy(url: str, folder: Path) -> Iterator[tuple[str, CommitFaultProxy]]:
    """(URL of the same database behind a proxy, the proxy)."""
    parsed = make_url(url)
    host, port = str(parsed.query["host"]), parsed.port or 5432
    cutter = CommitFaultProxy(Path(host) / f".s.PGSQL.{port}", folder / f".s.PGSQL.{port}")
    try:
        yield parsed.update_query_dict({"host": str(folder)}).render_as_string(hide_password=False), cutter
    finally:
        cutter.close()
