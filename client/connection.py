"""HTTP requests to the service: retries, streams, and responses as values or exceptions."""

import math
import socket
import time
from collections import OrderedDict
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import ExitStack, closing
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from typing import Any, TypeVar
from urllib.parse import urlsplit

import httpx2

from trainyard.client.errors import InvalidSpec, InvalidUrl, NotAuthorised, ServiceUnreachable, api_error
from trainyard.client.flows import Body, Flow, Item, ItemFlow, Next, Open, Send, Sleep, Step, Work, as_item
from trainyard.client.local_peer import UntrustedListener, require_service
from trainyard.client.pages import Pages
from trainyard.client.sse import OPENED, EventParser, StreamEvent, StreamUnsupported

CONNECT_SECONDS = 10.0
STREAM_TIMEOUT_SECONDS = 40.0
"""The service sends a comment every 15 s, so a stream that is silent for longer is broken."""

PAGE = 100
MAX_TAGGED = 32
MAX_TAGGED_BYTES = 1 << 20
"""Responses with a tag that are kept: a poll gets no body as long as they are the current ones."""

CONNECTED = "connection.connect_tcp.complete"
"""The HTTP client's event of a new connection."""

UNAVAILABLE = frozenset({502, 503, 504})
"""Statuses of a service that is not ready, or of a proxy whose service does not respond."""

MIN_CLOCK_OFFSET = timedelta(minutes=1)
LOOPBACK = frozenset({"127.0.0.1", "localhost", "::1"})

T = TypeVar("T")


@dataclass(frozen=True)
class RetryPolicy:
    """Pauses between tries: the first of ``first_pause``, doubled up to ``max_pause``, together at most ``seconds``."""

    seconds: float = 5.0
    first_pause: float = 0.1
    max_pause: float = 2.0

    def pauses(self) -> Iterator[float]:
        pause, left = self.first_pause, self.seconds
        while pause <= left:
            yield pause
            left -= pause
            pause = min(2 * pause, self.max_pause)


class RetryableError(Exception):
    """A try failed that may be repeated: there was no response, or one with a status such as 503."""


