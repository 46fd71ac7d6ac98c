"""One HTTP connection to the service: what is tried again, for how long, and what an answer means."""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import httpx2

from trainyard.client.errors import InvalidUrl, ServiceUnreachable, api_error
from trainyard.client.sse import (
    OPENED,
    StreamEvent,
    StreamUnsupported,
    parse,
)

CONNECT_SECONDS = 10.0
SILENT_SECONDS = 40.0
"""A stream sends a comment every 15 s; one that is silent for longer is dead."""

LOOPBACK = frozenset({"127.0.0.1", "localhost", "::1"})


@dataclass(frozen=True)
class RetryPolicy:
    """How a call that failed is tried again: pauses of ``first``, doubled up to ``longest``, for ``seconds`` in all."""

    seconds: float = 5.0
    first: float = 0.1
    max_pause: float = 2.0

    def pauses(self) -> Iterator[float]:
        """Seconds to wait before each new try; they add up to at most ``seconds``."""
        pause, left = self.first, self.seconds
        while pause <= left:
            yield pause
            left -= pause
            pause = min(2 * pause, self.max_pause)


class RetryableError(Exception):
    """A try that may be made again: there was no answer, or one that says "later"."""


class Connection:
    """Sends requests and turns answers into values or exceptions.

    Args:
        url: base address of the service.
        token: bearer token, or None.
        timeout: seconds for one try.
        patience: how long a call is tried again.
        transport: stands in for the network in tests.
    """

    def __init__(
        self,
        url: str,
        token: str | None,
        timeout: float,
        patience: RetryPolicy,
        transport: httpx2.BaseTransport | None = None,
    ) -> None:
        self.url = url.rstrip("/")
        self._patience = patience
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        # A proxy from the environment would be asked for this machine's own address, and fail.
        remote = urlsplit(self.url).hostname not in LOOPBACK
        self._http = httpx2.Client(
            base_url=self.url, headers=headers, timeout=timeout, transport=transport, trust_env=remote
        )

    def close(self) -> None:
        """Give the sockets back."""
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
        """The JSON of the answer, None where it has none.

        A request that never reached the service is always sent again. One whose answer was lost is sent again only
        where a second arrival does no harm: reads, and writes with an Idempotency-Key. ``timeout``: seconds for one
        try, where the answer takes longer than most.

        Raises:
            ServiceUnreachable: no answer within the client's patience.
            Refused: the service said no.
        """
        given = {name: value for name, value in (params or {}).items() if value is not None}
        content: dict[str, Any] = {} if body is None else {"json": body}
        if timeout is not None:
            content["timeout"] = httpx2.Timeout(CONNECT_SECONDS, read=timeout)
        request = self._http.build_request(method, path, params=given, headers=dict(headers or {}), **content)
        repeatable = method == "GET" or "Idempotency-Key" in request.headers
        return self._answer(self._with_retries(request, repeatable))

    def stream(
        self, path: str, params: Mapping[str, Any] | None = None, last_event_id: str | None = None
    ) -> Iterator[StreamEvent]:
        """The events of a stream, the first of which says that it is open; ends when the connection does.

        Raises:
            NoStream: what answers is no stream.
            Refused: the service said no.
            ServiceUnreachable: there was no answer, or nothing more came: not even the comments.
        """
        given = {name: value for name, value in (params or {}).items() if value is not None}
        headers = {"Accept": "text/event-stream"} | ({"Last-Event-ID": last_event_id} if last_event_id else {})
        timeout = httpx2.Timeout(CONNECT_SECONDS, read=SILENT_SECONDS)
        try:
            with self._http.stream("GET", path, params=given, headers=headers, timeout=timeout) as response:
                if response.status_code >= 400:
                    response.read()
                    raise api_error(response.status_code, _problem(response))
                if not response.headers.get("content-type", "").startswith("text/event-stream"):
                    raise StreamUnsupported(f"{path} is no stream")
                yield StreamEvent(OPENED)
                yield from parse(response.iter_lines())
        except (httpx2.TransportError, httpx2.StreamError, RuntimeError, ValueError) as error:
            # RuntimeError: the client was closed meanwhile, which is how a reader is told to end.
            raise ServiceUnreachable(self.url, str(error) or type(error).__name__) from error

    @contextmanager
    def download(self, path: str, headers: Mapping[str, str]) -> Iterator[httpx2.Response]:
        """An answer whose body is read by the caller, as it comes.

        Raises:
            Refused: the service said no.
            ServiceUnreachable: there was no answer, or the body was cut off.
        """
        try:
            with self._http.stream("GET", path, headers=dict(headers)) as response:
                if response.status_code >= 400:
                    response.read()
                    raise api_error(response.status_code, _problem(response))
                yield response
        except httpx2.TransportError as error:
            raise ServiceUnreachable(self.url, _cause(error)) from error

    def _with_retries(self, request: httpx2.Request, repeatable: bool) -> httpx2.Response:
        pauses = self._patience.pauses()
        while True:
            try:
                return self._once(request, repeatable)
            except RetryableError as failure:
                pause = next(pauses, None)
                if pause is None:
                    raise ServiceUnreachable(self.url, str(failure)) from failure
                time.sleep(pause)

    def _once(self, request: httpx2.Request, repeatable: bool) -> httpx2.Response:
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

    def _answer(self, response: httpx2.Response) -> Any:
        if response.status_code >= 400:
            raise api_error(response.status_code, _problem(response))
        if response.status_code == 204 or not response.content:
            return None
        try:
            return response.json()
        except ValueError:
            cause = f"what answers there is no Trainyard service ({response.status_code}, not JSON)"
            raise ServiceUnreachable(self.url, cause) from None


def address_of(url: str) -> str:
    """``localhost:8000`` as ``http://localhost:8000``. Raises NoAddress for what leads to no service."""
    whole = (url if "://" in url else f"http://{url}").rstrip("/")
    try:
        parts = urlsplit(whole)
        good = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        good = False
    if not good:
        raise InvalidUrl(url)
    return whole


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
