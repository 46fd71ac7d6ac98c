"""Middleware around every request: request id, authentication, size limits, errors, log line and metrics."""

import asyncio
import contextlib
import logging
import re
import secrets
import time
from collections.abc import Awaitable, Callable, Iterator
from http import HTTPStatus
from urllib.parse import urlsplit

from sqlalchemy.exc import SQLAlchemyError
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.middleware.body_limit import RequestBodyLimitMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from trainyard.service import descriptors
from trainyard.service.auth.authenticator import Authenticator
from trainyard.service.auth.principal import ANONYMOUS, Principal
from trainyard.service.dashboard.negotiation import is_file, is_page
from trainyard.service.errors import (
    BodyTooLarge,
    CrossOrigin,
    HeadersTooLarge,
    HostNotAllowed,
    Overloaded,
    PathPrefix,
    ServiceError,
    Unauthorized,
    UrlTooLong,
    error_response,
    from_exception,
)
from trainyard.service.ids import JOB_ID
from trainyard.service.observability.logging import bind, log_context
from trainyard.service.observability.prometheus import ServiceMetrics
from trainyard.service.settings import Settings
from trainyard.service.storage.range_response import WITHOUT_BODY

REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})
OPEN_PATHS = frozenset({"/health", "/ready"})
DOCUMENTATION = ("/llms.txt", "/docs/")
INTERNAL = "/internal/"
MAX_BODY_BYTES = 1 << 20
MAX_REPORT_BYTES = 64 << 20
MAX_URL_BYTES = 8 << 10
MAX_HEADER_BYTES = 32 << 10
CLIENT_LEFT = 499
"""Status of a request in log and metrics if its client disconnected in the middle of the body, as in nginx."""

MAX_BODY_SECONDS = 30.0
"""Time for the whole body, however slowly it arrives."""

TOKEN_RECHECK_SECONDS = 15.0
"""Interval at which the token of an open stream is checked again."""

PERIODIC_ROUTES = frozenset(
    {
        "/health",
        "/ready",
        "/metrics",
        "/internal/attempts/{attempt_id}/events",
        "/internal/attempts/{attempt_id}/heartbeat",
    }
)
"""Routes that programs call every few seconds. If they succeed, they are logged only at level debug."""

STREAM = "/stream"
MCP = "/mcp"
UNTIMED = (STREAM, "/files/{name}", "/generate", "/v1/completions", MCP)
"""Ends of routes whose duration is not measured: it depends on the client, or on what it asks for."""

METHODS = frozenset({"GET", "HEAD", "OPTIONS", "POST", "PATCH", "DELETE", "PUT"})

log = logging.getLogger("trainyard")