class Exchange:
    """The requests to the service at ``url`` as flows, for both kinds of HTTP clients.

    The arguments are those of `trainyard.client.api.Client`.
    """

    _http: httpx2.Client | httpx2.AsyncClient

    def __init__(self, url: str, retries: RetryPolicy) -> None:
        self.url = url.rstrip("/")
        self.clock_offset = timedelta()
        """The clock of the service minus that of this host, by the last response; 0 if it is less than a minute."""
        self._retries = retries
        self._tagged: OrderedDict[tuple[str, str], httpx2.Response] = OrderedDict()

    def _settings(self, token: str | None, timeout: float) -> dict[str, Any]:
        return {
            "base_url": self.url,
            "headers": {"Authorization": f"Bearer {token}"} if token else {},
            "timeout": timeout,
            # A proxy from the environment cannot reach this machine's own loopback address.
            "trust_env": urlsplit(self.url).hostname not in LOOPBACK,
        }

    def _checks_peers(self, token: str | None) -> bool:
        # With https the certificate says whose program answers.
        return bool(token) and self.url.startswith("http:")

    def _call(self, method: str, path: str, parse: Callable[[Any], T], content: Mapping[str, Any]) -> Flow[T]:
        return parse((yield from self.call(method, path, **content)))

    def call(
        self,
        method: str,
        path: str,
        *,
        params: Mapping[str, Any] | None = None,
        body: Any = None,
        headers: Mapping[str, str] | None = None,
        timeout: float | None = None,
        retries: RetryPolicy | None = None,
    ) -> Flow[Any]:
        """Send a request and return the JSON of the response, or None if it has no body.

        A request that did not reach the service is always retried. A request whose response was lost is retried only
        if a second arrival does no harm: reads, and writes with an Idempotency-Key. ``timeout``: seconds for one try,
        if the response takes longer than usual. ``retries``: instead of those of the connection.

        Raises:
            ServiceUnreachable: no response within the time for retries.
            ApiError: the service rejected the request.
            InvalidSpec: the body has a value that JSON cannot express, such as NaN. Nothing was sent.
        """
        limits: dict[str, Any] = {} if timeout is None else {"timeout": httpx2.Timeout(CONNECT_SECONDS, read=timeout)}
        request = self._request(method, path, params, body, headers or {}, **limits)
        repeatable = method == "GET" or "Idempotency-Key" in request.headers
        key = str(request.url), request.headers.get("accept", "")
        known = self._tagged.get(key) if method == "GET" else None
        if known is not None:
            request.headers["If-None-Match"] = known.headers["etag"]
        response = yield from self._send(request, repeatable, (retries or self._retries).pauses())
        if response.status_code == 304 and known is not None:
            return self._result(known)
        if method == "GET":
            self._keep_tagged(key, response)
        return self._result(response)

    def _keep_tagged(self, key: tuple[str, str], response: httpx2.Response) -> None:
        self._tagged.pop(key, None)
        if response.status_code == 200 and "etag" in response.headers and len(response.content) <= MAX_TAGGED_BYTES:
            self._tagged[key] = response
            if len(self._tagged) > MAX_TAGGED:
                self._tagged.popitem(last=False)

    def list_pages(
        self,
        path: str,
        params: Mapping[str, Any] | None = None,
        limit: int | None = None,
        parse: Callable[[Any], T] = lambda row: row,
    ) -> ItemFlow[list[T]]:
        """Give each page of a list, at most ``limit`` rows in all. ``parse``: turns a row into a result."""
        after: object = None
        left = limit
        while left is None or left > 0:
            query = {**(params or {}), "limit": PAGE if left is None else min(left, PAGE), "after": after}
            page = yield from self.call("GET", path, params=query)
            yield Item([parse(row) for row in page["data"]])
            if not page.get("has_more") or not page["data"]:
                return
            after = page["data"][-1]["id"]
            left = None if left is None else left - len(page["data"])

    def events(
        self,
        path: str,
        params: Mapping[str, Any] | None = None,
        last_event_id: str | None = None,
        *,
        body: Any = None,
        timeout: float = STREAM_TIMEOUT_SECONDS,
        accept: Callable[[StreamEvent], Any] = lambda event: event,
    ) -> ItemFlow[Any]:
        """Give the events of a stream until the connection ends. The first one has the kind "open".

        With a ``body`` it is sent by POST. ``timeout``: seconds without any data. ``accept``: turns an event into an
        item, or into None, which is left out.

        Raises:
            StreamUnsupported: the response is no stream.
            ApiError: the service rejected the request.
            ServiceUnreachable: there was no response, or nothing came for ``timeout`` seconds.
        """
        headers = {"Accept": "text/event-stream"} | ({"Last-Event-ID": last_event_id} if last_event_id else {})
        limits = httpx2.Timeout(CONNECT_SECONDS, read=timeout)
        request = self._request("GET" if body is None else "POST", path, params, body, headers, timeout=limits)
        opened = yield from self._open(request, "lines")
        if not opened.response.headers.get("content-type", "").startswith("text/event-stream"):
            raise StreamUnsupported(f"{path} is no stream")
        parser = EventParser()
        event: StreamEvent | None = StreamEvent(OPENED)
        while True:
            item = accept(event) if event is not None else None
            if item is not None:
                yield Item(item)
            line = yield from self._next(opened)
            if line is None:
                return
            try:
                event = parser.feed(line)
            except ValueError as error:
                raise ServiceUnreachable(self.url, f"it sent an event that is not JSON: {error}") from error

    def download(self, path: str, headers: Mapping[str, str]) -> Flow[Body]:
        """Return a response whose body is read with `chunk`.

        Raises:
            ApiError: the service rejected the request.
            ServiceUnreachable: there was no response.
        """
        request = self._http.build_request("GET", path, headers=dict(headers))
        return (yield from self._open(request, "bytes"))

    def chunk(self, body: Body) -> Flow[bytes | None]:
        """Return the next bytes of a body, or None at the end. Raises ServiceUnreachable if it is cut off."""
        part: bytes | None = yield from self._next(body)
        return part

    def _open(self, request: httpx2.Request, parts: Any) -> Flow[Body]:
        try:
            opened: Body = yield Open(request, parts)
        except (httpx2.TransportError, httpx2.StreamError, RuntimeError) as error:
            # RuntimeError: the client was closed by another thread, which is how a reader is stopped.
            raise ServiceUnreachable(self.url, _cause(error)) from error
        if opened.response.status_code >= 400:
            raise api_error(opened.response.status_code, _problem(opened.response))
        return opened

    def _next(self, body: Body) -> Flow[Any]:
        try:
            return (yield Next(body))
        except (httpx2.TransportError, httpx2.StreamError, RuntimeError, ValueError) as error:
            raise ServiceUnreachable(self.url, _cause(error)) from error

    def _request(
        self,
        method: str,
        path: str,
        params: Mapping[str, Any] | None,
        body: Any,
        headers: Mapping[str, str],
        **more: Any,
    ) -> httpx2.Request:
        query = {name: value for name, value in (params or {}).items() if value is not None}
        _require_expressible(body, query)
        content: dict[str, Any] = {} if body is None else {"json": body}
        return self._http.build_request(method, path, params=query, headers=dict(headers), **content, **more)

    def _send(self, request: httpx2.Request, repeatable: bool, pauses: Iterator[float]) -> Flow[httpx2.Response]:
        while True:
            try:
                return (yield from self._send_once(request, repeatable))
            except RetryableError as failure:
                pause = next(pauses, None)
                if pause is None:
                    raise ServiceUnreachable(self.url, str(failure)) from failure
            yield Sleep(pause)

    def _send_once(self, request: httpx2.Request, repeatable: bool) -> Flow[httpx2.Response]:
        try:
            response: httpx2.Response = yield Send(request)
        except (httpx2.ConnectError, httpx2.ConnectTimeout, httpx2.PoolTimeout) as error:
            raise RetryableError(_cause(error)) from error
        except httpx2.TransportError as error:
            if not repeatable:
                message = f"{_cause(error)}; whether {request.method} {request.url.path} was done is not known"
                raise ServiceUnreachable(self.url, message) from error
            raise RetryableError(_cause(error)) from error
        self.clock_offset = _clock_offset(response.headers.get("date"), datetime.now(UTC))
        if repeatable and response.status_code in UNAVAILABLE:
            raise RetryableError(f"it answers {response.status_code} {_problem(response).get('detail', '')}".rstrip())
        return response

    def _result(self, response: httpx2.Response) -> Any:
        if response.status_code >= 400:
            raise api_error(response.status_code, _problem(response))
        if response.status_code == 204 or not response.content:
            return None
        try:
            body = response.json()
        except ValueError:
            raise self._foreign(response, "not JSON") from None
        last = response.request.url.path.rpartition("/")[2]
        # With another method, the last part may be a name that a user has chosen: PATCH /tokens/health.
        needed = FIELD_OF.get(last, "object") if response.request.method == "GET" else "object"
        if not isinstance(body, dict) or needed not in body:
            raise self._foreign(response, f"JSON without `{needed}`")
        return body

    def _foreign(self, response: httpx2.Response, what: str) -> ServiceUnreachable:
        cause = f"the program there is not a Trainyard service ({response.status_code}, {what})"
        return ServiceUnreachable(self.url, cause)

    def _refusal(self, connection: socket.socket) -> Exception | None:
        """Return why a new connection, on which nothing was sent yet, must not be used; None if it may."""
        try:
            require_service(connection, self.url)
        except UntrustedListener as error:
            return ServiceUnreachable(self.url, str(error))
        except OSError as error:
            return httpx2.ConnectError(str(error))
        return None


