"""Responses to GET that all readers share, with an `ETag`: computed once per change of the database.

A client that polls sends the tag of its last response (`If-None-Match`), and gets 304 without a body while it is the
same. No response is older than the last commit: before each one, the version of the database is read.
"""

import asyncio
import hashlib
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Hashable
from dataclasses import dataclass, field, replace
from http import HTTPStatus
from typing import Any, TypeVar

from fastapi import Request
from sqlalchemy import Connection
from starlette.responses import Response

from trainyard.service.db.engine import Database
from trainyard.service.db.versions import DatabaseVersion
from trainyard.service.ids import JOB_ID

MAX_AGE_SECONDS = 1.0
"""For what is not in the database: the clock ("checkpoint 5 s ago"), and files that were removed by hand."""

MAX_TOTAL_BYTES = 32 << 20
MAX_BODY_BYTES = 4 << 20

REVALIDATE = "private, no-cache"
"""Caches of browsers keep the response, and ask for each use whether it is still the same."""

SHARED = "trainyard_shared"
Endpoint = TypeVar("Endpoint", bound=Callable[..., Any])

Handle = Callable[[Request], Awaitable[Response]]
Part = Callable[[Connection, str, bytes], object]
"""(connection, job id, query string) -> rows that an expensive response depends on."""

Key = tuple[Hashable, ...]


def shared(part: Part | None = None) -> Callable[[Endpoint], Endpoint]:
    """Mark an endpoint whose response depends only on its URL, `Accept` and the database, not on the caller.

    ``part`` returns what the response depends on, if that is less than the whole database: if it is equal to what it
    was, so is the response. It may return None, for all of the database.
    """

    def mark(endpoint: Endpoint) -> Endpoint:
        setattr(endpoint, SHARED, Sharing(part))
        return endpoint

    return mark


@dataclass(frozen=True)
class Sharing:
    """How an endpoint's responses are shared, see `shared`."""

    part: Part | None


@dataclass(frozen=True)
class SharedResponse:
    """A response as it was computed. ``version``, ``part``: of the database, read before it was computed."""

    version: Hashable
    part: object
    expires_at: float
    body: bytes
    headers: dict[str, str]
    etag: str

    @property
    def size(self) -> int:
        """Its bytes, about."""
        return len(self.body) + 500

    def to_response(self, if_none_match: str | None) -> Response:
        """Return the response to one request: 304 if its `If-None-Match` names the tag."""
        if if_none_match is not None and names_tag(if_none_match, self.etag):
            kept = {name: value for name, value in self.headers.items() if name != "content-type"}
            return Response(status_code=HTTPStatus.NOT_MODIFIED, headers=kept)
        return Response(self.body, headers=self.headers)


@dataclass
class _Flight:
    """A response that is being computed. ``result``: None if it cannot be shared, as an error."""

    version: Hashable
    result: "asyncio.Future[SharedResponse | None]" = field(
        default_factory=lambda: asyncio.get_running_loop().create_future()
    )


class SharedReads:
    """The newest response of each URL that is read. Call it in the event loop's thread.

    ``memory_version``: changes with what responses show of the memory of this process.
    """

    def __init__(
        self,
        database: Database,
        memory_version: Callable[[], Hashable] = lambda: 0,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._database = database
        self._database_version = DatabaseVersion(database)
        self._memory_version = memory_version
        self.monotonic = monotonic
        self._responses: OrderedDict[Key, SharedResponse] = OrderedDict()
        self.kept_bytes = 0
        self._flights: dict[Key, _Flight] = {}

    async def respond(self, request: Request, sharing: Sharing, handle: Handle) -> Response:
        """Return the current response; ``handle`` computes it if no current one is known."""
        if_none_match = request.headers.get("if-none-match")
        version = await self._version()
        if version is None:
            return await handle(request)
        scope = request.scope
        key = (scope["path"], scope["query_string"], request.headers.get("accept"), scope.get("forwarded_prefix"))
        known = self._responses.get(key)
        if known is not None and known.version == version and self.monotonic() < known.expires_at:
            self._responses.move_to_end(key)
            return known.to_response(if_none_match)
        flight = self._flights.get(key)
        if flight is not None and flight.version == version:
            # It began after the last commit, so it shows that commit.
            known = await asyncio.shield(flight.result)
            return known.to_response(if_none_match) if known is not None else await handle(request)
        return await self._compute(request, sharing, handle, key, version, if_none_match)

    async def _version(self) -> Hashable | None:
        version = await self._database_version.read()
        return None if version is None else (version, self._memory_version())

    async def _compute(
        self,
        request: Request,
        sharing: Sharing,
        handle: Handle,
        key: Key,
        version: Hashable,
        if_none_match: str | None,
    ) -> Response:
        flight = self._flights[key] = _Flight(version)
        computed: SharedResponse | None = None
        try:
            expires_at = self.monotonic() + MAX_AGE_SECONDS
            part = await asyncio.to_thread(self._read_part, sharing.part, request) if sharing.part is not None else None
            known = self._responses.get(key)
            if known is not None and part is not None and known.part == part:
                computed = replace(known, version=version, expires_at=expires_at)
            else:
                response = await handle(request)
                computed = _to_shared(response, version, part, expires_at)
                if computed is None:
                    return response
            if self._flights.get(key) is flight:
                self._keep(key, computed)
            return computed.to_response(if_none_match)
        finally:
            flight.result.set_result(computed)
            if self._flights.get(key) is flight:
                del self._flights[key]

    def _read_part(self, part: Part, request: Request) -> object:
        job_id = request.path_params["job_id"]
        if not JOB_ID.fullmatch(job_id):
            return None
        with self._database.connection() as connection:
            return part(connection, job_id, request.scope["query_string"])

    def _keep(self, key: Key, response: SharedResponse) -> None:
        before = self._responses.pop(key, None)
        self.kept_bytes -= before.size if before is not None else 0
        if len(response.body) > MAX_BODY_BYTES:
            return
        self._responses[key] = response
        self.kept_bytes += response.size
        while self.kept_bytes > MAX_TOTAL_BYTES:
            self.kept_bytes -= self._responses.popitem(last=False)[1].size

    def close(self) -> None:
        """Close the connection to the database."""
        self._database_version.close()


def _to_shared(response: Response, version: Hashable, part: object, expires_at: float) -> SharedResponse | None:
    if response.status_code != HTTPStatus.OK:
        return None
    body = bytes(response.body)
    headers = {name: value for name, value in response.headers.items() if name != "content-length"}
    # The headers too: of CSV, only the Link header says that there is a next page.
    digest = hashlib.blake2b(repr(sorted(headers.items())).encode(), digest_size=12)
    digest.update(body)
    etag = f'"{digest.hexdigest()}"'
    headers |= {"etag": etag, "cache-control": REVALIDATE, "vary": "Accept"}
    return SharedResponse(version, part, expires_at, body, headers, etag)


def names_tag(if_none_match: str, etag: str) -> bool:
    """Return whether the header names the tag, by the weak comparison of RFC 9110."""
    names = [name.strip().removeprefix("W/") for name in if_none_match.split(",")]
    return etag in names or names == ["*"]
