"""Around every request: its id, who may come in, how much it may bring, and what leaves when something breaks.

And the one strict reader of JSON bodies.
"""

import asyncio
import json
import logging
import re
import secrets
import time
from collections.abc import Awaitable, Callable
from typing import Annotated, Any, TypeVar
from urllib.parse import urlsplit

from fastapi import Depends, Request
from pydantic import BaseModel, ValidationError
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from contract.parsing import Problem, plain, pointer_to
from service import logs
from service.access.callers import NOBODY, Caller
from service.access.gatekeeper import Gatekeeper
from service.dashboard.negotiation import is_file, is_page
from service.errors import (
    BodyNotJson,
    BodyTooLarge,
    BodyTooSlow,
    ForeignHost,
    ForeignOrigin,
    HeadersTooLarge,
    RequestInvalid,
    Unauthorized,
    UrlTooLong,
    WrongMediaType,
    answer,
    from_exception,
    with_problems,
)
from service.jobs.store import JOB_ID
from service.settings import Settings
from service.telemetry import Telemetry

REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})
OPEN_PATHS = frozenset({"/health", "/ready"})
INTERNAL = "/internal/"
BODY_BYTES = 1 << 20
REPORT_BYTES = 64 << 20
URL_BYTES = 8 << 10
HEADER_BYTES = 32 << 10
BODY_SECONDS = 30.0
"""For the whole body, however it drips."""

MOST_DEEP = 64
"""Levels of arrays and objects in a body."""

LOOK_AGAIN_SECONDS = 15.0
"""So often a stream's reader is asked whether his token is still good."""

UNTIMED = ("/stream", "/files/{name}")
METHODS = frozenset({"GET", "HEAD", "OPTIONS", "POST", "PATCH", "DELETE", "PUT"})

M = TypeVar("M", bound=BaseModel)

log = logging.getLogger("trainyard")


class Gate:
    """The outermost layer: nothing passes that should not, and nothing leaves but an answer with a request id."""

    def __init__(self, app: ASGIApp, settings: Settings, telemetry: Telemetry, gatekeeper: Gatekeeper) -> None:
        self._app = app
        self._settings = settings
        self._telemetry = telemetry
        self._gatekeeper = gatekeeper

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        scope = self._settings.proxies.seen_through(scope)
        headers = Headers(scope=scope)
        request_id = _request_id(headers)
        scope["request_id"] = request_id
        answered = _Answered(send, request_id)
        begun = time.monotonic()
        with logs.about(request_id=request_id):
            try:
                self._admit(scope, headers)
                scope["caller"] = await self._caller(scope, headers)
                answered.still = lambda: self._caller(scope, headers)
                self._require_short(scope, headers)
                await self._app(scope, _Limited(receive, _limit(scope)), answered)
            except Exception as error:
                await self._refuse(error, scope, receive, answered)
            finally:
                self._account(scope, answered.status, time.monotonic() - begun)

    def _account(self, scope: Scope, status: int, seconds: float) -> None:
        """Log and count, by route and not by address: it tells no secret, and the number of series stays small."""
        method, route = _known(scope["method"]), getattr(scope.get("route"), "path", "none")
        client = (scope.get("client") or (None,))[0]
        fields = {"method": method, "route": route, "status": status or None, "seconds": round(seconds, 6)}
        log.info("request", extra={"job_id": _job_id(scope), "client": client, **fields})
        if not route.endswith(UNTIMED):
            self._telemetry.requests.labels(method, route, str(status)).observe(seconds)

    def _admit(self, scope: Scope, headers: Headers) -> None:
        if len(scope.get("raw_path") or b"") + len(scope["query_string"]) > URL_BYTES:
            raise UrlTooLong()
        if sum(len(name) + len(value) for name, value in scope["headers"]) > HEADER_BYTES:
            raise HeadersTooLarge()
        host = headers.get("host", "")
        if not _host_allowed(host, self._settings.allowed_hosts):
            raise ForeignHost()
        if scope["method"] not in SAFE_METHODS and not _same_origin(headers.get("origin"), host):
            raise ForeignOrigin()

    async def _caller(self, scope: Scope, headers: Headers) -> Caller:
        """Who asks. Raises Unauthorized."""
        if _is_open(scope, headers):
            return NOBODY
        caller = await self._gatekeeper.caller(bearer(headers.get("authorization")))
        logs.note(actor=caller.name)
        return caller

    def _require_short(self, scope: Scope, headers: Headers) -> None:
        length = headers.get("content-length", "0")
        if not length.isdecimal() or int(length[:20]) > _limit(scope):
            raise BodyTooLarge()

    async def _refuse(self, error: Exception, scope: Scope, receive: Receive, answered: "_Answered") -> None:
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
        await answer(made, scope["request_id"])(scope, receive, answered)


def _is_open(scope: Scope, headers: Headers) -> bool:
    """Whether it needs no token of the user's: the pulse, agents with their own, and the page that asks for it."""
    method, path = scope["method"], scope["path"]
    if path in OPEN_PATHS or path.startswith(INTERNAL):
        return True
    return is_page(method, path, headers.get("accept", "")) or is_file(method, path)


