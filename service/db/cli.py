"""``python -m trainyard.service.db.cli``: what is done to a database from outside the service: upgrade, copy, back up."""

import argparse
import os
import sqlite3
import sys
from contextlib import closing
from pathlib import Path

from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError, DBAPIError

from trainyard.contract.rundir import fsync_directory
from trainyard.service.db.copy import (
    CopyRefused,
    TableCopy,
    copy,
    printable_url,
)
from trainyard.service.db.engine import Database, UnknownSchemaVersion, error_text
from trainyard.service.settings import InvalidSettings, Settings

DATABASE = "trainyard.db"


class BackupError(Exception):
    """The backup cannot be made; the message says why and what to do."""


def main(arguments: list[str] | None = None) -> int:
    """Do one thing, say what was done; the answer is an exit code."""
    given = _parser().parse_args(arguments)
    try:
        given.run(given)
    except DBAPIError as error:
        return _refuse(given, error_text(error))
    except OSError as error:
        return _refuse(given, f"{error.filename}: {error.strerror}")
    except (CopyRefused, BackupError, UnknownSchemaVersion, ArgumentError, InvalidSettings) as error:
        return _refuse(given, str(error))
    return 0


def _refuse(given: argparse.Namespace, why: str) -> int:
    print(f"{given.what}: {why}", file=sys.stderr)
    return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m trainyard.service.db.cli", description="The service's database")
    verbs = parser.add_subparsers(dest="what", required=True)
    _add(verbs, "upgrade", _upgrade, "bring the tables up to date")
    backup_parser = _add(verbs, "backup", _backup, "write a copy of the SQLite database while the service runs")
    backup_parser.add_argument("file", type=Path)
    copying = verbs.add_parser("copy", help="move everything into another, empty database")
    copying.set_defaults(run=_copy)
    for name in ("source", "target"):
        copying.add_argument(name, help="URL of a database, a SQLite file, or a home")
    return parser


def _add(
    verbs: "argparse._SubParsersAction[argparse.ArgumentParser]", name: str, run: object, explained: str
) -> argparse.ArgumentParser:
    parser = verbs.add_parser(name, help=explained)
    parser.add_argument("--database-url", help="default: TRAINYARD_DATABASE_URL, or SQLite in the home")
    parser.set_defaults(run=run)
    return parser


def _upgrade(given: argparse.Namespace) -> None:
    settings = _settings(given)
    settings.home.mkdir(parents=True, exist_ok=True)
    database = Database(settings.database_url)
    try:
        database.upgrade(settings.home / "migrate.lock")
    finally:
        database.close()
    print("the database is up to date", file=sys.stderr)


def _backup(given: argparse.Namespace) -> None:
    url = make_url(_settings(given).database_url)
    if url.get_backend_name() != "sqlite":
        raise BackupError("Postgres has its own tool: pg_dump --format=custom --file=FILE DATABASE")
    backup(Path(url.database or ""), given.file)
    print(f"{given.file}: {given.file.stat().st_size:,} bytes, checked", file=sys.stderr)


def _copy(given: argparse.Namespace) -> None:
    source, target = database_url(given.source), database_url(given.target)
    print(f"copying {printable_url(source)} to {printable_url(target)}", file=sys.stderr)
    found = copy(source, target, _tell)
    print(f"{sum(table.rows for table in found):,} rows are in both, each table with the same digest", file=sys.stderr)


def _tell(copied: TableCopy) -> None:
    print(f"{copied.table:<20} {copied.rows:>12,} rows   sha256 {copied.digest}", flush=True)


def _settings(given: argparse.Namespace) -> Settings:
    return Settings.read(os.environ, host="127.0.0.1", database_url=given.database_url)


def database_url(given: str) -> str:
    """A URL as it is; a folder's or a file's path as that of SQLite there."""
    if "://" in given:
        return given
    path = Path(given).resolve()
    return f"sqlite:///{path / DATABASE if path.is_dir() else path}"


def backup(database: Path, into: Path) -> None:
    """Write a whole, checked copy of a SQLite database that may be in use. Raises BackupRefused."""
    if not database.is_file():
        raise BackupError(f"there is no database at {database}")
    if into.exists():
        raise BackupError(f"{into} is there already; name a new file")
    unfinished = into.with_name(f".{into.name}.unfinished")
    unfinished.unlink(missing_ok=True)
    try:
        with closing(sqlite3.connect(database, timeout=30, isolation_level=None)) as connection:
            # One read transaction: writers go on meanwhile, and what they write is not in it.
            connection.execute("VACUUM INTO ?", (str(unfinished),))
        with closing(sqlite3.connect(unfinished)) as connection:
            verdict = connection.execute("PRAGMA integrity_check").fetchone()[0]
        if verdict != "ok":
            raise BackupError(f"{database} is damaged: {verdict}")
        with unfinished.open("rb") as file:
            os.fsync(file.fileno())
        unfinished.rename(into)
        fsync_directory(into.parent)
    except (sqlite3.Error, OSError) as error:
        raise BackupError(f"{database}: {error}") from error
    finally:
        unfinished.unlink(missing_ok=True)


if __name__ == "__main__":
    sys.exit(main())
