"""The database: one engine, readers that see one moment, writers that come one by one, and the migrations.

SQLite by the standard library's driver, Postgres by psycopg 3.
"""

import contextlib
import functools
import json
import select
import threading
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
from trainyard.service.errors import DatabaseUnavailable, OutcomeUnknown

if TYPE_CHECKING:
    # Takes a fifth of what a service needs to start, and is used where the tables are not yet of this release.
    import alembic.config

BUSY_SECONDS = 30
EXCLUSIVE_SECONDS = 3
IDLE_SECONDS = 10
APPLICATION = "trainyard"
"""What our connections are called in `pg_stat_activity`."""

KEEPALIVES = {"connect_timeout": 10, "keepalives_idle": 10, "keepalives_interval": 5, "keepalives_count": 3}
"""A server that has gone without a word is noticed within half a minute, not when the kernel gives up."""

MIGRATION_LOCK = 7_263_054_117
"""Key of the Postgres advisory lock that one migrating service holds."""


FILE_REPLACED = (
    "The database's file was removed or replaced under the service: nothing was changed. End it, and look at its home."
)


class UnknownSchemaVersion(Exception):
    """The tables are of a version that this one does not know, most likely a later one."""

    def __init__(self, revision: str) -> None:
        super().__init__(
            f"the database is at migration {revision}, which this version does not know; nothing was changed. Start "
            "the version that made it, or restore the backup from before the upgrade"
        )


class WriteLock:
    """One writer at a time. Who waits for too long gives up: else all would wait behind one who is held up."""

    def __init__(self) -> None:
        self._lock = threading.Lock()

    def __enter__(self) -> None:
        if not self._lock.acquire(timeout=BUSY_SECONDS):
            raise DatabaseUnavailable(headers={"Retry-After": "1"})

    def __exit__(self, *_: object) -> None:
        self._lock.release()


class SqliteFileGuard:
    """The file of a SQLite database, which must stay the one it was: what is written to a removed one is lost."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._identity: tuple[int, int] | None = None

    def require_same_file(self) -> None:
        """Raise DatabaseAway where the file is gone, or another one is in its place."""
        try:
            found = self._path.stat()
        except OSError:
            identity = None
        else:
            identity = (found.st_dev, found.st_ino)
        if self._identity is None:
            self._identity = identity
        elif identity != self._identity:
            raise DatabaseUnavailable(FILE_REPLACED, headers={"Retry-After": "5"})


class Database:
    """Sessions on one database; `close` gives its connections back."""

    def __init__(self, url: str) -> None:
        self.engine = make_engine(make_url(url))
        self.is_sqlite = self.engine.dialect.name == "sqlite"
        # A reader on Postgres must see one moment too, as a SQLite reader does.
        self._read_engine = self.engine.execution_options(isolation_level="REPEATABLE READ") if not self.is_sqlite else None
        self._write_engine = self.engine.execution_options(writes=True)
        # SQLite has one writer at a time and its waiters poll; ours queue up instead.
        self._write_lock: contextlib.AbstractContextManager[Any] = WriteLock() if self.is_sqlite else contextlib.nullcontext()
        name = self.engine.url.database if self.is_sqlite else None
        self._file_guard = SqliteFileGuard(Path(name)) if name and name != ":memory:" else None

    @contextlib.contextmanager
    def read(self) -> Iterator[Session]:
        """A session for reading only; whatever it would change is dropped."""
        with Session(self._read_engine or self.engine, autoflush=False, expire_on_commit=False) as session:
            yield session

    @contextlib.contextmanager
    def connection(self) -> Iterator[Connection]:
        """The same for statements that give plain rows: what a session adds to them costs more than they do."""
        with (self._read_engine or self.engine).connect() as connection:
            yield connection

    @contextlib.contextmanager
    def write(self) -> Iterator[Session]:
        """One transaction: committed when the block ends, dropped when it raises.

        Raises OutcomeUnknown where the database went away between our COMMIT and its answer, DatabaseAway where its
        file is gone.
        """
        self.require_same_file()
        with self._write_lock, Session(self._write_engine, expire_on_commit=False) as session, session.begin() as transaction:
            yield session
            if not transaction.is_active:
                return  # dropped inside
            session.flush()
            try:
                transaction.commit()
            except (OperationalError, InterfaceError) as error:
                raise OutcomeUnknown() from error

    def require_same_file(self) -> None:
        """Raise DatabaseAway where what is written now would be lost."""
        if self._file_guard is not None:
            self._file_guard.require_same_file()

    def upgrade(self, lock_file: Path | None = None) -> None:
        """Run the migrations that are missing, one service at a time. Raises UnknownTables."""
        if self._revision() == newest_revision():
            return
        with contextlib.ExitStack() as stack:
            if self.is_sqlite and lock_file is not None:
                stack.enter_context(FileLock(lock_file).take(seconds=BUSY_SECONDS))
            connection = stack.enter_context(self._write_engine.begin())
            if not self.is_sqlite:
                connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": MIGRATION_LOCK})
            migrate(connection)

    def _revision(self) -> str | None:
        """What the tables are at; None where there are none."""
        with self.engine.connect() as connection:
            if not inspect(connection).has_table("alembic_version"):
                return None
            found: str | None = connection.scalar(text("SELECT version_num FROM alembic_version"))
            return found

    def close(self) -> None:
        """Close every connection."""
        self.engine.dispose()


def error_text(error: DBAPIError) -> str:
    """The database's own words in one line, for who started a program that needs it. No password is among them."""
    said = str(error.orig).strip().partition("\n")[0]
    return f"the database cannot be used: {said}; --database-url or TRAINYARD_DATABASE_URL says which one it is"


