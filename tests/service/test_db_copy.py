"""`trainyard db`: a home is copied from SQLite to Postgres and back, and a backup is a complete home."""

import itertools
import os
import sqlite3
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import insert, make_url, text

from tests.service.conftest import MakeHarness
from tests.service.harness import ServiceHarness
from trainyard.contract.status import Reason
from trainyard.service.clock import utc_now
from trainyard.service.db import cli
from trainyard.service.db import copy as transfer
from trainyard.service.db.copy import CopyRefused, copy, printable_url
from trainyard.service.db.engine import Database
from trainyard.service.db.models import Base, JobRow, MetricRow

COUNT = itertools.count()


@pytest.fixture
def empty_postgres(postgres_url: str) -> Iterator[str]:
    """A database of its own, with nothing in it."""
    name = f"copy_{os.getpid()}_{next(COUNT)}"
    _outside(postgres_url, f"CREATE DATABASE {name}")
    yield make_url(postgres_url).set(database=name).render_as_string(hide_password=False)
    _outside(postgres_url, f"DROP DATABASE {name} WITH (FORCE)")


def _outside(url: str, statement: str) -> None:
    database = Database(url)
    with database.engine.execution_options(isolation_level="AUTOCOMMIT").connect() as connection:
        connection.execute(text(statement))
    database.close()


@pytest.fixture
def targets(empty_postgres: str, tmp_path: Path) -> dict[str, str]:
    return {"postgres": empty_postgres, "sqlite": f"sqlite:///{tmp_path}/moved/trainyard.db"}


def upgraded(url: str) -> None:
    database = Database(url)
    database.upgrade()
    database.close()


def quiet(_: transfer.TableCopy) -> None:
    pass


def fill(rig: ServiceHarness) -> str:
    """Something in every table; the id of a job that runs."""
    _, attempt = rig.running(name="наш ✓ 日", labels={"Ä": "ß", "a": "", "B": "b"})
    for step in range(1, 1500):
        attempt.metric(step, loss=1 / 3 + step)
    attempt.metric(1500, loss=float("nan"))
    attempt.say("sample", step=3, prompt="日本", text="a\nb\t\u2028")
    rig.ship(attempt)
    rig.checkpoint(attempt.launch.name.job_id, attempt, 1500)
    rig.exit(attempt, "crashed", Reason.HUNG, step=1500)
    headers = {"Idempotency-Key": "kept"}
    assert rig.client.post("/jobs", json=rig.spec(name="keyed"), headers=headers).status_code == 201
    job_id, attempt = rig.running(resources={"priority": 5})
    attempt.metric(1)
    rig.ship(attempt)
    return job_id


def told(rig: ServiceHarness) -> dict[str, Any]:
    """What the API says of everything, but for what goes with the time of asking."""
    found: dict[str, Any] = {}
    for job in rig.get("/jobs", limit=100)["data"]:
        found[job["id"]] = {key: value for key, value in job.items() if key not in ("summary", "alerts", "queue")}
        for what in ("metrics", "events", "checkpoints", "samples", "attempts"):
            found[f"{job['id']} {what}"] = rig.data(job["id"], what, limit=100)
        found[f"{job['id']} curve"] = rig.data(job["id"], "metrics", max_points=20)
    return found


@pytest.mark.parametrize("way", [("sqlite", "postgres"), ("postgres", "sqlite")])
def test_a_home_moves_and_its_runs_go_on(
    make_rig: MakeHarness, sqlite_url: str, targets: dict[str, str], way: tuple[str, str]
) -> None:
    url = sqlite_url
    if way[0] == "postgres":
        url = targets["postgres"]
        upgraded(url)
    rig = make_rig(url)
    running = fill(rig)
    before = told(rig)
    rig.close()
    copied = {table.table: table.rows for table in copy(url, targets[way[1]], quiet)}
    assert copied["jobs"] == 3
    assert copied["metrics"] == 1501
    assert copied["metric_stretches"] > 1
    assert "leader" not in copied
    moved = make_rig(targets[way[1]], launcher=rig.launcher, clock=rig.clock)
    assert told(moved) == before
    attempt = rig.launcher.of(running)
    attempt.metric(2)
    moved.ship(attempt)
    assert [row["step"] for row in moved.data(running, "metrics")] == [1, 2]
    again = moved.client.post("/jobs", json=moved.spec(name="keyed"), headers={"Idempotency-Key": "kept"})
    assert again.status_code == 200
    assert moved.submit(name="after") not in before
    moved.close()


