"""200 readers of a stream, 50 of whom stopped reading: how late the others hear, and what memory the 50 cost."""

import json
import selectors
import socket
import tempfile
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from urllib.parse import urlsplit

from benchmarks.load import live
from benchmarks.load.live import Agent
from benchmarks.load.tables import Figure, quantile
from benchmarks.load.wire_bytes import Wire
from benchmarks.running import served, until

READERS = 200
STALLED = 50
SECONDS = 30.0
PER_SECOND = 20


def measure() -> Iterator[Figure]:
    """One job whose agent tells twenty points a second, one by one."""
    with tempfile.TemporaryDirectory() as folder:
        home, corpus = Path(folder) / "home", Path(folder) / "corpus.jsonl"
        corpus.write_text('{"text": "one"}\n')
        with live.database(home) as made:
            agent = live.running(made, corpus, 1)[0]
        with served(home, Path(folder), arguments=["--no-scheduler"]) as service, Wire(service.url) as wire:
            audience = Audience(service.url, agent.job_id)
            until(lambda: b"trainyard_streams 200" in wire.ask("GET", "/metrics")[1], 60)
            _tell(service.url, agent, 2.0)
            before = service.memory_bytes
            _tell(service.url, agent, SECONDS)
            time.sleep(2.0)  # what is late still comes
            grown = service.memory_bytes - before
            late, least = audience.close()
    yield Figure(f"{READERS} readers, {STALLED} stalled: delay of the others, p99", 1000 * quantile(late, 0.99), "ms")
    yield Figure(f"{READERS} readers, {STALLED} stalled: delay of the others, worst", 1000 * max(late), "ms", 1000)
    yield Figure("points that the one who heard least has missed", len(agent.outbox) - least, "", 0.5)
    yield Figure("memory that they add", grown / (1 << 20), "MiB", 16)


def _tell(url: str, agent: Agent, seconds: float) -> None:
    begin = time.monotonic()
    with Wire(url, agent.token) as wire:
        for number in range(int(seconds * PER_SECOND)):
            time.sleep(max(0.0, begin + number / PER_SECOND - time.monotonic()))
            agent.metric()
            agent.ship(wire)


class Audience:
    """All readers in one thread. The stalled ones have small buffers and take nothing after the head."""

    def __init__(self, url: str, job_id: str) -> None:
        self._sockets = [_connected(url, job_id, small=number < STALLED) for number in range(READERS)]
        self._heard = dict.fromkeys(self._sockets[STALLED:], 0)
        self._rest = dict.fromkeys(self._sockets[STALLED:], b"")
        self._late: list[float] = []
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._read)
        self._thread.start()

    def _read(self) -> None:
        with selectors.DefaultSelector() as selector:
            for each in self._heard:
                selector.register(each, selectors.EVENT_READ)
            while not self._ending.is_set():
                for key, _ in selector.select(0.2):
                    self._take(key.fileobj)  # type: ignore[arg-type] # only sockets were registered

    def _take(self, each: socket.socket) -> None:
        *lines, self._rest[each] = (self._rest[each] + each.recv(1 << 16)).split(b"\n")
        now = datetime.now(UTC)
        for line in lines:
            if line.startswith(b"data: ") and b'"step"' in line:
                said = datetime.fromisoformat(json.loads(line[6:])["at"])
                self._late.append((now - said).total_seconds())
                self._heard[each] += 1

    def close(self) -> tuple[list[float], int]:
        """The delays in seconds, and the points of the one who heard least."""
        self._ending.set()
        self._thread.join()
        for each in self._sockets:
            each.close()
        return self._late, min(self._heard.values())


def _connected(url: str, job_id: str, small: bool) -> socket.socket:
    parts = urlsplit(url)
    made = socket.socket()
    if small:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    made.connect((parts.hostname, parts.port))
    made.sendall(f"GET /jobs/{job_id}/metrics/stream HTTP/1.1\r\nHost: {parts.netloc}\r\n\r\n".encode())
    return made