class Connection(Exchange):
    """Runs flows with a blocking HTTP client."""

    _http: httpx2.Client

    def __init__(
        self,
        url: str,
        token: str | None,
        timeout: float,
        retries: RetryPolicy,
        transport: httpx2.BaseTransport | None = None,
    ) -> None:
        super().__init__(url, retries)
        token = header_token(token)
        self._http = httpx2.Client(transport=transport, **self._settings(token, timeout))
        if self._checks_peers(token):
            self._http.event_hooks = {"request": [self._check_new_connections]}

    def close(self) -> None:
        """Close the open connections."""
        self._http.close()

    def run(self, flow: Flow[T]) -> T:
        """Run a flow and return its result."""
        with closing(self.iterate(as_item(flow))) as items:
            return next(items)

    def request(self, method: str, path: str, parse: Callable[[Any], Any] = lambda body: body, **content: Any) -> Any:
        """Run a `call` and return ``parse`` of its result."""
        return self.run(self._call(method, path, parse, content))

    def each(self, flow: ItemFlow[list[T]]) -> Pages[T]:
        """Run a flow that gives pages, and return their rows."""
        return Pages(self.iterate(flow))

    def iterate(self, flow: ItemFlow[T]) -> Generator[T, None, None]:
        """Run a flow and yield its items."""
        with ExitStack() as opened:
            step = flow.send
            result: Any = None
            while True:
                try:
                    wanted = step(result)
                except StopIteration:
                    return
                if isinstance(wanted, Item):
                    step, result = flow.send, None
                    yield wanted.value
                    continue
                try:
                    step, result = flow.send, self._do(wanted, opened)
                except Exception as error:
                    step, result = flow.throw, error

    def _do(self, step: Step, opened: ExitStack) -> Any:
        match step:
            case Send(request):
                return self._http.send(request)
            case Open(request, parts):
                opened.close()
                response = self._http.send(request, stream=True)
                opened.callback(response.close)
                if response.status_code >= 400:
                    response.read()
                return Body(response, response.iter_lines() if parts == "lines" else response.iter_bytes())
            case Next(body):
                return next(body.parts, None)  # type: ignore[arg-type]  # made by `Open` above
            case Sleep(seconds):
                return time.sleep(seconds)
            case Work(function):
                return function()

    def _check_new_connections(self, request: httpx2.Request) -> None:
        request.extensions["trace"] = self._on_transport_event

    def _on_transport_event(self, name: str, details: Mapping[str, Any]) -> None:
        if name != CONNECTED:
            return
        stream = details["return_value"]
        error = self._refusal(stream.get_extra_info("socket"))
        if error is not None:
            stream.close()
            raise error from None