def test_there_and_back_is_the_same(rig: ServiceHarness, empty_postgres: str, tmp_path: Path) -> None:
    fill(rig)
    rig.close()
    there = copy(rig.url, empty_postgres, quiet)
    back = copy(empty_postgres, f"sqlite:///{tmp_path}/back.db", quiet)
    assert [(table.table, table.rows, table.digest) for table in there] == [
        (table.table, table.rows, table.digest) for table in back
    ]
    first, last = (sqlite3.connect(path) for path in (tmp_path / "trainyard.db", tmp_path / "back.db"))
    for table in Base.metadata.sorted_tables:
        names = ", ".join(f'"{column.name}"' for column in table.columns)
        query = f"SELECT {names} FROM {table.name} ORDER BY {names}"
        if table.name not in transfer.SKIPPED_TABLES:
            # JSON may be written with other spaces.
            rows = [
                [tuple(str(value).replace(" ", "") for value in row) for row in base.execute(query)]
                for base in (first, last)
            ]
            assert rows[0] == rows[1], table.name
    first.close()
    last.close()


@pytest.mark.parametrize("kind", ["sqlite", "postgres"])
def test_a_target_that_holds_something_is_left_alone(rig: ServiceHarness, targets: dict[str, str], kind: str) -> None:
    rig.submit()
    rig.close()
    copy(rig.url, targets[kind], quiet)
    with pytest.raises(CopyRefused, match=r"not empty: there are rows in jobs"):
        copy(rig.url, targets[kind], quiet)
    database = Database(targets[kind])
    with database.read() as session:
        assert session.query(JobRow).count() == 1
    database.close()