@functools.cache
def newest_revision() -> str:
    """What the tables of this release are at: the number of the last migration, which its file is named by."""
    versions = Path(migrations.__path__[0]) / "versions"
    return max(path.name.removeprefix("v").partition("_")[0] for path in versions.glob("v*_*.py"))


def migrate(connection: Connection) -> None:
    """Run the migrations that are missing, in this transaction. Raises UnknownTables."""
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
    """Alembic, told to work on this very connection and its transaction."""
    import alembic.config

    config = alembic.config.Config(attributes={"connection": connection})
    config.set_main_option("script_location", str(Path(migrations.__path__[0])))
    return config


def make_engine(parsed: URL, alone: bool = False) -> Engine:
    """Connections to a database. ``alone``: SQLite refuses it where another process has it open, and then has it."""
    if parsed.drivername in ("postgres", "postgresql"):
        parsed = parsed.set(drivername="postgresql+psycopg")
    if parsed.get_backend_name() != "sqlite":
        # A service that is stopped in the middle of a transaction must not hold its rows for ever.
        options = f"-c idle_in_transaction_session_timeout={IDLE_SECONDS * 1000}"
        engine = create_engine(
            parsed,
            pool_size=16,
            max_overflow=32,
            pool_timeout=10,
            hide_parameters=True,
            json_deserializer=_read_json,
            connect_args={"options": options, "application_name": APPLICATION, **KEEPALIVES},
        )
        event.listen(engine, "checkout", _require_connected)
        return engine
    if parsed.database:
        Path(parsed.database).parent.mkdir(parents=True, exist_ok=True)
    engine = create_engine(
        parsed,
        pool_size=16,
        max_overflow=32,
        pool_timeout=BUSY_SECONDS,
        hide_parameters=True,
        json_deserializer=_read_json,
        connect_args={"timeout": EXCLUSIVE_SECONDS if alone else BUSY_SECONDS, "check_same_thread": False},
    )
    if alone:
        event.listen(engine, "connect", _make_private)
    event.listen(engine, "connect", _prepare_sqlite)
    event.listen(engine, "begin", _begin_sqlite)
    return engine


def _read_json(text: str) -> Any:
    try:
        return from_json(text, cache_strings="keys")
    except ValueError:
        return json.loads(text)  # a lone surrogate, which no other reader takes


def _require_connected(connection: Any, _record: object, _proxy: object) -> None:
    """Where a server has gone its side of the idle connection is closed: that is seen without a question to it.

    Raises InvalidatePoolError: this one and all older ones are made anew.
    """
    look = select.poll()
    look.register(connection.fileno(), select.POLLIN)
    if not look.poll(0):
        return  # whoever is there says nothing unless he is asked
    try:
        # Something was said all the same: a farewell, or a notice.
        connection.execute("SELECT 1")
        connection.rollback()
    except Exception as error:
        raise InvalidatePoolError() from error


def _make_private(connection: Any, _record: object) -> None:
    # The lock that every reader of the file shares is taken for this connection alone, by its next write.
    connection.execute("PRAGMA locking_mode=EXCLUSIVE")


def _prepare_sqlite(connection: Any, _record: object) -> None:
    # The driver's own BEGIN is switched off: it comes too late and never as IMMEDIATE.
    connection.isolation_level = None
    for pragma in (
        "journal_mode=WAL",
        # FULL: an answered POST and an acknowledged outbox line survive a power cut, for one fsync a commit.
        "synchronous=FULL",
        "foreign_keys=ON",
    ):
        connection.execute(f"PRAGMA {pragma}")


def _begin_sqlite(connection: Connection) -> None:
    # A reader that turns into a writer later cannot wait for the lock and fails at once, so writers say so first.
    if connection.get_execution_options().get("writes"):
        connection.exec_driver_sql("BEGIN IMMEDIATE")
        return
    # Takes no lock yet, so it cannot fail: said to the driver itself, it costs a tenth.
    driver = connection.connection.driver_connection
    assert driver is not None
    driver.execute("BEGIN")
