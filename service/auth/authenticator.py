"""Lets in who has a good token, and says who that is. One for a service; asked once a request."""

import contextlib
import time
from dataclasses import replace
from datetime import timedelta

from sqlalchemy.exc import SQLAlchemyError
from starlette.concurrency import run_in_threadpool

from trainyard.service.auth import api_keys, store
from trainyard.service.auth.api_keys import ApiKey
from trainyard.service.auth.principal import ADMIN, LOCAL, Principal
from trainyard.service.clock import utc_now
from trainyard.service.db.engine import Database
from trainyard.service.errors import Unauthorized
from trainyard.service.settings import Settings
from trainyard.service.static_tokens import TokenFile

CACHE_SECONDS = 1.0
"""How old our knowledge of a token may be: so long another server's revocation may take to reach this one."""

LAST_USED_INTERVAL = timedelta(minutes=10)
"""Uses that come closer together are not written: each write is a commit to the disk."""


class Authenticator:
    """The tokens of the settings and those with names. Without the former nobody needs one, but a named one counts."""

    def __init__(self, settings: Settings, database: Database) -> None:
        self._tokens = TokenFile(settings.token, settings.token_file)
        self._database = database
        self._known: dict[str, tuple[ApiKey, float]] = {}
        self._changes = 0

    async def authenticate(self, token: str) -> Principal:
        """Who has this token. Raises Unauthorized."""
        token_id = api_keys.parse_id(token)
        if token_id is not None:
            known = self._remembered(token_id)
            grant = known if known is not None else await run_in_threadpool(self._look_up, token_id)
            return await self._authenticate_key(grant, token)
        # Half of a named token is nobody's, also where none is needed.
        if not self._tokens.is_required and not token.startswith(api_keys.PREFIX):
            return LOCAL
        self._tokens.require(token)
        return ADMIN

    def clear_cache(self) -> None:
        """Tokens were changed here: the next use looks again."""
        self._changes += 1
        self._known.clear()

    async def _authenticate_key(self, grant: ApiKey | None, token: str) -> Principal:
        now = utc_now()
        trouble = api_keys.rejection_reason(grant, token, now)
        if trouble is not None or grant is None:
            raise Unauthorized(trouble)
        if grant.last_used_at is None or now - grant.last_used_at >= LAST_USED_INTERVAL:
            await run_in_threadpool(self._note_use, grant)
        return Principal(grant.name, grant.scope, grant.id)

    def _remembered(self, token_id: str) -> ApiKey | None:
        grant, looked_at = self._known.get(token_id, (None, 0.0))
        return grant if time.monotonic() - looked_at < CACHE_SECONDS else None

    def _look_up(self, token_id: str) -> ApiKey | None:
        asked_at, changes = time.monotonic(), self._changes
        with self._database.read() as session:
            grant = store.find_api_key(session, token_id)
        # What was read before a change is not remembered behind it.
        if grant is not None and changes == self._changes:
            self._known[token_id] = grant, asked_at
        return grant

    def _note_use(self, grant: ApiKey) -> None:
        now = utc_now()
        known = self._known.get(grant.id)
        if known is not None:
            self._known[grant.id] = replace(known[0], last_used_at=now), known[1]
        # It is only a note: where it cannot be written the request goes on.
        with contextlib.suppress(SQLAlchemyError), self._database.write() as session:
            store.record_use(session, grant.id, now)