def test_postgres_does_not_cut_off_a_copy_that_pauses(
    rig: ServiceHarness, empty_postgres: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig.close()
    shown: list[str] = []
    limit = text("SHOW idle_in_transaction_session_timeout")
    monkeypatch.setattr(transfer, "_require_empty", lambda writing: shown.append(writing.scalar(limit)))
    copy(rig.url, empty_postgres, quiet)
    assert shown == ["10min"]


def test_a_copy_that_fails_leaves_nothing(
    rig: ServiceHarness, empty_postgres: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(rig)
    rig.close()

    class Short(transfer.RowsDigest):
        count = 0

        def add(self, rows: Any) -> None:
            Short.count += 1
            super().add(rows[:-1] if Short.count == 6 else rows)

    monkeypatch.setattr(transfer, "RowsDigest", Short)
    with pytest.raises(CopyRefused, match="nothing was kept"):
        copy(rig.url, empty_postgres, quiet)
    monkeypatch.undo()
    assert sum(table.rows for table in copy(rig.url, empty_postgres, quiet)), "the target is still empty"


@pytest.mark.parametrize("held", ["source", "target"])
@pytest.mark.parametrize("kind", ["sqlite", "postgres"])
def test_a_database_in_use_is_not_touched(
    rig: ServiceHarness, targets: dict[str, str], held: str, kind: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    rig.close()
    ends = {"source": rig.url, "target": targets["postgres"] if kind == "postgres" else targets["sqlite"]}
    if kind == "postgres" and held == "source":
        upgraded(targets["postgres"])
        ends = {"source": targets["postgres"], "target": targets["sqlite"]}
    upgraded(ends[held])
    service = Database(ends[held])
    with service.read() as session:
        session.execute(text("SELECT 1"))
    with monkeypatch.context() as impatient:
        impatient.setattr("trainyard.service.db.engine.EXCLUSIVE_SECONDS", 0.1)
        with pytest.raises(CopyRefused, match=rf"the {held} is in use"):
            copy(ends["source"], ends["target"], quiet)
    service.close()
    copy(ends["source"], ends["target"], quiet)


def test_databases_that_cannot_be_copied(rig: ServiceHarness, empty_postgres: str, tmp_path: Path) -> None:
    rig.close()
    cases: list[tuple[str, str, str]] = [
        (rig.url, rig.url, "same one"),
        (f"sqlite:///{tmp_path}/nowhere.db", empty_postgres, "does not exist"),
        (empty_postgres, f"sqlite:///{tmp_path}/new.db", "no Trainyard database"),
        (rig.url, "postgresql://nobody@127.0.0.1:1/none", "OperationalError"),
    ]
    for source, target, why in cases:
        with pytest.raises(CopyRefused, match=why):
            copy(source, target, quiet)
    database = Database(rig.url)
    with database.write() as session:
        session.execute(text("UPDATE alembic_version SET version_num = '0001'"))
    database.close()
    with pytest.raises(CopyRefused, match="at migration 0001, this version is at"):
        copy(rig.url, empty_postgres, quiet)


def points(rig: ServiceHarness, count: int) -> None:
    job_id, _ = rig.running(steps=count)
    with rig.database.write() as session:
        point = {"job_id": job_id, "attempt": 1, "stitched": True, "epoch": 0.0, "loss": 1.0, "learning_rate": 1e-3}
        rest = {"tokens": 1, "nonfinite": False, "at": utc_now()}
        for begin in range(0, count, 10_000):
            rows = range(begin, min(begin + 10_000, count))
            session.execute(insert(MetricRow), [{**point, **rest, "seq": 10 + s, "step": s + 1} for s in rows])


def peak(work: Callable[[], object]) -> int:
    tracemalloc.start()
    work()
    found = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return found


def test_memory_does_not_grow_with_the_curve(rig: ServiceHarness, tmp_path: Path) -> None:
    points(rig, 6_000)
    rig.close()
    found = peak(lambda: copy(rig.url, f"sqlite:///{tmp_path}/big.db", quiet))
    print(f"6,000 points: {found / 2**20:.1f} MiB")
    assert found < 12 * 2**20


@pytest.mark.soak
def test_a_million_points(rig: ServiceHarness, empty_postgres: str, tmp_path: Path) -> None:
    points(rig, 1_000_000)
    rig.close()
    begin = time.monotonic()
    there = copy(rig.url, empty_postgres, quiet)
    middle = time.monotonic()
    back = copy(empty_postgres, f"sqlite:///{tmp_path}/big.db", quiet)
    print(f"1,000,000 points: there in {middle - begin:.0f} s, back in {time.monotonic() - middle:.0f} s")
    assert there == back


# The command


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "trainyard.service.db.cli", *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_the_command_upgrades(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TRAINYARD_HOME", str(tmp_path / "home"))
    assert cli.main(["upgrade"]) == 0
    assert (tmp_path / "home" / "trainyard.db").exists()
    assert capsys.readouterr().err == "the database is up to date\n"
    with pytest.raises(SystemExit):
        cli.main(["destroy"])
    capsys.readouterr()
    assert cli.main(["upgrade", "--database-url", "nothing"]) == 1
    assert capsys.readouterr().err.startswith("upgrade: TRAINYARD_DATABASE_URL or --database-url must be")
    away = "postgresql://u:secret@127.0.0.1:1/x"
    assert cli.main(["upgrade", "--database-url", away]) == 1
    assert capsys.readouterr().err.startswith("upgrade: the database cannot be used: connection failed")


def test_the_command_copies_homes(rig: ServiceHarness, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fill(rig)
    rig.close()
    assert cli.main(["copy", str(tmp_path), str(tmp_path / "new.db")]) == 0
    said = capsys.readouterr()
    assert "jobs" in said.out
    assert "sha256" in said.out
    assert "the same digest" in said.err
    assert cli.main(["copy", str(tmp_path), str(tmp_path / "new.db")]) == 1
    assert "not empty" in capsys.readouterr().err


def test_a_password_that_must_be_escaped_is_named_and_not_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["copy", "here.db", "postgresql+psycopg://me:a@secret/b@db/trainyard"]) == 1
    said = capsys.readouterr()
    assert 'write "@" as %40' in said.err
    assert "secret" not in said.err + said.out


def test_passwords_are_not_shown() -> None:
    assert "secret" not in printable_url("postgresql+psycopg://me:secret@db/trainyard")


# Backups


def test_a_backup_of_a_service_that_runs_is_a_home_that_goes_on(
    make_rig: MakeHarness, rig: ServiceHarness, tmp_path: Path
) -> None:
    job_id = fill(rig)
    cli.backup(tmp_path / "trainyard.db", tmp_path / "backup.db")
    attempt = rig.launcher.of(job_id)
    attempt.metric(2)
    rig.exit(attempt, "completed", step=2)
    rig.submit(name="after the backup")
    rig.close()
    restored = make_rig(f"sqlite:///{tmp_path}/backup.db", launcher=rig.launcher, clock=rig.clock)
    assert restored.status(job_id) == "running", "as it was then"
    restored.reconcile()
    assert restored.status(job_id) == "succeeded", "its end is read from the run directory"
    assert [row["step"] for row in restored.data(job_id, "metrics")] == [1, 2]
    assert restored.submit(name="goes on")
    restored.close()


def test_backups_that_cannot_be_made(
    rig: ServiceHarness, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TRAINYARD_HOME", str(tmp_path))
    taken = tmp_path / "taken.db"
    taken.write_text("mine")
    assert cli.main(["backup", str(taken)]) == 1
    assert taken.read_text() == "mine"
    assert cli.main(["backup", str(tmp_path / "nowhere" / "b.db")]) == 1
    assert cli.main(["backup", str(tmp_path / "b.db"), "--database-url", "postgresql://x/y"]) == 1
    assert "pg_dump" in capsys.readouterr().err
    (tmp_path / "trainyard.db").rename(tmp_path / "away")
    assert cli.main(["backup", str(tmp_path / "b.db")]) == 1
    (tmp_path / "trainyard.db").write_bytes(b"no database" * 1000)
    assert cli.main(["backup", str(tmp_path / "b.db")]) == 1
    assert not list(tmp_path.glob("*b.db*"))
