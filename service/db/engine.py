"""The database: connections, read and write transactions, and migrations.

SQLite with the driver of the standard library, Postgres with psycopg 3. A read transaction sees one snapshot on both.
"""

import contextlib
import functools
import json
import math
import select
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic_core import from_json
from sqlalchemy import Connection, Engine, create_engine, event, inspect, text
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import DBAPIError, InterfaceError, InvalidatePoolError, OperationalError
from sqlalchemy.orm import Session

from trainyard import migrations
from trainyard.contract.locks import FileLock
from trainyard.service.errors import DatabaseUnavailable, OutcomeUnknown, is_disk_full
from trainyard.service.home import create_database

if TYPE_CHECKING:
    # Imported only to migrate: importing Alembic takes a fifth of the startup time.
    import alembic.config

BUSY_SECONDS = 30
STUCK_SECONDS = 2.0
"""A writer that takes longer is stuck: another program has the SQLite file, or the disk does not answer."""

MAX_WAITING = 16
"""Threads that wait for a stuck writer: half of those that serve requests."""

EXCLUSIVE_SECONDS = 3
IDLE_SECONDS = 10
PAUSE_SECONDS = 600
APPLICATION = "trainyard"
"""Name of our connections in `pg_stat_activity`."""

KEEPALIVES = {"connect_timeout": 10, "keepalives_idle": 10, "keepalives_interval": 5, "keepalives_count": 3}
"""Detect a vanished server within half a minute. With the kernel's defaults it takes hours."""

MIGRATION_LOCK = 7_263_054_117
"""Key of the Postgres advisory lock that a migrating service holds."""

FILE_REPLACED = (
    "The database file was removed or replaced while the service runs: nothing was changed. Stop it and check its home."
)


class UnknownSchemaVersion(Exception):
    """The tables have a migration that this version does not know, probably of a later version."""

    def __init__(self, revision: str) -> None:
        super().__init__(
            f"the database is at migration {revision}, which this version does not know; nothing was changed. Start "
            "the version that made it, or restore the backup from before the upgrade"
        )


class WriteLock:
    """One writer at a time. A waiter gives up after a while, so that one stuck writer does not block all requests.

    If the writer is stuck, at most MAX_WAITING threads wait for it. Otherwise each report of an agent would occupy
    another thread, until no thread is left for requests that only read.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counting = threading.Lock()
        self._waiting = 0
        self._taken_at = math.inf

    def __enter__(self) -> None:
        deadline = time.monotonic() + BUSY_SECONDS
        with self._counting:
            self._waiting += 1
        while not self._gives_up(deadline):
            if self._lock.acquire(timeout=min(STUCK_SECONDS, max(0.0, deadline - time.monotonic()))):
                with self._counting:
                    self._waiting -= 1
                self._taken_at = time.monotonic()
                return
        raise DatabaseUnavailable()

    def __exit__(self, *_: object) -> None:
        self._taken_at = math.inf
        self._lock.release()

    def _gives_up(self, deadline: float) -> bool:
        now = time.monotonic()
        with self._counting:
            is_crowded = self._waiting > MAX_WAITING and now - self._taken_at > STUCK_SECONDS
            if gives_up := is_crowded or now >= deadline:
                self._waiting -= 1
        return gives_up


class SqliteFileGuard:
    """Detects that the SQLite file was removed or replaced. Writes to a removed file would be lost."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._identity: tuple[int, int] | None = None

    def require_same_file(self) -> None:
        """Raise DatabaseUnavailable if the file is missing or is another file than at the first call."""
        try:
            status = self._path.stat()
        except OSError:
            identity = None
        else:
            identity = (status.st_dev, status.st_ino)
        if self._identity is None:
            self._identity = identity
        elif identity != self._identity:
            raise DatabaseUnavailable(FILE_REPLACED, headers={"Retry-After": "5"})


