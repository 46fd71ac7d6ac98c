"""Server-sent events: read from lines, and kept coming by a thread that takes a broken stream up again."""

import json
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from queue import Empty, Full, Queue
from typing import Any

from trainyard.client.errors import ApiError, ServiceUnreachable, TrainyardError

RETRY_SECONDS = 2.0
MAX_WAITING = 2000
OPENED = "open"
END = "end"


class StreamUnsupported(TrainyardError):
    """The service answers, and not with a stream: it is an older one."""


@dataclass(frozen=True)
class StreamEvent:
    """One event. ``id`` is where a reader goes on behind it; ``kind`` "open" says that the stream stands."""

    kind: str
    data: Any = None
    id: str | None = None


def parse(lines: Iterable[str]) -> Iterator[StreamEvent]:
    """The events in the lines of a stream; comments and what is not complete are left out."""
    fields: dict[str, str] = {}
    for line in lines:
        if line:
            name, _, value = line.partition(":")
            fields[name] = value.removeprefix(" ")
        else:
            if "event" in fields and "data" in fields:
                yield StreamEvent(fields["event"], json.loads(fields["data"]), fields.get("id"))
            fields = {}


Open = Callable[[str | None], Iterator[StreamEvent]]
"""Opens the stream behind an id, or from where it begins."""


@dataclass
class EventStream:
    """Events of a stream that come by themselves. Where none can be had, ``healthy`` is false: ask instead.

    The thread ends with the stream's "end", where the service has no streams, or after `close`.
    """

    open_stream: Open
    healthy: bool = False
    _events: "Queue[StreamEvent]" = field(default_factory=lambda: Queue(MAX_WAITING))
    _came: threading.Event = field(default_factory=threading.Event)
    _closing: threading.Event = field(default_factory=threading.Event)
    _last_id: str | None = None

    def start(self) -> "EventStream":
        """Begin to read."""
        self._thread = threading.Thread(target=self._run, name="stream", daemon=True)
        self._thread.start()
        return self

    def close(self) -> None:
        """End; a read that is going on ends when its connection is closed."""
        self._closing.set()
        self.healthy = False

    def take(self) -> list[StreamEvent]:
        """What came since the last call."""
        self._came.clear()
        taken: list[StreamEvent] = []
        while True:
            try:
                taken.append(self._events.get_nowait())
            except Empty:
                return taken

    def wait(self, seconds: float) -> None:
        """Until something comes, or ``seconds`` are over."""
        self._came.wait(seconds)

    def _run(self) -> None:
        while not self._closing.is_set():
            try:
                if self._read():
                    return
            except StreamUnsupported:
                return
            except ApiError as error:
                if error.status < 500 and error.status != 429:
                    return
            except ServiceUnreachable:
                pass
            finally:
                self.healthy = False
            self._closing.wait(RETRY_SECONDS)

    def _read(self) -> bool:
        """Read one connection to its end; True where it was the end of the stream."""
        for event in self.open_stream(self._last_id):
            if self._closing.is_set():
                return True
            self.healthy = True
            self._put(event)
            self._last_id = event.id or self._last_id
            if event.kind == END:
                return True
        return False

    def _put(self, event: StreamEvent) -> None:
        """Wait for room: a reader that is slow slows the stream, and memory stays bounded."""
        while not self._closing.is_set():
            try:
                self._events.put(event, timeout=0.2)
            except Full:
                continue
            self._came.set()
            return
