"""Send one HTTP POST to an untrusted receiver.

The connection goes to the address that passed the check; the name is used only in TLS and in the Host header. Connect,
TLS, request and response share one deadline, and the response is read up to a limit. Redirects are not followed.
httpcore uses no proxy, cookie or netrc of the environment.
"""

import contextlib
import socket
import ssl
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from urllib.parse import SplitResult

import httpcore2

from trainyard.service.ssrf import AddressNotAllowed, Network, Resolver, parse_url, port_of, resolve, resolve_allowed

SEND_SECONDS = 10.0
"""From the connect to the end of the response. The system resolves the name before that, within its own limits."""

MAX_SNIPPET_BYTES = 500
MAX_RECV_BYTES = 4096
MAX_HEAD_BYTES = 16 << 10
MAX_RESPONSE_BYTES = 64 << 10
"""Bytes read of a response, including its headers and the part that is not stored."""


@dataclass(frozen=True)
class DeliveryResult:
    """The result of one POST: a ``status``, or an ``error`` that says why there is none. ``retry_after`` in seconds.

    ``succeeded``: whether a notice was accepted. The status alone does not tell: mail has none, and some chats answer
    200 to what they reject.
    """

    status: int | None
    error: str | None
    seconds: float
    snippet: str | None = None
    retry_after: float | None = None
    succeeded: bool | None = None

    @property
    def accepted(self) -> bool:
        """True if the receiver accepted it. A redirect is a rejection: it may lead anywhere."""
        if self.succeeded is not None:
            return self.succeeded
        return self.status is not None and 200 <= self.status < 300


class DeliveryFailed(Exception):
    """The receiver sent no valid response; the message says why."""


class WebhookClient:
    """Sends webhooks. Tests replace ``resolver`` and the TLS ``context``."""

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

    def post(self, url: str, headers: Mapping[str, str], body: bytes) -> DeliveryResult:
        """Send ``body`` and return the result. Does not raise if the receiver or the network fails."""
        begin = time.monotonic()
        try:
            status, fields, text = self._exchange(url, headers, body)
        except (AddressNotAllowed, DeliveryFailed) as error:
            return DeliveryResult(None, str(error), time.monotonic() - begin)
        except TimeoutError:
            return DeliveryResult(None, f"no answer within {self.seconds:g} s", time.monotonic() - begin)
        except (OSError, UnicodeError, httpcore2.ProtocolError) as error:
            return DeliveryResult(None, _cause(error), time.monotonic() - begin)
        error_text = "redirects are not followed" if 300 <= status < 400 else None
        return DeliveryResult(
            status, error_text, time.monotonic() - begin, printable(text), retry_after(fields.get(b"retry-after"))
        )

    def _exchange(self, url: str, headers: Mapping[str, str], body: bytes) -> tuple[int, dict[bytes, bytes], bytes]:
        """Return (status, headers, first bytes of the body). The status counts even if the body is cut off."""
        parts = parse_url(url)
        if parts is None:
            raise AddressNotAllowed("it is no URL to send to")
        addresses = resolve_allowed(self._resolver(parts.hostname or "", port_of(parts)), self._allowed)
        # Built from the parts: httpcore's own parser drops what follows a ";" in the path.
        target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        to = httpcore2.URL(scheme=parts.scheme, host=parts.hostname or "", port=port_of(parts), target=target)
        fields = list(_fields(parts, headers, body).items())
        with contextlib.closing(_Stream(addresses, port_of(parts), time.monotonic() + self.seconds)) as stream:
            if parts.scheme == "https":
                stream.secure(self._context or ssl.create_default_context(), parts.hostname or "")
            connection = _Connection(to.origin, stream)
            with connection.stream("POST", to, headers=fields, content=body) as response:
                text = b""
                with contextlib.suppress(OSError, httpcore2.ProtocolError, DeliveryFailed):
                    for data in response.iter_stream():
                        text += data
                        if len(text) >= MAX_SNIPPET_BYTES:
                            break
                received = {name.lower(): value for name, value in response.headers}
                return response.status, received, text[:MAX_SNIPPET_BYTES]


class _Connection(httpcore2.HTTP11Connection):
    MAX_INCOMPLETE_EVENT_SIZE = MAX_HEAD_BYTES


class _Stream(httpcore2.NetworkStream):
    """A socket to a checked address, with one deadline for everything and one limit for all that is read."""

    def __init__(self, addresses: Sequence[str], port: int, deadline: float) -> None:
        self._deadline = deadline
        self._unsent = b""
        self._received = 0
        self._socket = self._connect(addresses, port)

    def secure(self, context: ssl.SSLContext, name: str) -> None:
        """Start TLS. The certificate must be valid for ``name``, whichever address it led to."""
        self._socket.settimeout(self._seconds_left())
        self._socket = context.wrap_socket(self._socket, server_hostname=name)

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:  # noqa: ARG002 - the deadline counts
        if self._unsent:
            self._socket.settimeout(self._seconds_left())
            self._socket.sendall(self._unsent)
            self._unsent = b""
        self._socket.settimeout(self._seconds_left())
        data = self._socket.recv(min(max_bytes, MAX_RECV_BYTES))
        self._received += len(data)
        if self._received > MAX_RESPONSE_BYTES:
            raise DeliveryFailed("it sends too much before its response")
        return data

    def write(self, buffer: bytes, timeout: float | None = None) -> None:  # noqa: ARG002 - the deadline counts
        # Headers and body are sent together, at the first read: a receiver that closes after the headers would reset
        # the connection, and its response would be lost.
        self._unsent += buffer

    def close(self) -> None:
        self._socket.close()

    def _connect(self, addresses: Sequence[str], port: int) -> socket.socket:
        failure: OSError = TimeoutError()
        for address in addresses:
            try:
                return socket.create_connection((address, port), timeout=self._seconds_left())
            except OSError as error:
                failure = error
        raise failure

    def _seconds_left(self) -> float:
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError
        return left


def _fields(parts: SplitResult, headers: Mapping[str, str], body: bytes) -> dict[str, str]:
    return {
        "host": parts.netloc,
        "user-agent": "trainyard-webhook",
        "content-type": "application/json",
        "content-length": str(len(body)),
        "connection": "close",
        **headers,
    }


def _cause(error: Exception) -> str:
    # For users: the system's own message, without internals.
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"its certificate is not accepted: {error.verify_message}"
    if isinstance(error, socket.gaierror | UnicodeError):  # UnicodeError: a part of the name is empty or too long
        return "its name cannot be resolved"
    if isinstance(error, httpcore2.ProtocolError):
        return "it does not speak HTTP"
    return (error.strerror if isinstance(error, OSError) else None) or type(error).__name__


def printable(text: bytes) -> str:
    """Return the text with a space for each character that cannot be stored or printed everywhere."""
    decoded = text.decode("utf-8", "replace")
    return "".join(letter if letter.isprintable() else " " for letter in decoded)


def retry_after(value: str | bytes | None) -> float | None:
    """Return the header's seconds, or None if it is missing or a date."""
    return float(value) if value is not None and value.isdigit() and len(value) < 8 else None