class Database:
    """A database with its connection pool."""

    def __init__(self, url: str) -> None:
        self.engine = make_engine(make_url(url))
        self.is_sqlite = self.engine.dialect.name == "sqlite"
        # Readers see one snapshot, as on SQLite.
        self._read_engine = (
            self.engine.execution_options(isolation_level="REPEATABLE READ") if not self.is_sqlite else None
        )
        self._write_engine = self.engine.execution_options(writes=True)
        # SQLite allows one writer, and waiting writers poll for its lock. A lock of our own queues them instead.
        self._write_lock: contextlib.AbstractContextManager[Any] = (
            WriteLock() if self.is_sqlite else contextlib.nullcontext()
        )
        name = self.engine.url.database if self.is_sqlite else None
        self._file_guard = SqliteFileGuard(Path(name)) if name and name != ":memory:" else None

    @contextlib.contextmanager
    def read(self) -> Iterator[Session]:
        """Open a session for reading. Changes are never committed."""
        with Session(self._read_engine or self.engine, autoflush=False, expire_on_commit=False) as session:
            yield session

    @contextlib.contextmanager
    def connection(self) -> Iterator[Connection]:
        """Open a connection for reading plain rows, without the overhead of a session."""
        with (self._read_engine or self.engine).connect() as connection:
            yield connection

    @contextlib.contextmanager
    def write(self) -> Iterator[Session]:
        """Open a transaction: committed at the end of the block, rolled back if it raises.

        Raises OutcomeUnknown if the connection is lost between COMMIT and its response, and DatabaseUnavailable if the
        file is gone.
        """
        self.require_same_file()
        with (
            self._write_lock,
            Session(self._write_engine, expire_on_commit=False) as session,
            session.begin() as transaction,
        ):
            yield session
            if not transaction.is_active:
                return  # The block has rolled it back.
            session.flush()
            try:
                transaction.commit()
            except (OperationalError, InterfaceError) as error:
                # Without this SQLite would keep the transaction open in the pooled connection.
                session.invalidate()
                if is_disk_full(error):
                    raise  # Nothing was stored.
                raise OutcomeUnknown() from error

    def require_same_file(self) -> None:
        """Raise DatabaseUnavailable if writes would be lost because the SQLite file was removed or replaced."""
        if self._file_guard is not None:
            self._file_guard.require_same_file()

    def upgrade(self, lock_file: Path | None = None) -> None:
        """Run the missing migrations, in one service at a time. Raises UnknownSchemaVersion."""
        if self._revision() == newest_revision():
            return
        with contextlib.ExitStack() as stack:
            if self.is_sqlite and lock_file is not None:
                stack.enter_context(FileLock(lock_file).take(seconds=BUSY_SECONDS))
            connection = stack.enter_context(self._write_engine.begin())
            if not self.is_sqlite:
                allow_pauses(connection)
                connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": MIGRATION_LOCK})
            migrate(connection)

    def _revision(self) -> str | None:
        with self.engine.connect() as connection:
            if not inspect(connection).has_table("alembic_version"):
                return None
            revision: str | None = connection.scalar(text("SELECT version_num FROM alembic_version"))
            return revision

    def close(self) -> None:
        """Close every connection."""
        self.engine.dispose()


def error_text(error: DBAPIError) -> str:
    """Return the error of the database in one line, without a password."""
    return unusable(error.orig)


def unusable(cause: BaseException | None) -> str:
    """Return the error of the database driver in one line, without a password."""
    message = str(cause).strip().partition("\n")[0]
    return f"the database cannot be used: {message}; it is set by --database-url or TRAINYARD_DATABASE_URL"


@functools.cache
def newest_revision() -> str:
    """Return the revision of this release, from the file name of the last migration."""
    # From the name, so that Alembic need not be imported.
    versions = Path(migrations.__path__[0]) / "versions"
    return max(path.name.removeprefix("v").partition("_")[0] for path in versions.glob("v*_*.py"))


def allow_pauses(connection: Connection) -> None:
    """Let this Postgres transaction pause for PAUSE_SECONDS between two statements, instead of IDLE_SECONDS.

    A migration imports Alembic and its scripts, and a copy works on the other database. On a busy host or a slow disk
    either may take longer than IDLE_SECONDS, and then the service would not start.
    """
    connection.execute(text(f"SET LOCAL idle_in_transaction_session_timeout = {PAUSE_SECONDS * 1000}"))


def migrate(connection: Connection) -> None:
    """Run the missing migrations in the connection's transaction. Raises UnknownSchemaVersion."""
    import alembic.command
    from alembic.runtime.migration import MigrationContext
    from alembic.script import ScriptDirectory

    config = alembic_config(connection)
    present = MigrationContext.configure(connection).get_current_revision()
    known = {script.revision for script in ScriptDirectory.from_config(config).walk_revisions()}
    if present is not None and present not in known:
        raise UnknownSchemaVersion(present)
    alembic.command.upgrade(config, "head")


