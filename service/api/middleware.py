"""Around every request: its id, who may come in, how much it may bring, and what leaves when something breaks."""

import asyncio
import logging
import re
import secrets
import time
from collections.abc import Awaitable, Callable
from http import HTTPStatus
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.middleware.body_limit import RequestBodyLimitMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from trainyard.service.auth.authenticator import Authenticator
from trainyard.service.auth.principal import ANONYMOUS, Principal
from trainyard.service.dashboard.negotiation import is_file, is_page
from trainyard.service.errors import (
    BodyTooLarge,
    CrossOrigin,
    HeadersTooLarge,
    HostNotAllowed,
    Unauthorized,
    UrlTooLong,
    from_exception,
    problem_response,
)
from trainyard.service.ids import JOB_ID
from trainyard.service.observability.logging import bind, log_context
from trainyard.service.observability.prometheus import ServiceMetrics
from trainyard.service.settings import Settings

REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})
OPEN_PATHS = frozenset({"/health", "/ready"})
INTERNAL = "/internal/"
MAX_BODY_BYTES = 1 << 20
MAX_REPORT_BYTES = 64 << 20
MAX_URL_BYTES = 8 << 10
MAX_HEADER_BYTES = 32 << 10
MAX_BODY_SECONDS = 30.0
"""For the whole body, however slowly it comes."""

TOKEN_RECHECK_SECONDS = 15.0
"""Between two checks that the token of a stream's reader is still valid."""

STREAM = "/stream"
UNTIMED = (STREAM, "/files/{name}")
METHODS = frozenset({"GET", "HEAD", "OPTIONS", "POST", "PATCH", "DELETE", "PUT"})

log = logging.getLogger("trainyard")


class RequestMiddleware:
    """The middleware that checks each request, gives it an id, answers its errors, and logs and counts it."""

    def __init__(self, app: ASGIApp, settings: Settings, telemetry: ServiceMetrics, gatekeeper: Authenticator) -> None:
        self._app = app
        self._settings = settings
        self._telemetry = telemetry
        self._gatekeeper = gatekeeper

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        scope = self._settings.proxies.rewrite_scope(scope)
        headers = Headers(scope=scope)
        request_id = _request_id(headers)
        scope["request_id"] = request_id
        answered = _ResponseHeaders(send, request_id)
        begun = time.monotonic()
        with log_context(request_id=request_id):
            try:
                self._validate(scope, headers)
                scope["caller"] = await self._caller(scope, headers)
                answered.still = lambda: self._caller(scope, headers)
                self._require_short(scope, headers)
                await RequestBodyLimitMiddleware(self._app, _limit(scope))(scope, _timed(receive), answered)
            except Exception as error:
                await self._error_response(error, scope, receive, answered)
            finally:
                self._log_and_measure(scope, answered.status, time.monotonic() - begun)

    def _log_and_measure(self, scope: Scope, status: int, seconds: float) -> None:
        """Log and count by route, not by URL: a URL may hold a secret, and the number of series must stay small."""
        method, route = _known_method(scope["method"]), getattr(scope.get("route"), "path", "none")
        client = (scope.get("client") or (None,))[0]
        fields = {"method": method, "route": route, "status": status or None, "seconds": round(seconds, 6)}
        log.info("request", extra={"job_id": _job_id(scope), "client": client, **fields})
        if not route.endswith(UNTIMED):
            self._telemetry.requests.labels(method, route, str(status)).observe(seconds)

    def _validate(self, scope: Scope, headers: Headers) -> None:
        if len(scope.get("raw_path") or b"") + len(scope["query_string"]) > MAX_URL_BYTES:
            raise UrlTooLong()
        if sum(len(name) + len(value) for name, value in scope["headers"]) > MAX_HEADER_BYTES:
            raise HeadersTooLarge()
        host = headers.get("host", "")
        if not _host_allowed(host, self._settings.allowed_hosts):
            raise HostNotAllowed()
        if scope["method"] not in SAFE_METHODS and not _same_origin(headers.get("origin"), host):
            raise CrossOrigin()

    async def _caller(self, scope: Scope, headers: Headers) -> Principal:
        """Return the caller. Raises Unauthorized."""
        if _is_open(scope, headers):
            return ANONYMOUS
        caller = await self._gatekeeper.authenticate(bearer(headers.get("authorization")))
        bind(actor=caller.name)
        return caller

    def _require_short(self, scope: Scope, headers: Headers) -> None:
        length = headers.get("content-length", "0")
        if not length.isdecimal() or int(length[:20]) > _limit(scope):
            raise BodyTooLarge()

    async def _error_response(
        self, error: Exception, scope: Scope, receive: Receive, answered: "_ResponseHeaders"
    ) -> None:
        made = from_exception(error)
        if made.status == 500:
            log.error("a request failed", exc_info=error)
        elif made.status > 500:
            log.warning("a request was refused: %s", error, extra={"code": made.code})
        if answered.begun and isinstance(error, Unauthorized):
            await answered.cut()
            return
        if answered.begun:
            raise error
        await problem_response(made, scope["request_id"])(scope, receive, answered)


