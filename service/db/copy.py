"""Copies one database into another, empty one: `trainyard db copy`.

Both are locked, so that no service uses either meanwhile. Rows are copied in batches, in one transaction of the target,
and are read back before its commit: afterwards the target has everything or nothing.
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
"""The leader lease of one database means nothing in the other."""

DIGEST_SPACE = 1 << 256


class CopyRefused(Exception):
    """The copy cannot be made; the message has the reason and what to do. The target is unchanged."""


@dataclass(frozen=True)
class TableCopy:
    """A table that both databases have. ``digest``: of its rows, whatever their order."""

    table: str
    rows: int
    digest: str


def copy(source: str, target: str, on_table: Callable[[TableCopy], None]) -> list[TableCopy]:
    """Copy every row of ``source`` into the empty ``target``; both are URLs. ``on_table`` is called after each table.

    Raises:
        CopyRefused: a database is missing, in use, not empty or of another version, or the copy differs.
    """
    urls = make_url(source), make_url(target)
    if urls[0] == urls[1]:
        raise CopyRefused("both databases are the same one")
    try:
        with _locked(urls[0], "source") as reading, _locked(urls[1], "target") as writing:
            _require_head(reading)
            alembic.command.upgrade(alembic_config(writing), "head")
            _require_empty(writing)
            copies = [_copy_table(reading, writing, table, on_table) for table in _tables()]
            _advance_sequences(writing)
            return copies
    except DBAPIError as error:
        raise CopyRefused(f"{type(error).__name__}: {error.orig}") from error
    except SQLAlchemyError as error:
        raise CopyRefused(f"{type(error).__name__}: {error}") from error


def printable_url(url: str) -> str:
    """Return the URL without its password."""
    return make_url(url).render_as_string(hide_password=True)


def _tables() -> list[Table]:
    # Sorted so that a table comes after those that it refers to.
    return [table for table in models.Base.metadata.sorted_tables if table.name not in SKIPPED_TABLES]


def _copy_table(
    reading: Connection, writing: Connection, table: Table, on_table: Callable[[TableCopy], None]
) -> TableCopy:
    written, read_back = RowsDigest(), RowsDigest()
    for rows in _batches(reading, table):
        written.add(rows)
        writing.execute(insert(table), [dict(row) for row in rows])
    for rows in _batches(writing, table):
        read_back.add(rows)
    if (written.rows, written.hexdigest) != (read_back.rows, read_back.hexdigest):
        raise CopyRefused(
            f"{table.name}: {written.rows} rows were written and {read_back.rows} read back, or their digests differ: "
            f"{written.hexdigest} and {read_back.hexdigest}; nothing was kept"
        )
    copied = TableCopy(table.name, written.rows, written.hexdigest)
    on_table(copied)
    return copied


class RowsDigest:
    """The sum of the sha256 of rows. It does not depend on their order, because databases sort text differently."""

    def __init__(self) -> None:
        self.rows = 0
        self._sum = 0

    def add(self, rows: Sequence[RowMapping]) -> None:
        """Add rows to the digest."""
        for row in rows:
            text = json.dumps([_canonical(value) for value in row.values()], ensure_ascii=True)
            self._sum += int.from_bytes(hashlib.sha256(text.encode()).digest())
        self.rows += len(rows)
        self._sum %= DIGEST_SPACE

    @property
    def hexdigest(self) -> str:
        return f"{self._sum:064x}"


def _canonical(value: Any) -> Any:
    """Return the value in a form that is the same for both databases: exact floats, UTC times, sorted keys."""
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
    keys = list(table.primary_key.columns)
    query = select(table).order_by(*keys).limit(BATCH_ROWS)
    last = None
    while True:
        page = query if last is None else query.where(tuple_(*keys) > tuple_(*last))
        rows = connection.execute(page).mappings().all()
        if rows:
            yield rows
            last = [rows[-1][key.name] for key in keys]
        if len(rows) < BATCH_ROWS:
            return


def _require_head(connection: Connection) -> None:
    head = ScriptDirectory.from_config(alembic_config(connection)).get_current_head()
    revision = MigrationContext.configure(connection).get_current_revision()
    if revision is None:
        raise CopyRefused("the source holds no Trainyard database")
    if revision != head:
        raise CopyRefused(
            f"the source is at migration {revision}, this version is at {head}: run `trainyard db upgrade` on it first"
        )


def _require_empty(connection: Connection) -> None:
    filled = [
        t.name for t in _tables() if connection.scalar(select(func.count()).select_from(t.select().limit(1).subquery()))
    ]
    if filled:
        raise CopyRefused(f"the target is not empty: there are rows in {', '.join(filled)}")


def _advance_sequences(connection: Connection) -> None:
    # On Postgres an insert with an explicit number does not advance the sequence that numbers new rows.
    if connection.dialect.name != "postgresql":
        return
    for table in _tables():
        column = table.autoincrement_column
        if column is not None and column.autoincrement is True:
            sequence = func.pg_get_serial_sequence(table.name, column.name)
            last = select(func.coalesce(func.max(column), 0) + 1).scalar_subquery()
            connection.execute(select(func.setval(sequence, last, False)))


def _locked(url: URL, role: str) -> AbstractContextManager[Connection]:
    """Open a transaction on a database that no service uses, and that none can start to use before its end."""
    return _locked_sqlite(url, role) if url.get_backend_name() == "sqlite" else _locked_postgres(url, role)


@contextmanager
def _locked_sqlite(url: URL, role: str) -> Iterator[Connection]:
    if role == "source" and not Path(url.database or "").is_file():
        raise CopyRefused(f"the source does not exist: {url.database}")
    engine = make_engine(url, exclusive=True)
    try:
        try:
            connection = engine.execution_options(writes=True).connect()
        except OperationalError as error:
            if "locked" in str(error.orig):
                raise CopyRefused(f"the {role} is in use: stop the service first") from error
            raise
        with connection, connection.begin():
            yield connection
    finally:
        engine.dispose()


@contextmanager
def _locked_postgres(url: URL, role: str) -> Iterator[Connection]:
    engine = make_engine(url)
    try:
        snapshot = engine.execution_options(isolation_level="REPEATABLE READ")
        with snapshot.connect() as connection, connection.begin():
            db.allow_pauses(connection)
            # A service that starts now waits for this lock; one that runs already is found by its connections' name.
            connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": db.MIGRATION_LOCK})
            _require_no_service(connection, role)
            yield connection
    finally:
        engine.dispose()


def _require_no_service(connection: Connection, role: str) -> None:
    # The connections of a service that was just stopped may take a moment to disappear.
    query = text(
        "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()"
        " AND application_name = :name AND pid <> pg_backend_pid()"
    )
    deadline = time.monotonic() + db.EXCLUSIVE_SECONDS
    while others := connection.scalar(query, {"name": db.APPLICATION}):
        if time.monotonic() > deadline:
            raise CopyRefused(f"the {role} is in use by a service ({others} connections): stop the service first")
        time.sleep(0.05)
        connection.execute(text("SELECT pg_stat_clear_snapshot()"))
