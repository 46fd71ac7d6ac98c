"""200 readers of a stream, 50 of which stop reading: the delay of the others, and the memory of the stalled ones."""

import json
import selectors
import socket
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime
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
    """One job whose agent reports twenty points a second, one by one."""
    with live.home_with_jobs(1) as (home, [agent]):
        with served(home, home.parent, arguments=["--no-scheduler"]) as service, Wire(service.url) as wire:
            stream_readers = StreamReaders(service.url, agent.job_id)
            until(lambda: b"trainyard_streams 200" in wire.request("GET", "/metrics")[1], 60)
            _report(service.url, agent, 2.0)
            before = service.memory_bytes
            _report(service.url, agent, SECONDS)
            time.sleep(2.0)  # late points still arrive
            grown = service.memory_bytes - before
            delays, fewest = stream_readers.close()
    yield Figure(f"{READERS} readers, {STALLED} stalled: delay of the others, p99", 1000 * quantile(delays, 0.99), "ms")
    yield Figure(f"{READERS} readers, {STALLED} stalled: delay of the others, worst", 1000 * max(delays), "ms", 1000)
    yield Figure("points that the slowest of them has missed", len(agent.outbox) - fewest, "", 0.5)
    yield Figure("memory that they add", grown / (1 << 20), "MiB", 16)


def _report(url: str, agent: Agent, seconds: float) -> None:
    begin = time.monotonic()
    with Wire(url, agent.token) as wire:
        for number in range(int(seconds * PER_SECOND)):
            time.sleep(max(0.0, begin + number / PER_SECOND - time.monotonic()))
            agent.metric()
            agent.upload(wire)


class StreamReaders:
    """All readers in one thread. The stalled ones have small buffers and read nothing."""

    def __init__(self, url: str, job_id: str) -> None:
        self._sockets = [_connect(url, job_id, small=number < STALLED) for number in range(READERS)]
        self._received = dict.fromkeys(self._sockets[STALLED:], 0)
        self._rest = dict.fromkeys(self._sockets[STALLED:], b"")
        self._delays: list[float] = []
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._read)
        self._thread.start()

    def _read(self) -> None:
        with selectors.DefaultSelector() as selector:
            for each in self._received:
                selector.register(each, selectors.EVENT_READ)
            while not self._ending.is_set():
                for key, _ in selector.select(0.2):
                    self._receive(key.fileobj)  # type: ignore[arg-type] # only sockets were registered

    def _receive(self, each: socket.socket) -> None:
        *lines, self._rest[each] = (self._rest[each] + each.recv(1 << 16)).split(b"\n")
        now = datetime.now(UTC)
        for line in lines:
            if line.startswith(b"data: ") and b'"step"' in line:
                sent_at = datetime.fromisoformat(json.loads(line[6:])["at"])
                self._delays.append((now - sent_at).total_seconds())
                self._received[each] += 1

    def close(self) -> tuple[list[float], int]:
        """Stop reading; return the delays in seconds, and the smallest number of points that a reader received."""
        self._ending.set()
        self._thread.join()
        for each in self._sockets:
            each.close()
        return self._delays, min(self._received.values())


def _connect(url: str, job_id: str, small: bool) -> socket.socket:
    parts = urlsplit(url)
    connection = socket.socket()
    if small:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.connect((parts.hostname, parts.port))
    connection.sendall(f"GET /jobs/{job_id}/metrics/stream HTTP/1.1\r\nHost: {parts.netloc}\r\n\r\n".encode())
    return connection
