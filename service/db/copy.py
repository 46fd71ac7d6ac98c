"""Moves what one database holds into another one: `trainyard db copy`.

Both are held so that no service works on either meanwhile. Rows go over in batches by their keys, in one transaction of
the target, and are read back there before it ends: it holds everything, or nothing.
"""

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import alembic.command
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, RowMapping, Table, func, insert, select, text, tuple_
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import DBAPIError, OperationalError, SQLAlchemyError

from trainyard.service.db import engine as db
from trainyard.service.db import models
from trainyard.service.db.engine import alembic_config, make_engine

BATCH_ROWS = 500
SKIPPED_TABLES = frozenset({models.SchedulerLeaseRow.__tablename__})
"""Who schedules on the one database says nothing about the other."""

DIGEST_SPACE = 1 << 256


class CopyRefused(Exception):
    """The copy cannot be made; the message says why and what to do. The target is as it was."""


@dataclass(frozen=True)
class TableCopy:
    """A table as it stands in both databases. ``digest``: of its rows, in whatever order."""

    table: str
    rows: int
    digest: str


def copy(source: str, target: str, tell: Callable[[TableCopy], None]) -> list[TableCopy]:
    """Copy every row of ``source`` into the empty ``target``; both are URLs. ``tell`` hears of each table.

    Raises:
        CopyRefused: a database is missing, in use, not empty, of another version, or what arrived is not what was sent.
    """
    urls = make_url(source), make_url(target)
    if urls[0] == urls[1]:
        raise CopyRefused("both databases are the same one")
    try:
        with _held(urls[0], "source") as reading, _held(urls[1], "target") as writing:
            _require_head(reading)
            alembic.command.upgrade(alembic_config(writing), "head")
            _require_empty(writing)
            found = [_table(reading, writing, table, tell) for table in _tables()]
            _count_on(writing)
            return found
    except DBAPIError as error:
        raise CopyRefused(f"{type(error).__name__}: {error.orig}") from error
    except SQLAlchemyError as error:
        raise CopyRefused(f"{type(error).__name__}: {error}") from error


def printable_url(url: str) -> str:
    """The URL without its password."""
    return make_url(url).render_as_string(hide_password=True)


def _tables() -> list[Table]:
    """Those that others refer to come first."""
    return [table for table in models.Base.metadata.sorted_tables if table.name not in SKIPPED_TABLES]


def _table(reading: Connection, writing: Connection, table: Table, tell: Callable[[TableCopy], None]) -> TableCopy:
    sent, arrived = RowsDigest(), RowsDigest()
    for rows in _batches(reading, table):
        sent.add(rows)
        writing.execute(insert(table), [dict(row) for row in rows])
    for rows in _batches(writing, table):
        arrived.add(rows)
    if (sent.rows, sent.hexdigest) != (arrived.rows, arrived.hexdigest):
        raise CopyRefused(
            f"{table.name}: {sent.rows} rows were sent and {arrived.rows} found, or their digests differ: "
            f"{sent.hexdigest} and {arrived.hexdigest}; nothing was kept"
        )
    copied = TableCopy(table.name, sent.rows, sent.hexdigest)
    tell(copied)
    return copied


class RowsDigest:
    """The sum of the rows' sha256: databases sort text differently, so that order must not count."""

    def __init__(self) -> None:
        self.rows = 0
        self._sum = 0

    def add(self, rows: Sequence[RowMapping]) -> None:
        """Take in some rows."""
        for row in rows:
            text = json.dumps([_plain(value) for value in row.values()], ensure_ascii=True)
            self._sum += int.from_bytes(hashlib.sha256(text.encode()).digest())
        self.rows += len(rows)
        self._sum %= DIGEST_SPACE

    @property
    def hexdigest(self) -> str:
        """As it is shown."""
        return f"{self._sum:064x}"


