"""HTTP requests to the service: retries, streams, and responses as values or exceptions."""

import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import httpx2

from trainyard.client.errors import InvalidSpec, InvalidUrl, ServiceUnreachable, api_error
from trainyard.client.local_peer import UntrustedListener, require_service
from trainyard.client.sse import OPENED, StreamEvent, StreamUnsupported, parse_events

CONNECT_SECONDS = 10.0
STREAM_TIMEOUT_SECONDS = 40.0
"""The service sends a comment every 15 s, so a stream that is silent for longer is broken."""

LOOPBACK = frozenset({"127.0.0.1", "localhost", "::1"})


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


class Connection:
    """Sends requests to the service at ``url``. The arguments are those of `trainyard.client.api.Client`."""

    def __init__(
        self,
        url: str,
        token: str | None,
        timeout: float,
        retries: RetryPolicy,
        transport: httpx2.BaseTransport | None = None,
    ) -> None:
        self.url = url.rstrip("/")
        self._retries = retries
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        # A proxy from the environment cannot reach this machine's own loopback address.
        remote = urlsplit(self.url).hostname not in LOOPBACK
        self._http = httpx2.Client(
            base_url=self.url, headers=headers, timeout=timeout, transport=transport, trust_env=remote
        )
        if token and self.url.startswith("http:"):
            # With https the certificate says whose program answers.
            self._http.event_hooks = {"request": [self._check_new_connections]}

    def close(self) -> None:
        """Close the open connections."""
        self._http.close()

    def call(
        self,
        method: str,
        path: str,
        *,
        params: Mapping[str, Any] | None = None,
        body: Any = None,
        headers: Mapping[str, str] | None = None,
        timeout: float | None = None,
    ) -> Any:
        """Send a request and return the JSON of the response, or None if it has no body.

        A request that did not reach the service is always retried. A request whose response was lost is retried only
        if a second arrival does no harm: reads, and writes with an Idempotency-Key. ``timeout``: seconds for one try,
        if the response takes longer than usual.

        Raises:
            ServiceUnreachable: no response within the time for retries.
            ApiError: the service rejected the request.
            InvalidSpec: the body has a value that JSON cannot express, such as NaN. Nothing was sent.
        """
        query = {name: value for name, value in (params or {}).items() if value is not None}
        _require_expressible(body, query)
        content: dict[str, Any] = {} if body is None else {"json": body}
        if timeout is not None:
            content["timeout"] = httpx2.Timeout(CONNECT_SECONDS, read=timeout)
        request = self._http.build_request(method, path, params=query, headers=dict(headers or {}), **content)
        repeatable = method == "GET" or "Idempotency-Key" in request.headers
        return self._result(self._send(request, repeatable))

    def stream(
        self,
        path: str,
        params: Mapping[str, Any] | None = None,
        last_event_id: str | None = None,
        *,
        body: Any = None,
        timeout: float = STREAM_TIMEOUT_SECONDS,
    ) -> Iterator[StreamEvent]:
        """Yield the events of a stream until the connection ends. The first one has the kind "open".

        With a ``body`` it is sent by POST. ``timeout``: seconds without any data.

        Raises:
            StreamUnsupported: the response is no stream.
            ApiError: the service rejected the request.
            ServiceUnreachable: there was no response, or nothing came for ``timeout`` seconds.
        """
        query = {name: value for name, value in (params or {}).items() if value is not None}
        headers = {"Accept": "text/event-stream"} | ({"Last-Event-ID": last_event_id} if last_event_id else {})
        _require_expressible(body, query)
        request: dict[str, Any] = {"params": query, "headers": headers, **({} if body is None else {"json": body})}
        limits = httpx2.Timeout(CONNECT_SECONDS, read=timeout)
        method = "GET" if body is None else "POST"
        try:
            with self._http.stream(method, path, **request, timeout=limits) as response:
                if response.status_code >= 400:
                    response.read()
                    raise api_error(response.status_code, _problem(response))
                if not response.headers.get("content-type", "").startswith("text/event-stream"):
                    raise StreamUnsupported(f"{path} is no stream")
                yield StreamEvent(OPENED)
                yield from parse_events(response.iter_lines())
        except (httpx2.TransportError, httpx2.StreamError, RuntimeError, ValueError) as error:
            # RuntimeError: the client was closed by another thread, which is how a reader is stopped.
            raise ServiceUnreachable(self.url, str(error) or type(error).__name__) from error

    @contextmanager
    def download(self, path: str, headers: Mapping[str, str]) -> Iterator[httpx2.Response]:
        """Yield a response whose body the caller reads in chunks.

        Raises:
            ApiError: the service rejected the request.
            ServiceUnreachable: there was no response, or its body was cut off.
        """
        try:
            with self._http.stream("GET", path, headers=dict(headers)) as response:
                if response.status_code >= 400:
                    response.read()
                    raise api_error(response.status_code, _problem(response))
                yield response
        except httpx2.TransportError as error:
            raise ServiceUnreachable(self.url, _cause(error)) from error

    def _check_new_connections(self, request: httpx2.Request) -> None:
        request.extensions["trace"] = self._on_transport_event

    def _on_transport_event(self, name: str, details: Mapping[str, Any]) -> None:
        # The connection is there, and nothing was sent yet.
        if name != "connection.connect_tcp.complete":
            return
        stream = details["return_value"]
        try:
            require_service(stream.get_extra_info("socket"), self.url)
        except UntrustedListener as error:
            stream.close()
            raise ServiceUnreachable(self.url, str(error)) from None
        except OSError as error:
            stream.close()
            raise httpx2.ConnectError(str(error)) from error

    def _send(self, request: httpx2.Request, repeatable: bool) -> httpx2.Response:
        pauses = self._retries.pauses()
        while True:
            try:
                return self._send_once(request, repeatable)
            except RetryableError as failure:
                pause = next(pauses, None)
                if pause is None:
                    raise ServiceUnreachable(self.url, str(failure)) from failure
                time.sleep(pause)

    def _send_once(self, request: httpx2.Request, repeatable: bool) -> httpx2.Response:
        try:
            response = self._http.send(request)
        except (httpx2.ConnectError, httpx2.ConnectTimeout, httpx2.PoolTimeout) as error:
            raise RetryableError(_cause(error)) from error
        except httpx2.TransportError as error:
            if not repeatable:
                message = f"{_cause(error)}; whether {request.method} {request.url.path} was done is not known"
                raise ServiceUnreachable(self.url, message) from error
            raise RetryableError(_cause(error)) from error
        if repeatable and response.status_code in (502, 503, 504):
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
        path = response.request.url.path
        needed = FIELD_OF.get(path.rpartition("/")[2], "object")
        if not isinstance(body, dict) or needed not in body:
            raise self._foreign(response, f"JSON without `{needed}`")
        return body

    def _foreign(self, response: httpx2.Response, what: str) -> ServiceUnreachable:
        cause = f"the program there is not a Trainyard service ({response.status_code}, {what})"
        return ServiceUnreachable(self.url, cause)


FIELD_OF = {
    "health": "status",
    "ready": "status",
    "version": "version",
    "logs": "next_offset",
    "manifest.json": "files",
}
"""Last part of an address -> a field that every response there has. All others have `object`."""


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


def _cause(error: httpx2.TransportError) -> str:
    return str(error) or type(error).__name__


def _problem(response: httpx2.Response) -> dict[str, Any]:
    try:
        problem = response.json()
    except ValueError:
        problem = None
    if isinstance(problem, dict):
        return problem
    return {"detail": f"HTTP {response.status_code} {response.reason_phrase} without an explanation"}