def header_token(token: str | None) -> str | None:
    """Return ``token`` without whitespace around it, or None if nothing is left.

    Raises NotAuthorised if the token has characters that a header cannot contain.
    """
    stripped = (token or "").strip()
    if not (stripped.isascii() and stripped.isprintable()):
        # The message does not contain the token, because messages are logged.
        detail = "The token was not sent: it has characters other than printable ASCII, which no token has."
        raise NotAuthorised(401, {"code": "unauthorized", "detail": detail})
    return stripped or None


FIELD_OF = {
    "health": "status",
    "ready": "status",
    "version": "version",
    "logs": "next_offset",
    "manifest.json": "files",
}
"""Last part of an address -> a field of every response to GET there. All other responses have `object`."""


def _require_expressible(body: Any, query: Mapping[str, Any]) -> None:
    problems = [*_inexpressible(body), *_inexpressible(query, "/query")]
    if problems:
        errors = [{"pointer": pointer, "message": message} for pointer, message in problems]
        detail = "The request was not sent, because it has values that JSON cannot express."
        raise InvalidSpec(422, {"code": "not_json", "detail": detail, "errors": errors})


def _inexpressible(value: Any, pointer: str = "") -> Iterator[tuple[str, str]]:
    """Yield (pointer, message) of each value in ``value`` that JSON cannot express."""
    if isinstance(value, float) and not math.isfinite(value):
        yield pointer, f"must be a finite number, not {value}"
    elif isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:
            yield pointer, "must be text: it has bytes that are not UTF-8"
    elif isinstance(value, Mapping):
        for name, below in value.items():
            yield from _inexpressible(name, pointer)
            escaped = str(name).replace("~", "~0").replace("/", "~1")
            yield from _inexpressible(below, f"{pointer}/{escaped}")
    elif isinstance(value, list | tuple):
        for index, below in enumerate(value):
            yield from _inexpressible(below, f"{pointer}/{index}")


def normalize_url(url: str) -> str:
    """Return ``localhost:8000`` as ``http://localhost:8000``. Raises InvalidUrl."""
    full = (url if "://" in url else f"http://{url}").rstrip("/")
    try:
        parts = urlsplit(full)
        is_valid = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        is_valid = False
    if not is_valid:
        raise InvalidUrl(url)
    return full


def _cause(error: Exception) -> str:
    return str(error) or type(error).__name__


def _problem(response: httpx2.Response) -> dict[str, Any]:
    try:
        problem = response.json()
    except ValueError:
        problem = None
    if isinstance(problem, dict):
        return problem
    return {"detail": f"HTTP {response.status_code} {response.reason_phrase} without an explanation"}


def _clock_offset(date: str | None, now: datetime) -> timedelta:
    # The header has whole seconds, and the response took a while.
    try:
        offset = parsedate_to_datetime(date) - now if date else timedelta()
    except (TypeError, ValueError):
        return timedelta()
    return offset if abs(offset) >= MIN_CLOCK_OFFSET else timedelta()
