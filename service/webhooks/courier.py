"""One HTTP POST to somebody we do not trust.

It goes to the address that was checked, has one deadline for all of it, reads little, and follows nobody.
"""

import contextlib
import socket
import ssl
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from urllib.parse import SplitResult

import h11

from service.webhooks.addresses import AddressRefused, Network, Resolver, checked, port_of, resolve, split

SEND_SECONDS = 10.0
"""From the connect to the end of the answer. Before that the system resolves the name, by limits of its own."""

SNIPPET_BYTES = 500
HEAD_BYTES = 16 << 10
READ_BYTES = 4096
MOST_READ = 64 << 10
"""What is read of an answer at all, its head and what is not shown included."""


@dataclass(frozen=True)
class Answer:
    """What came of it: a ``status``, or an ``error`` that says why there is none. ``retry_after`` in seconds."""

    status: int | None
    error: str | None
    seconds: float
    snippet: str | None = None
    retry_after: float | None = None

    @property
    def took(self) -> bool:
        """Whether the receiver has it. A redirect is a no: it may lead anywhere."""
        return self.status is not None and 200 <= self.status < 300


class NoAnswer(Exception):
    """The receiver did not answer as HTTP has it; the message says how."""


class Courier:
    """Sends. ``resolver`` and ``context`` stand in for the system's in tests."""

    def __init__(
        self,
        allowed: Sequence[Network] = (),
        resolver: Resolver = resolve,
        context: ssl.SSLContext | None = None,
        seconds: float = SEND_SECONDS,
    ) -> None:
        self._allowed = allowed
        self._resolver = resolver
        self._context = context
        self.seconds = seconds

    def post(self, url: str, headers: Mapping[str, str], body: bytes) -> Answer:
        """Send, and say what came of it; nothing is raised for what the receiver does."""
        begun = time.monotonic()
        try:
            status, fields, text = self._exchange(url, headers, body)
        except (AddressRefused, NoAnswer) as error:
            return Answer(None, str(error), time.monotonic() - begun)
        except TimeoutError:
            return Answer(None, f"no answer within {self.seconds:g} s", time.monotonic() - begun)
        except (OSError, h11.ProtocolError) as error:
            return Answer(None, _cause(error), time.monotonic() - begun)
        error_text = "redirects are not followed" if 300 <= status < 400 else None
        return Answer(status, error_text, time.monotonic() - begun, _shown(text), _seconds(fields.get(b"retry-after")))

    def _exchange(self, url: str, headers: Mapping[str, str], body: bytes) -> tuple[int, dict[bytes, bytes], bytes]:
        parts = split(url)
        if parts is None:
            raise AddressRefused("it is no URL to send to")
        addresses = checked(self._resolver(parts.hostname or "", port_of(parts)), self._allowed)
        line = _Line(time.monotonic() + self.seconds)
        with contextlib.closing(line):
            line.connect(addresses, port_of(parts))
            if parts.scheme == "https":
                # The certificate is the name's, wherever it was found to live.
                line.secure(self._context or ssl.create_default_context(), parts.hostname or "")
            return _talk(line, _request(parts, headers, body), body)


class _Line:
    """A connection on which everything together has one deadline."""

    def __init__(self, deadline: float) -> None:
        self._deadline = deadline
        self._socket: socket.socket | None = None

    def _left(self) -> float:
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError
        return left

    def connect(self, addresses: Sequence[str], port: int) -> None:
        """To the first address that takes it."""
        trouble: OSError | None = None
        for address in addresses:
            try:
                self._socket = socket.create_connection((address, port), timeout=self._left())
                return
            except OSError as error:
                trouble = error
        raise trouble or NoAnswer("the name has no address")

    def secure(self, context: ssl.SSLContext, name: str) -> None:
        """Speak TLS from here on."""
        assert self._socket is not None
        self._socket.settimeout(self._left())
        self._socket = context.wrap_socket(self._socket, server_hostname=name)

    def send(self, data: bytes) -> None:
        assert self._socket is not None
        self._socket.settimeout(self._left())
        self._socket.sendall(data)

    def receive(self) -> bytes:
        """What came; nothing where the other side has ended."""
        assert self._socket is not None
        self._socket.settimeout(self._left())
        return self._socket.recv(READ_BYTES)

    def close(self) -> None:
        if self._socket is not None:
            self._socket.close()


def _request(parts: SplitResult, headers: Mapping[str, str], body: bytes) -> h11.Request:
    target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    fields = {
        "host": parts.netloc,
        "user-agent": "trainyard-webhook",
        "content-type": "application/json",
        "content-length": str(len(body)),
        "connection": "close",
        **headers,
    }
    return h11.Request(method="POST", target=target, headers=list(fields.items()))


def _talk(line: _Line, request: h11.Request, body: bytes) -> tuple[int, dict[bytes, bytes], bytes]:
    """(status, headers, the begin of the body). The status counts, even where its body breaks off."""
    speaking = h11.Connection(h11.CLIENT, max_incomplete_event_size=HEAD_BYTES)
    line.send((speaking.send(request) or b"") + (speaking.send(h11.Data(data=body)) or b""))
    speaking.send(h11.EndOfMessage())
    heard = _Heard(line, speaking)
    head = heard.head()
    text = b""
    with contextlib.suppress(OSError, h11.ProtocolError, NoAnswer):
        for data in heard.body():
            text += data
            if len(text) >= SNIPPET_BYTES:
                break
    return head.status_code, dict(head.headers), text[:SNIPPET_BYTES]


class _Heard:
    """The receiver's half of the conversation."""

    def __init__(self, line: _Line, speaking: h11.Connection) -> None:
        self._line = line
        self._speaking = speaking
        self._read = 0

    def head(self) -> h11.Response:
        while True:
            event = self._next()
            if isinstance(event, h11.Response):
                return event
            if not isinstance(event, h11.InformationalResponse):
                raise NoAnswer("it closed the connection without an answer")

    def body(self) -> Iterator[bytes]:
        while isinstance(event := self._next(), h11.Data):
            yield bytes(event.data)

    def _next(self) -> object:
        while (event := self._speaking.next_event()) is h11.NEED_DATA:
            data = self._line.receive()
            self._read += len(data)
            if self._read > MOST_READ:
                raise NoAnswer("it says too much before its answer")
            self._speaking.receive_data(data)
        return event


def _cause(error: Exception) -> str:
    """Of what went wrong, what a user may read: the system's own word."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"its certificate is not accepted: {error.verify_message}"
    if isinstance(error, socket.gaierror):
        return "its name cannot be resolved"
    if isinstance(error, h11.ProtocolError):
        return "it does not speak HTTP"
    return (error.strerror if isinstance(error, OSError) else None) or type(error).__name__


def _shown(text: bytes) -> str:
    """A piece of an answer that can be kept and printed anywhere."""
    decoded = text.decode("utf-8", "replace")
    return "".join(letter if letter.isprintable() else " " for letter in decoded)


def _seconds(value: bytes | None) -> float | None:
    """Retry-After where it is a number of seconds."""
    return float(value) if value is not None and value.isdigit() and len(value) < 8 else None
