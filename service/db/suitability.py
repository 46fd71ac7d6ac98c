"""Reject a database that would break what the service promises, and warn of one that weakens it. Done once, at start.

A server is judged by its behaviour: a pooler, for example, is recognised by what it does to a session, not by its name.
"""

import contextlib
import os
import re
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from sqlalchemy import Engine

from trainyard.service.db.engine import APPLICATION, KEEPALIVES, Database, unusable

if TYPE_CHECKING:
    # Imported only if it is used: a service on SQLite starts faster without it.
    import psycopg

MOUNTS = Path("/proc/self/mountinfo")
# fmt: off
NETWORK_FILE_SYSTEMS = frozenset((
    "afs", "beegfs", "ceph", "cifs", "gfs2", "glusterfs", "gpfs", "lustre", "ncpfs", "nfs", "nfs4", "ocfs2", "orangefs",
    "panfs", "pvfs2", "smb3", "smbfs", "wekafs", "fuse.ceph-fuse", "fuse.gcsfuse", "fuse.glusterfs", "fuse.juicefs",
    "fuse.rclone", "fuse.s3fs", "fuse.sshfs",
))
# fmt: on

PROBE = "trainyard.probe"
"""A session variable that nothing else uses."""

PROBE_ROUNDS = 3

NETWORK = (
    "the SQLite database {file} is on a network file system ({kind}), on which locks and shared memory of SQLite are "
    "not reliable: move it to a local disk and set TRAINYARD_DATABASE_URL=sqlite:////LOCAL/FOLDER/trainyard.db, or "
    "use Postgres"
)
REPLICA = (
    "the Postgres server is a replica, on which nothing can be stored: set TRAINYARD_DATABASE_URL to the primary "
    "server, or list all servers in it and add ?target_session_attrs=read-write"
)
READ_ONLY = "transactions on this Postgres database are read-only: set default_transaction_read_only = off for it"
POOLER = (
    "a pooler between the service and Postgres runs the statements of one session on different connections (PgBouncer: "
    "pool_mode = transaction or statement), so that time limits and prepared statements of the service are lost: use "
    "pool_mode = session, or the address of Postgres itself"
)
ASYNCHRONOUS = (
    "synchronous_commit is off on this Postgres server; the service turns it on for its own connections, because what "
    "it has confirmed must survive a crash of the server"
)


class UnsuitableDatabase(Exception):
    """The service cannot keep its promises on this database. The message says why and what to do."""


class _Mount(NamedTuple):
    point: Path
    kind: str


def require_local_file(file: Path) -> None:
    """Raise UnsuitableDatabase if a SQLite file is, or would be, on a network file system."""
    kind = _file_system(file.resolve())
    if kind in NETWORK_FILE_SYSTEMS:
        raise UnsuitableDatabase(NETWORK.format(file=file, kind=kind))


def _file_system(path: Path) -> str | None:
    """Return the type of the file system that has this absolute path, or None if it is unknown."""
    try:
        # A mount point may have a name that is not UTF-8. The service must start nevertheless. Only "\n" ends a line:
        # `splitlines` would cut a name at a form feed or U+2028.
        text = os.fsdecode(MOUNTS.read_bytes())
        mounts = [_parse_mount(line) for line in text.split("\n") if line]
    except OSError:
        return None
    above = [mount for mount in mounts if path.is_relative_to(mount.point)]
    # Of several at the same place, the last one covers the others.
    return max(enumerate(above), key=lambda item: (len(item[1].point.parts), item[0]))[1].kind if above else None


def _parse_mount(line: str) -> _Mount:
    before, _, after = line.partition(" - ")
    # Blanks and backslashes in a path are written as three octal digits.
    point = re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), before.split(" ")[4])
    return _Mount(Path(point), after.split(" ")[0])


def require_suitable_server(database: Database) -> list[str]:
    """Return warnings about a Postgres server; none for SQLite. Raises UnsuitableDatabase."""
    if database.is_sqlite:
        return []
    with _two_sessions(database.engine) as (session, other):
        if _value(session, "SELECT pg_is_in_recovery()"):
            raise UnsuitableDatabase(REPLICA)
        if _value(session, "SHOW default_transaction_read_only") == "on":
            raise UnsuitableDatabase(READ_ONLY)
        if any(_loses_session(session, other) for _ in range(PROBE_ROUNDS)):
            raise UnsuitableDatabase(POOLER)
        return [ASYNCHRONOUS] if _value(session, "SHOW synchronous_commit") == "off" else []


@contextlib.contextmanager
def _two_sessions(engine: Engine) -> Iterator[tuple["psycopg.Connection", "psycopg.Connection"]]:
    """Open two sessions without transactions. An engine begins one at once, which some poolers do not allow."""
    import psycopg

    arguments, given = engine.dialect.create_connect_args(engine.url)
    options: dict[str, Any] = {**given, **KEEPALIVES, "application_name": APPLICATION, "autocommit": True}
    # Behind a pooler, the next execution of a prepared statement may be on a connection that does not know it.
    options["prepare_threshold"] = None
    try:
        with psycopg.connect(*arguments, **options) as one, psycopg.connect(*arguments, **options) as other:
            yield one, other
    except psycopg.Error as error:
        raise UnsuitableDatabase(unusable(error)) from error


def _value(session: "psycopg.Connection", query: str) -> object:
    row = session.execute(query.encode()).fetchone()
    assert row is not None
    return row[0]


def _loses_session(session: "psycopg.Connection", other: "psycopg.Connection") -> bool:
    """Return whether a value that was set in one session is missing there afterwards, or visible in another one."""
    value, read = secrets.token_hex(8), f"SELECT current_setting('{PROBE}', true)"
    _value(session, f"SELECT set_config('{PROBE}', '{value}', false)")
    return _value(session, read) != value or _value(other, read) == value