def alembic_config(connection: Connection) -> "alembic.config.Config":
    """Return an Alembic configuration that uses this connection and its transaction."""
    import alembic.config

    config = alembic.config.Config(attributes={"connection": connection})
    config.set_main_option("script_location", str(Path(migrations.__path__[0])))
    return config


def make_engine(url: URL, exclusive: bool = False) -> Engine:
    """Return the engine of a database.

    ``exclusive``: lock a SQLite database for this engine alone; connecting fails if another process has it open.
    """
    if url.drivername in ("postgres", "postgresql"):
        url = url.set(drivername="postgresql+psycopg")
    if url.get_backend_name() != "sqlite":
        engine = create_engine(
            url,
            pool_size=16,
            max_overflow=32,
            pool_timeout=10,
            hide_parameters=True,
            json_deserializer=_read_json,
            connect_args={"application_name": APPLICATION, **KEEPALIVES},
        )
        event.listen(engine, "connect", _prepare_postgres)
        event.listen(engine, "checkout", _require_connected)
        return engine
    if url.database and url.database != ":memory:" and not url.database.startswith("file:"):
        create_database(Path(url.database))
    engine = create_engine(
        url,
        pool_size=16,
        max_overflow=32,
        pool_timeout=BUSY_SECONDS,
        hide_parameters=True,
        json_deserializer=_read_json,
        connect_args={"timeout": EXCLUSIVE_SECONDS if exclusive else BUSY_SECONDS, "check_same_thread": False},
    )
    if exclusive:
        event.listen(engine, "connect", _lock_exclusively)
    event.listen(engine, "connect", _prepare_sqlite)
    event.listen(engine, "begin", _begin_sqlite)
    return engine


def _read_json(text: str) -> Any:
    try:
        return from_json(text, cache_strings="keys")
    except ValueError:
        return json.loads(text)  # A lone surrogate: only the standard library accepts it.


def _require_connected(connection: Any, _record: object, _proxy: object) -> None:
    """Detect a dead server without a query: a closed peer makes the idle socket readable.

    Raises InvalidatePoolError, by which the pool replaces this and all older connections.
    """
    poll = select.poll()
    poll.register(connection.fileno(), select.POLLIN)
    if not poll.poll(0):
        return  # A live server never sends unsolicited bytes.
    try:
        # Readable for another reason, such as a notice, or because the server is gone.
        connection.execute("SELECT 1")
        connection.rollback()
    except Exception as error:
        raise InvalidatePoolError() from error


def _prepare_postgres(connection: Any, _record: object) -> None:
    # Not as parameters of the connection: a pooler rejects or ignores them.
    connection.autocommit = True
    # A service that is suspended in the middle of a transaction must not hold its row locks for ever.
    connection.execute(f"SET idle_in_transaction_session_timeout = {IDLE_SECONDS * 1000}")
    # What is confirmed must survive a crash of the server, whatever its default is.
    connection.execute(
        "SELECT set_config('synchronous_commit', 'on', false) WHERE current_setting('synchronous_commit') = 'off'"
    )
    connection.autocommit = False


def _lock_exclusively(connection: Any, _record: object) -> None:
    # The next write takes the file lock, which is then kept until the connection is closed.
    connection.execute("PRAGMA locking_mode=EXCLUSIVE")


def _prepare_sqlite(connection: Any, _record: object) -> None:
    # Switches off the driver's implicit BEGIN, which is issued too late and is never IMMEDIATE.
    connection.isolation_level = None
    for pragma in (
        "journal_mode=WAL",
        # FULL: a confirmed POST and an acknowledged outbox line survive a power cut. It costs one fsync per commit.
        "synchronous=FULL",
        "foreign_keys=ON",
    ):
        connection.execute(f"PRAGMA {pragma}")


def _begin_sqlite(connection: Connection) -> None:
    # A transaction that starts as a reader and writes later fails at once if there is another writer, without waiting
    # for it (SQLITE_BUSY). IMMEDIATE takes the write lock first.
    if connection.get_execution_options().get("writes"):
        connection.exec_driver_sql("BEGIN IMMEDIATE")
        return
    # BEGIN takes no lock yet, so it cannot fail. Through the driver it costs a tenth of what it costs in SQLAlchemy.
    driver = connection.connection.driver_connection
    assert driver is not None
    driver.execute("BEGIN")