class _Answered:
    """Puts the request's id on the answer."""

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
            given = list(message.get("headers", ()))
            extra = [(b"x-request-id", self._request_id.encode()), (b"x-content-type-options", b"nosniff")]
            if not any(name.lower() == b"cache-control" for name, _ in given):
                extra.append((b"cache-control", b"no-store"))
            message = {**message, "headers": [*given, *extra]}
            if any(value.startswith(b"text/event-stream") for name, value in given if name.lower() == b"content-type"):
                self._looked_at = time.monotonic()
        elif self._looked_at is not None:
            await self._look_again(self._looked_at)
        await self._send(message)

    async def _look_again(self, before: float) -> None:
        """A stream may last for days; it ends with the token that opened it. Raises Unauthorized."""
        now = time.monotonic()
        if self.still is not None and now - before >= LOOK_AGAIN_SECONDS:
            self._looked_at = now
            await self.still()

    async def cut(self) -> None:
        """End what has begun: a stream without its last event, whose reader comes again and hears why."""
        await self._send({"type": "http.response.body", "body": b"", "more_body": False})


class _Limited:
    """Stops reading a body that is longer than it may be, chunked or not, or that takes too long to come."""

    def __init__(self, receive: Receive, limit: int) -> None:
        self._receive = receive
        self._left = limit
        self._deadline: float | None = asyncio.get_running_loop().time() + BODY_SECONDS

    async def __call__(self) -> Message:
        try:
            async with asyncio.timeout_at(self._deadline):
                message = await self._receive()
        except TimeoutError:
            raise BodyTooSlow() from None
        if not message.get("more_body", False):
            self._deadline = None
        if message["type"] == "http.request":
            self._left -= len(message.get("body", b""))
            if self._left < 0:
                raise BodyTooLarge()
        return message


def described(schema: dict[str, Any]) -> dict[str, Any]:
    """What the OpenAPI document says of a JSON body that we read ourselves."""
    return {"requestBody": {"content": {"application/json": {"schema": schema}}}}


def described_fields(properties: dict[str, Any]) -> dict[str, Any]:
    """The same for an object of these members and no others."""
    return described({"type": "object", "additionalProperties": False, "properties": properties})


def described_model(model: type[BaseModel]) -> dict[str, Any]:
    """The same for a body that `as_model` reads."""
    return described(model.model_json_schema())


def as_model(model: type[M], body: object) -> M:
    """A body as a model. Raises RequestInvalid with the first mistakes, without what was given."""
    try:
        return model.model_validate(body)
    except ValidationError as error:
        found = error.errors(include_input=False, include_url=False, include_context=False)
        problems = [Problem(pointer_to(*e["loc"]), plain(e["msg"])) for e in found[:20]]
        raise with_problems(RequestInvalid, problems) from None


def bearer(header: str | None) -> str:
    """The token of an Authorization header, or ''."""
    scheme, _, token = (header or "").partition(" ")
    return token.strip() if scheme.lower() == "bearer" else ""


def _request_id(headers: Headers) -> str:
    given = headers.get("x-request-id", "")
    return given if REQUEST_ID.fullmatch(given) else f"req_{secrets.token_hex(8)}"


def _job_id(scope: Scope) -> str | None:
    """The job in the address, where it can be one."""
    given = scope.get("path_params", {}).get("job_id", "")
    return given if JOB_ID.fullmatch(given) else None


def _known(method: str) -> str:
    return method if method in METHODS else "other"


def _limit(scope: Scope) -> int:
    return REPORT_BYTES if scope["path"].startswith(INTERNAL) else BODY_BYTES


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


async def _json_body(request: Request) -> Any:
    """The body as a JSON value; None where there is none. NaN stays for the field that gets it to refuse."""
    body = await request.body()
    if not body.strip():
        return None
    media_type = request.headers.get("content-type", "application/json").partition(";")[0].strip().lower()
    if media_type != "application/json" and not media_type.endswith("+json"):
        raise WrongMediaType()
    try:
        return _shallow(json.loads(body.decode(), object_pairs_hook=_without_doubles))
    except RecursionError:
        raise BodyNotJson(TOO_DEEP) from None
    except UnicodeDecodeError:
        raise BodyNotJson("The body is not UTF-8.") from None
    except json.JSONDecodeError as error:
        raise BodyNotJson(f"The body is not JSON: line {error.lineno}, column {error.colno}.") from None
    except ValueError:
        raise BodyNotJson("The body holds a number that is far too long.") from None


TOO_DEEP = f"The body is nested more than {MOST_DEEP} levels deep."


def _shallow(value: Any) -> Any:
    """The value, which everything behind this may walk through by recursion. Raises BodyNotJson."""
    level = [value]
    for _ in range(MOST_DEEP + 1):
        inner = [
            found.values() if isinstance(found, dict) else found for found in level if isinstance(found, dict | list)
        ]
        if not inner:
            return value
        level = [found for part in inner for found in part]
    raise BodyNotJson(TOO_DEEP)


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        raise BodyNotJson("The body has an object with the same key twice.")
    return value


JsonBody = Annotated[Any, Depends(_json_body)]
"""A `def` endpoint's body, read strictly."""
