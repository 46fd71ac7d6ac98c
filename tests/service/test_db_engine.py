"""The database: migrations match the models, writers queue up, and readers see one snapshot."""

import subprocess
import sys
import threading
from pathlib import Path

import alembic.command
import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import inspect, text
from sqlalchemy.exc import IntegrityError

from tests.faults.service_home import until
from tests.service.harness import ServiceHarness, in_threads
from tests.service.live_server import DEADLINE
from trainyard.service.clock import utc_now
from trainyard.service.db import engine
from trainyard.service.db.engine import (
    Database,
    UnknownSchemaVersion,
    alembic_config,
    newest_revision,
)
from trainyard.service.db.models import (
    Base,
    DeviceLeaseRow,
    EventRow,
    JobRow,
)
from trainyard.service.errors import DatabaseUnavailable
from trainyard.service.jobs import repository


@pytest.fixture(params=["sqlite", "postgres"])
def empty(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A database without tables."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/new/trainyard.db"
    url: str = request.getfixturevalue("postgres_url")
    database = Database(url)
    with database.engine.begin() as connection:
        connection.execute(text("DROP SCHEMA IF EXISTS public CASCADE"))
        connection.execute(text("CREATE SCHEMA public"))
    database.close()
    return url


@pytest.fixture(autouse=True)
def _tables_again(request: pytest.FixtureRequest) -> object:
    """The tests behind these find the tables that they expect."""
    yield
    if "empty" in request.fixturenames and "postgres" in request.node.name:
        database = Database(request.getfixturevalue("postgres_url"))
        database.upgrade()
        database.close()


def test_migrations_build_what_the_tables_say(empty: str) -> None:
    database = Database(empty)
    database.upgrade()
    with database.engine.connect() as connection:
        differences = compare_metadata(MigrationContext.configure(connection), Base.metadata)
        assert differences == []
        found = inspect(connection)
        assert set(Base.metadata.tables) <= set(found.get_table_names())
        for name, table in Base.metadata.tables.items():
            assert [c["name"] for c in found.get_columns(name)] == [c.name for c in table.columns]
            wanted = {index.name for index in table.indexes}
            assert wanted <= {index["name"] for index in found.get_indexes(name)}
    database.close()


def test_migrations_go_down_and_up_again(empty: str) -> None:
    database = Database(empty)
    database.upgrade()
    with database.engine.execution_options(writes=True).begin() as connection:
        alembic.command.downgrade(alembic_config(connection), "base")
    with database.engine.connect() as connection:
        assert set(inspect(connection).get_table_names()) == {"alembic_version"}
    database.upgrade()
    database.upgrade()
    with database.write() as session:
        session.execute(text("SELECT count(*) FROM jobs"))
    database.close()


def test_tables_of_a_later_version_are_left_alone(empty: str) -> None:
    database = Database(empty)
    database.upgrade()
    with database.write() as session:
        session.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    with pytest.raises(UnknownSchemaVersion, match="at migration 9999, which this version does not know"):
        database.upgrade()
    with database.write() as session:
        session.execute(text("DELETE FROM alembic_version"))
        Base.metadata.drop_all(session.connection())
    database.upgrade()
    database.close()


def test_two_services_that_migrate_at_once(empty: str, tmp_path: Path) -> None:
    def upgrade(_: int) -> None:
        database = Database(empty)
        database.upgrade(tmp_path / "migrate.lock")
        database.close()

    assert in_threads(3, upgrade) == [None] * 3


def test_postgres_does_not_cut_off_a_migration_that_pauses(
    migrated_postgres: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a busy host the import of Alembic within the transaction took more than 10 s: the service did not start."""
    limit = text("SHOW idle_in_transaction_session_timeout")
    shown: list[str] = []
    monkeypatch.setattr(Database, "_revision", lambda _: None)
    monkeypatch.setattr(engine, "migrate", lambda connection: shown.append(connection.scalar(limit)))
    database = Database(migrated_postgres)
    database.upgrade()
    with database.write() as session:
        assert shown == ["10min"]
        assert session.scalar(limit) == "10s", "the limit of a request is as before"
    database.close()


def test_sqlite_is_set_up_for_many(sqlite_url: str) -> None:
    database = Database(sqlite_url)
    with database.read() as session:
        values = [
            session.execute(text(f"PRAGMA {name}")).scalar() for name in ("journal_mode", "synchronous", "foreign_keys")
        ]
    assert values == ["wal", 2, 1]
    database.close()


def test_many_writers_at_once(any_rig: ServiceHarness) -> None:
    """Eight writers, each a read and a write in one transaction: none is turned away and nothing is lost."""
    job_id = any_rig.submit()

    def write(_: int) -> int:
        for _ in range(10):
            with any_rig.database.write() as session:
                job = repository.lock(session, job_id)
                job.restarts += 1
        return 1

    assert in_threads(8, write) == [1] * 8
    with any_rig.database.read() as session:
        assert repository.find(session, job_id).restarts == 80


def test_a_stuck_writer_leaves_threads_to_readers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Within half a minute, the retries of 12 agents occupied all 32 threads, so no request could read."""
    monkeypatch.setattr(engine, "STUCK_SECONDS", 0.02)
    lock = engine.WriteLock()
    is_held, may_release = threading.Event(), threading.Event()
    outcomes: list[str] = []

    def write() -> None:
        try:
            with lock:
                outcomes.append("written")
        except DatabaseUnavailable:
            outcomes.append("rejected")

    def hold() -> None:
        with lock:
            is_held.set()
            may_release.wait(DEADLINE)

    holder = threading.Thread(target=hold)
    holder.start()
    assert is_held.wait(DEADLINE)
    writers = [threading.Thread(target=write) for _ in range(40)]
    for writer in writers:
        writer.start()
    until(lambda: len(outcomes) == len(writers) - engine.MAX_WAITING)
    assert set(outcomes) == {"rejected"}
    may_release.set()
    for thread in (holder, *writers):
        thread.join(DEADLINE)
    assert outcomes.count("written") == engine.MAX_WAITING, "all that waited could write"
    write()
    assert outcomes[-1] == "written"


def test_any_number_of_writers_may_wait_for_fast_writers() -> None:
    lock = engine.WriteLock()

    def write(index: int) -> int:
        with lock:
            return index

    assert in_threads(100, write) == list(range(100))


def test_writers_of_two_services_on_one_file(rig: ServiceHarness) -> None:
    """The lock in this process does not help here: BEGIN IMMEDIATE and the busy timeout do."""
    job_id = rig.submit()
    others = [Database(rig.url) for _ in range(4)]

    def write(index: int) -> int:
        for _ in range(10):
            with others[index].write() as session:
                repository.lock(session, job_id).restarts += 1
        return 1

    assert in_threads(4, write) == [1] * 4
    with rig.database.read() as session:
        assert repository.find(session, job_id).restarts == 40
    for database in others:
        database.close()


def test_a_reader_sees_one_moment_and_waits_for_no_writer(any_rig: ServiceHarness) -> None:
    job_id = any_rig.submit()
    with any_rig.database.read() as session:
        before = repository.find(session, job_id).status
        done = threading.Thread(target=any_rig.post_action, args=(job_id, "cancel"))
        done.start()
        done.join(60)
        assert not done.is_alive()
        session.expire_all()
        assert repository.find(session, job_id).status == before == "queued"
    assert any_rig.status(job_id) == "cancelled"


def test_a_write_that_fails_leaves_nothing(any_rig: ServiceHarness) -> None:
    job_id = any_rig.submit()

    def fail() -> None:
        with any_rig.database.write() as session:
            repository.lock(session, job_id).name = "changed"
            session.flush()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert any_rig.job(job_id)["name"] == "pretrain"


def test_a_status_changes_only_by_the_table_and_only_once(any_rig: ServiceHarness) -> None:
    from trainyard.contract.status import JobStatus
    from trainyard.service.errors import Conflict
    from trainyard.service.jobs.repository import EventDraft, ImpossibleTransition

    job_id = any_rig.submit()
    note = EventDraft("status", "test")
    with pytest.raises(ImpossibleTransition), any_rig.database.write() as session:
        repository.transition(session, repository.lock(session, job_id), JobStatus.SUCCEEDED, note, utc_now())
    with any_rig.database.read() as session:
        stale = repository.find(session, job_id)
    any_rig.post_action(job_id, "pause")
    with pytest.raises(Conflict), any_rig.database.write() as session:
        repository.transition(session, stale, JobStatus.STARTING, note, utc_now())
    assert any_rig.status(job_id) is JobStatus.PAUSED
    with any_rig.database.read() as session:
        moves = [e.message for e in session.query(EventRow).filter(EventRow.kind == "status")]
        versions = [j.version for j in session.query(JobRow)]
    assert moves == ["asked to pause"]
    assert versions == [2]


def test_a_device_cannot_have_two_leases(any_rig: ServiceHarness) -> None:
    _, attempt = any_rig.running()
    with pytest.raises(IntegrityError), any_rig.database.write() as session:
        session.add(DeviceLeaseRow(device="cpu:0", attempt_id=attempt.launch.attempt_id, job_id="x"))


def test_times_have_a_zone(any_rig: ServiceHarness) -> None:
    from datetime import datetime

    with pytest.raises(Exception, match="without time zone"), any_rig.database.write() as session:
        session.add(EventRow(job_id="x", kind="k", actor="a", message="m", data={}, at=datetime(2026, 1, 1)))
    job = any_rig.job(any_rig.submit())
    assert job["created_at"].endswith("Z")


def test_the_newest_migration_is_known_without_the_tool_that_runs_them(empty: str) -> None:
    database = Database(empty)
    database.upgrade()
    with database.engine.connect() as connection:
        head = ScriptDirectory.from_config(alembic_config(connection)).get_current_head()
        assert newest_revision() == head == connection.scalar(text("SELECT version_num FROM alembic_version"))
    database.close()


def test_a_service_whose_tables_are_there_starts_without_that_tool(sqlite_url: str) -> None:
    program = (
        "import sys, trainyard.service.__main__; from trainyard.service.db.engine import Database; "
        f"Database({sqlite_url!r}).upgrade(); sys.exit('alembic' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0