def _is_open(scope: Scope, headers: Headers) -> bool:
    """Return whether it needs no user token: health, agents (they have their own), the page that asks for a token."""
    method, path = scope["method"], scope["path"]
    if path in OPEN_PATHS or path.startswith(INTERNAL):
        return True
    return is_page(method, path, headers.get("accept", "")) or is_file(method, path)


class _ResponseHeaders:
    """Adds the headers that every response has, and checks the token of a stream again."""

    def __init__(self, send: Send, request_id: str) -> None:
        self._send = send
        self._request_id = request_id
        self.begun = False
        self.status = 0
        self.still: Callable[[], Awaitable[object]] | None = None
        self._looked_at: float | None = None

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.begun = True
            self.status = message["status"]
            headers = MutableHeaders(scope=message)
            headers["x-request-id"] = self._request_id
            headers["x-content-type-options"] = "nosniff"
            headers.setdefault("cache-control", "no-store")
            if headers.get("content-type", "").startswith("text/event-stream"):
                self._looked_at = time.monotonic()
        elif self._looked_at is not None:
            await self._look_again(self._looked_at)
        await self._send(message)

    async def _look_again(self, before: float) -> None:
        """End a stream, which may last for days, when its token is revoked or expires. Raises Unauthorized."""
        now = time.monotonic()
        if self.still is not None and now - before >= TOKEN_RECHECK_SECONDS:
            self._looked_at = now
            await self.still()

    async def cut(self) -> None:
        """End a response that has begun. A stream gets no `end` event: its reader connects again and gets the 401."""
        await self._send({"type": "http.response.body", "body": b"", "more_body": False})


def _timed(receive: Receive) -> Receive:
    """Raise HTTPException (408) if the body is not complete in time, however slowly it comes."""
    deadline: float | None = asyncio.get_running_loop().time() + MAX_BODY_SECONDS

    async def timed() -> Message:
        nonlocal deadline
        try:
            async with asyncio.timeout_at(deadline):
                message = await receive()
        except TimeoutError:
            # Not a ServiceError: where FastAPI reads the body itself, it turns all but an HTTPException into 400.
            raise HTTPException(HTTPStatus.REQUEST_TIMEOUT) from None
        if not message.get("more_body", False):
            deadline = None
        return message

    return timed


class HeadMiddleware:
    """The middleware that answers HEAD as GET. The server leaves the body out.

    HEAD of a stream gets 405: the answer would never be complete.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http" or scope["method"] != "HEAD" or scope["path"].endswith(STREAM):
            await self._app(scope, receive, send)
            return
        as_get = {**scope, "method": "GET"}
        try:
            await self._app(as_get, receive, send)
        finally:
            # The outer middleware counts by route and looks for it in its own scope.
            scope["route"] = as_get.get("route")


def bearer(header: str | None) -> str:
    """The token of an Authorization header, or ''."""
    scheme, _, token = (header or "").partition(" ")
    return token.strip() if scheme.lower() == "bearer" else ""


def _request_id(headers: Headers) -> str:
    given = headers.get("x-request-id", "")
    return given if REQUEST_ID.fullmatch(given) else f"req_{secrets.token_hex(8)}"


def _job_id(scope: Scope) -> str | None:
    """Return the job id in the path, if it is a valid one."""
    given = scope.get("path_params", {}).get("job_id", "")
    return given if JOB_ID.fullmatch(given) else None


def _known_method(method: str) -> str:
    return method if method in METHODS else "other"


def _limit(scope: Scope) -> int:
    return MAX_REPORT_BYTES if scope["path"].startswith(INTERNAL) else MAX_BODY_BYTES


# Why not Starlette's TrustedHostMiddleware: docs/decisions/0014.
def _host_allowed(header: str, allowed: tuple[str, ...]) -> bool:
    if "*" in allowed:
        return True
    try:
        return (urlsplit(f"//{header}").hostname or "") in allowed
    except ValueError:
        return False


def _same_origin(origin: str | None, host: str) -> bool:
    """Browsers send Origin with every unsafe request; other clients send none."""
    if origin is None:
        return True
    try:
        return bool(host) and urlsplit(origin).netloc.lower() == host.lower()
    except ValueError:
        return False
