"""Server-sent events: a parser, and a background thread that reads a stream and reconnects."""

import json
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from queue import Empty, Full, Queue
from typing import Any

from trainyard.client.errors import ApiError, ServiceUnreachable, TrainyardError

RETRY_SECONDS = 2.0
MAX_QUEUED = 2000
OPENED = "open"
END = "end"


class StreamUnsupported(TrainyardError):
    """The response is no stream: the service is an older version."""

    code = "stream_unsupported"


@dataclass(frozen=True)
class StreamEvent:
    """One event. A reader continues after it by its ``id``. The ``kind`` "open" means that the stream is connected."""

    kind: str
    data: Any = None
    id: str | None = None


class EventParser:
    """Turns the lines of a stream into events. Comments and incomplete events are left out."""

    def __init__(self) -> None:
        self._fields: dict[str, str] = {}

    def feed(self, line: str) -> StreamEvent | None:
        """Return the event that ends with this line, or None. Raises ValueError if its data is not JSON."""
        if line:
            name, _, value = line.partition(":")
            self._fields[name] = value.removeprefix(" ")
            return None
        fields, self._fields = self._fields, {}
        if "event" not in fields or "data" not in fields:
            return None
        return StreamEvent(fields["event"], json.loads(fields["data"]), fields.get("id"))


def parse_events(lines: Iterable[str]) -> Iterator[StreamEvent]:
    """Yield the events in the lines of a stream, without comments and incomplete events."""
    parser = EventParser()
    for line in lines:
        event = parser.feed(line)
        if event is not None:
            yield event


Open = Callable[[str | None], Iterator[StreamEvent]]
"""Opens the stream after an event id, or from its start if that is None."""


@dataclass
class EventStream:
    """Reads a stream in a background thread. If ``healthy`` is False the stream is not connected: poll instead.

    The thread ends after the event "end", after `close`, or if the service rejects the request or has no streams.
    """

    open_stream: Open
    healthy: bool = False
    _events: "Queue[StreamEvent]" = field(default_factory=lambda: Queue(MAX_QUEUED))
    _arrived: threading.Event = field(default_factory=threading.Event)
    _closing: threading.Event = field(default_factory=threading.Event)
    _last_id: str | None = None

    def start(self) -> "EventStream":
        """Start the thread."""
        self._thread = threading.Thread(target=self._run, name="stream", daemon=True)
        self._thread.start()
        return self

    def close(self) -> None:
        """Stop the thread. A read in progress ends when its connection is closed."""
        self._closing.set()
        self.healthy = False

    def drain(self) -> list[StreamEvent]:
        """Return the events that arrived since the last call."""
        self._arrived.clear()
        events: list[StreamEvent] = []
        while True:
            try:
                events.append(self._events.get_nowait())
            except Empty:
                return events

    def wait(self, seconds: float) -> None:
        """Wait until an event arrives, at most ``seconds``."""
        self._arrived.wait(seconds)

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
        """Read one connection to its end. Return whether the stream is over."""
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
        # Wait for room: a slow reader slows the stream down, so memory stays bounded.
        while not self._closing.is_set():
            try:
                self._events.put(event, timeout=0.2)
            except Full:
                continue
            self._arrived.set()
            return