class RequestMiddleware:
    """Validates and authenticates each request, gives it an id, converts its errors, and logs and counts it."""

    def __init__(self, app: ASGIApp, settings: Settings, metrics: ServiceMetrics, authenticator: Authenticator) -> None:
        self._app = app
        self._settings = settings
        self._metrics = metrics
        self._authenticator = authenticator
        self._running = 0
        self._running_mcp = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        scope = self._settings.proxies.rewrite_scope(scope)
        headers = Headers(scope=scope)
        request_id = _request_id(headers)
        scope["request_id"] = request_id
        response = _ResponseSender(send, request_id, scope.get("forwarded_prefix", ""))
        started_at = time.monotonic()
        with log_context(request_id=request_id):
            try:
                self._validate(scope, headers)
                scope["caller"] = await self._authenticate(scope, headers)
                response.reauthenticate = lambda: self._authenticate(scope, headers)
                self._check_content_length(scope, headers)
                limited_app = RequestBodyLimitMiddleware(self._app, _max_body_bytes(scope))
                with self._request_slot(scope):
                    await limited_app(scope, _with_deadline(receive, response), response)
            except Exception as error:
                # A disconnect in the middle of the body is no error of the service, and needs no response.
                if not response.client_left:
                    await self._send_error(error, scope, receive, response)
            finally:
                self._log_and_measure(scope, response.status, time.monotonic() - started_at)

    def _log_and_measure(self, scope: Scope, status: int, seconds: float) -> None:
        # By route, not by URL: a URL may contain a secret, and the number of series must stay small.
        method = scope["method"] if scope["method"] in METHODS else "other"
        route = getattr(scope.get("route"), "path", "none")
        client = (scope.get("client") or (None,))[0]
        fields = {"method": method, "route": route, "status": status or None, "seconds": round(seconds, 6)}
        # Otherwise two of three lines are those of agents, health checks and polling clients.
        is_periodic = route in PERIODIC_ROUTES and HTTPStatus.OK <= status < HTTPStatus.BAD_REQUEST
        is_routine = is_periodic or status == HTTPStatus.NOT_MODIFIED
        level = logging.DEBUG if is_routine else logging.INFO
        log.log(level, "request", extra={"job_id": _job_id(scope), "client": client, **fields})
        if not route.endswith(UNTIMED):
            self._metrics.requests.labels(method, route, str(status)).observe(seconds)

    def _validate(self, scope: Scope, headers: Headers) -> None:
        if len(scope.get("raw_path") or b"") + len(scope["query_string"]) > MAX_URL_BYTES:
            raise UrlTooLong()
        if sum(len(name) + len(value) for name, value in scope["headers"]) > MAX_HEADER_BYTES:
            raise HeadersTooLarge()
        host = headers.get("host", "")
        # HTTP/1.0 has no Host. The check protects browsers, and they always send one.
        is_nameless = "host" not in headers and scope["http_version"] == "1.0"
        if not is_nameless and not _host_allowed(host, self._settings.allowed_hosts):
            raise HostNotAllowed()
        if scope.get("forwarded_prefix") and is_page(scope["method"], scope["path"], headers.get("accept", "")):
            raise PathPrefix()
        if scope["method"] not in SAFE_METHODS and not _same_origin(headers.get("origin"), host):
            raise CrossOrigin()
        if headers.get("sec-fetch-site") == "cross-site" and not _is_followed_link(scope, headers):
            raise CrossOrigin()

    async def _authenticate(self, scope: Scope, headers: Headers) -> Principal:
        if _is_open(scope, headers):
            return ANONYMOUS
        caller = await self._authenticator.authenticate(bearer(headers.get("authorization")))
        bind(actor=caller.name)
        return caller

    def _check_content_length(self, scope: Scope, headers: Headers) -> None:
        length = headers.get("content-length", "0")
        if not length.isdecimal() or int(length[:20]) > _max_body_bytes(scope):
            raise BodyTooLarge()

    @contextlib.contextmanager
    def _request_slot(self, scope: Scope) -> Iterator[None]:
        """Count the request while it runs. Raises Overloaded if too many run. Streams have a limit of their own.

        A request to /mcp may wait for a minute, and it sends requests of its own: those get at most half of the slots.
        """
        path = scope["path"]
        if path in OPEN_PATHS or path.startswith(INTERNAL) or path.endswith(STREAM):
            yield
            return
        is_mcp = path == MCP
        if self._running >= descriptors.max_requests():
            descriptors.warn("requests are rejected")
            raise Overloaded(headers={"Retry-After": "5"})
        if is_mcp and self._running_mcp >= descriptors.max_requests() // 2:
            raise Overloaded(headers={"Retry-After": "5"})
        self._running += 1
        self._running_mcp += is_mcp
        try:
            yield
        finally:
            self._running -= 1
            self._running_mcp -= is_mcp

    async def _send_error(
        self, exception: Exception, scope: Scope, receive: Receive, response: "_ResponseSender"
    ) -> None:
        error = from_exception(exception)
        if descriptors.is_exhausted(exception):
            descriptors.warn("requests fail")
        elif error.status == 500:
            log.error("a request failed", exc_info=exception)
        elif error.status > 500 and not isinstance(error, Overloaded):
            log.warning("a request was rejected: %s", exception, extra={"code": error.code})
        if response.started and isinstance(exception, Unauthorized):
            await response.end_stream()
            return
        if response.started:
            raise exception
        await error_response(error, scope["path"], scope["request_id"])(scope, receive, response)


def _is_open(scope: Scope, headers: Headers) -> bool:
    """Return whether no user token is needed.

    That is for health checks, agents (they have their own), the documentation and the dashboard.
    """
    method, path = scope["method"], scope["path"]
    if (
        path in OPEN_PATHS
        or path.startswith(INTERNAL)
        or (method in ("GET", "HEAD") and path.startswith(DOCUMENTATION))
    ):
        return True
    return is_page(method, path, headers.get("accept", "")) or is_file(method, path)


