"""Authentication of requests by their token."""

import contextlib
import time
from datetime import datetime, timedelta

from sqlalchemy.exc import SQLAlchemyError
from starlette.concurrency import run_in_threadpool

from trainyard.service.auth import api_keys
from trainyard.service.auth.api_keys import ApiKey
from trainyard.service.auth.principal import ADMIN, LOCAL, Principal
from trainyard.service.clock import utc_now
from trainyard.service.db.engine import Database
from trainyard.service.errors import ServiceError, Unauthorized
from trainyard.service.settings import Settings
from trainyard.service.static_tokens import TokenFile

CACHE_SECONDS = 1.0
"""Maximum age of a cached token: a revocation by another service takes effect here within this time."""

LAST_USED_INTERVAL = timedelta(minutes=10)
"""`last_used_at` is written at most this often: each write is a commit to the disk."""


class Authenticator:
    """Authenticates static tokens (settings) and API keys (database). With no static token set, a token is optional."""

    def __init__(self, settings: Settings, database: Database) -> None:
        self._tokens = TokenFile(settings.token, settings.token_file)
        self._database = database
        self._cache: dict[str, tuple[ApiKey, float]] = {}
        self._changes = 0
        # When the service last tried to write the time of use, by id of the token.
        self._recorded_at: dict[str, datetime] = {}

    async def authenticate(self, token: str) -> Principal:
        """Return the owner of the token. Raises Unauthorized."""
        token_id = api_keys.parse_id(token)
        if token_id is not None:
            cached = self._cached(token_id)
            key = cached if cached is not None else await run_in_threadpool(self._load, token_id)
            return await self._authenticate_key(key, token)
        # A malformed named token is rejected even if no token is required.
        if not self._tokens.is_required and not token.startswith(api_keys.PREFIX):
            return LOCAL
        self._tokens.require(token)
        return ADMIN

    def clear_cache(self) -> None:
        """Forget all cached tokens, after a change of one."""
        self._changes += 1
        self._cache.clear()

    async def _authenticate_key(self, key: ApiKey | None, token: str) -> Principal:
        now = utc_now()
        reason = api_keys.rejection_reason(key, token, now)
        if reason is not None or key is None:
            raise Unauthorized(reason)
        recorded = [at for at in (key.last_used_at, self._recorded_at.get(key.id)) if at is not None]
        if not recorded or now - max(recorded) >= LAST_USED_INTERVAL:
            # Set before the write, which may wait for half a minute: only one request may wait.
            self._recorded_at[key.id] = now
            await run_in_threadpool(self._record_use, key.id, now)
        return Principal(key.name, key.scope, key.id)

    def _cached(self, token_id: str) -> ApiKey | None:
        key, loaded_at = self._cache.get(token_id, (None, 0.0))
        return key if time.monotonic() - loaded_at < CACHE_SECONDS else None

    def _load(self, token_id: str) -> ApiKey | None:
        now, changes = time.monotonic(), self._changes
        with self._database.read() as session:
            key = api_keys.find_api_key(session, token_id)
        # Not cached if a token was changed meanwhile: this may be the state before the change.
        if key is not None and changes == self._changes:
            self._cache[token_id] = key, now
        return key

    def _record_use(self, token_id: str, now: datetime) -> None:
        # The request continues even if the time of use cannot be written.
        with contextlib.suppress(SQLAlchemyError, ServiceError), self._database.write() as session:
            api_keys.record_use(session, token_id, now)