def _plain(value: Any) -> Any:
    """A value as both databases have it: floats to the last bit, times in UTC, objects whatever the order of keys."""
    match value:
        case bool() | None | int() | str():
            return value
        case float():
            return ["float", value.hex()]
        case datetime():
            return ["time", value.isoformat()]
        case bytes():
            return ["bytes", value.hex()]
        case _:
            return ["json", json.dumps(value, sort_keys=True)]


def _batches(connection: Connection, table: Table) -> Iterator[Sequence[RowMapping]]:
    """All rows, by their keys."""
    keys = list(table.primary_key.columns)
    query = select(table).order_by(*keys).limit(BATCH_ROWS)
    behind = None
    while True:
        page = query if behind is None else query.where(tuple_(*keys) > tuple_(*behind))
        rows = connection.execute(page).mappings().all()
        if rows:
            yield rows
            behind = [rows[-1][key.name] for key in keys]
        if len(rows) < BATCH_ROWS:
            return


def _require_head(connection: Connection) -> None:
    head = ScriptDirectory.from_config(alembic_config(connection)).get_current_head()
    found = MigrationContext.configure(connection).get_current_revision()
    if found is None:
        raise CopyRefused("the source holds no Trainyard database")
    if found != head:
        raise CopyRefused(
            f"the source is at migration {found}, this version is at {head}: run `trainyard db upgrade` on it first"
        )


def _require_empty(connection: Connection) -> None:
    held = [
        t.name for t in _tables() if connection.scalar(select(func.count()).select_from(t.select().limit(1).subquery()))
    ]
    if held:
        raise CopyRefused(f"the target is not empty: there are rows in {', '.join(held)}")


def _count_on(connection: Connection) -> None:
    """Postgres counts rows by a sequence of its own, which has not seen those that came with a number."""
    if connection.dialect.name != "postgresql":
        return
    for table in _tables():
        column = table.autoincrement_column
        if column is not None and column.autoincrement is True:
            sequence = func.pg_get_serial_sequence(table.name, column.name)
            last = select(func.coalesce(func.max(column), 0) + 1).scalar_subquery()
            connection.execute(select(func.setval(sequence, last, False)))


def _held(url: URL, which: str) -> AbstractContextManager[Connection]:
    """A transaction on a database that no service works on, and none begins to before it ends."""
    return _held_sqlite(url, which) if url.get_backend_name() == "sqlite" else _held_postgres(url, which)


@contextmanager
def _held_sqlite(url: URL, which: str) -> Iterator[Connection]:
    if which == "source" and not Path(url.database or "").is_file():
        raise CopyRefused(f"the source is not there: {url.database}")
    engine = make_engine(url, alone=True)
    try:
        with _opened(engine.execution_options(writes=True).connect, which) as connection, connection.begin():
            yield connection
    finally:
        engine.dispose()


@contextmanager
def _opened(connect: Callable[[], Connection], which: str) -> Iterator[Connection]:
    try:
        connection = connect()
    except OperationalError as error:
        if "locked" in str(error.orig):
            raise CopyRefused(f"the {which} is in use: stop the service first") from error
        raise
    with connection:
        yield connection


@contextmanager
def _held_postgres(url: URL, which: str) -> Iterator[Connection]:
    engine = make_engine(url)
    try:
        moment = engine.execution_options(isolation_level="REPEATABLE READ")
        with moment.connect() as connection, connection.begin():
            # A service that starts now waits here, and one that ran before is seen by its name.
            connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": db.MIGRATION_LOCK})
            _require_nobody(connection, which)
            yield connection
    finally:
        engine.dispose()


def _require_nobody(connection: Connection, which: str) -> None:
    """Connections of a service that was just stopped are waited for."""
    query = text(
        "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()"
        " AND application_name = :name AND pid <> pg_backend_pid()"
    )
    deadline = time.monotonic() + db.EXCLUSIVE_SECONDS
    while others := connection.scalar(query, {"name": db.APPLICATION}):
        if time.monotonic() > deadline:
            raise CopyRefused(f"the {which} is in use by a service ({others} connections): stop the service first")
        time.sleep(0.05)
        connection.execute(text("SELECT pg_stat_clear_snapshot()"))
