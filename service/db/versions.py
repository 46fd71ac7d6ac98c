"""The version of a database's content: it is another one after each commit, also after those of other processes."""

import asyncio
import contextlib
import sqlite3
import threading
from collections.abc import Hashable
from pathlib import Path

from sqlalchemy import text

from trainyard.service.db.engine import Database

SNAPSHOT = text("SELECT txid_current_snapshot()::text")
"""Which transactions a reader sees: two readers with the same snapshot see the same rows."""


class DatabaseVersion:
    """Reads the version. Costs microseconds on SQLite, one round trip for all concurrent readers on Postgres."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._reader = threading.local()
        self._autocommit = database.engine.execution_options(isolation_level="AUTOCOMMIT")
        self._next: asyncio.Task[Hashable] | None = None
        self._running: asyncio.Task[Hashable] | None = None

    async def read(self) -> Hashable | None:
        """Return the version, which includes every commit before this call; None if it cannot be read now."""
        if self._database.is_sqlite:
            return self._read_sqlite()
        # A query that has begun may have missed the last commit, so callers share the next one.
        if self._next is None:
            self._next = asyncio.create_task(self._query_next(self._running))
        return await asyncio.shield(self._next)

    async def _query_next(self, before: "asyncio.Task[Hashable] | None") -> Hashable | None:
        if before is not None and not before.done():
            await asyncio.wait([before])
        self._running, self._next = self._next, None
        return await asyncio.to_thread(self._read_snapshot)

    def _read_snapshot(self) -> Hashable | None:
        try:
            with self._autocommit.connect() as connection:
                return str(connection.scalar(SNAPSHOT))
        except Exception:
            return None  # the request itself reports what is wrong with the database

    def _read_sqlite(self) -> Hashable | None:
        # A connection of its own, which never writes: the pragma counts only the commits of other connections.
        connection: sqlite3.Connection | None = getattr(self._reader, "connection", None)
        try:
            if connection is None:
                uri = f"{Path(self._database.engine.url.database or '').resolve().as_uri()}?mode=rw"
                connection = self._reader.connection = sqlite3.connect(uri, uri=True, timeout=0, isolation_level=None)
            return int(connection.execute("PRAGMA data_version").fetchone()[0])
        except sqlite3.Error:
            return None

    def close(self) -> None:
        """Close the connection of this thread."""
        connection = getattr(self._reader, "connection", None)
        if connection is not None:
            del self._reader.connection
            with contextlib.suppress(sqlite3.Error):
                connection.close()