class _ResponseSender:
    """The ASGI ``send`` of a request. Adds the headers that every response has, and checks a stream's token again."""

    def __init__(self, send: Send, request_id: str, prefix: str) -> None:
        self._send = send
        self._prefix = prefix
        self._request_id = request_id
        self.started = False
        self.status = 0
        self.client_left = False
        self.reauthenticate: Callable[[], Awaitable[object]] | None = None
        self._token_checked_at: float | None = None

    def on_client_left(self) -> None:
        """Record that the client disconnected before its body was complete. Nothing more is sent."""
        self.client_left = True
        self.status = CLIENT_LEFT

    async def __call__(self, message: Message) -> None:
        if self.client_left:
            return
        if message["type"] == "http.response.start":
            self.started = True
            self.status = message["status"]
            headers = MutableHeaders(scope=message)
            headers["x-request-id"] = self._request_id
            headers["x-content-type-options"] = "nosniff"
            headers.setdefault("cache-control", "no-store")
            if self._prefix:
                _add_prefix(headers, self._prefix)
            if headers.get("content-type", "").startswith("text/event-stream"):
                self._token_checked_at = time.monotonic()
        elif self._token_checked_at is not None:
            await self._recheck_token(self._token_checked_at)
        await self._send(message)

    async def _recheck_token(self, checked_at: float) -> None:
        # A stream may last for days: it must end when its token is revoked or expires.
        now = time.monotonic()
        if self.reauthenticate is not None and now - checked_at >= TOKEN_RECHECK_SECONDS:
            self._token_checked_at = now
            try:
                await self.reauthenticate()
            except Unauthorized:
                raise
            except (SQLAlchemyError, ServiceError) as error:
                # The database is unavailable. The stream stays open until a later check.
                log.warning("the token of a stream could not be checked: %s", type(error).__name__)

    async def end_stream(self) -> None:
        """End the response without the stream's `end` event: the client connects again and gets a 401."""
        await self._send({"type": "http.response.body", "body": b"", "more_body": False})


def _add_prefix(headers: MutableHeaders, prefix: str) -> None:
    """Add the path prefix of the proxy to the addresses in the headers."""
    for name, start in (("location", "/"), ("link", "</")):
        value = headers.get(name, "")
        if value.startswith(start):
            headers[name] = value.replace("/", f"{prefix}/", 1)


def _with_deadline(receive: Receive, response: _ResponseSender) -> Receive:
    """Return ``receive`` with a time limit for the whole body, after which it raises HTTPException (408).

    If the client disconnects before its body is complete, ``response`` is informed.
    """
    deadline: float | None = asyncio.get_running_loop().time() + MAX_BODY_SECONDS

    async def receive_in_time() -> Message:
        nonlocal deadline
        try:
            async with asyncio.timeout_at(deadline):
                message = await receive()
        except TimeoutError:
            # Not a ServiceError: FastAPI turns all errors but HTTPException, raised while it reads a body, into a 400.
            raise HTTPException(HTTPStatus.REQUEST_TIMEOUT) from None
        if message["type"] == "http.disconnect" and deadline is not None:
            response.on_client_left()
        if not message.get("more_body", False):
            deadline = None
        return message

    return receive_in_time


class HeadMiddleware:
    """Handles HEAD as GET; the server drops the body. HEAD of a stream gets 405, because it would never end.

    The scope has the key WITHOUT_BODY, so that a response can leave out a body that is expensive to read.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "HEAD" or scope["path"].endswith(STREAM):
            await self._app(scope, receive, send)
            return
        as_get = {**scope, "method": "GET", WITHOUT_BODY: True}
        try:
            await self._app(as_get, receive, send)
        finally:
            # RequestMiddleware counts by route and reads it from the original scope.
            scope["route"] = as_get.get("route")


def bearer(header: str | None) -> str:
    """Return the token of an Authorization header, or ''."""
    scheme, _, token = (header or "").partition(" ")
    return token.strip() if scheme.lower() == "bearer" else ""


def _request_id(headers: Headers) -> str:
    request_id = headers.get("x-request-id", "")
    return request_id if REQUEST_ID.fullmatch(request_id) else f"req_{secrets.token_hex(8)}"


def _job_id(scope: Scope) -> str | None:
    job_id = scope.get("path_params", {}).get("job_id", "")
    return job_id if JOB_ID.fullmatch(job_id) else None


def _max_body_bytes(scope: Scope) -> int:
    return MAX_REPORT_BYTES if scope["path"].startswith(INTERNAL) else MAX_BODY_BYTES


# Why not Starlette's TrustedHostMiddleware: docs/decisions/0014.
def _host_allowed(header: str, allowed: tuple[str, ...]) -> bool:
    if "*" in allowed:
        return True
    try:
        return (urlsplit(f"//{header}").hostname or "") in allowed
    except ValueError:
        return False


def _is_followed_link(scope: Scope, headers: Headers) -> bool:
    """Return whether a browser opens a page of the dashboard, such as from a link in a chat."""
    is_navigation = headers.get("sec-fetch-mode") == "navigate" and headers.get("sec-fetch-dest") == "document"
    return is_navigation and is_page(scope["method"], scope["path"], headers.get("accept", ""))


def _same_origin(origin: str | None, host: str) -> bool:
    # Browsers send Origin with every unsafe request; other clients send none.
    if origin is None:
        return True
    try:
        return bool(host) and urlsplit(origin).netloc.lower() == host.lower()
    except ValueError:
        return False
