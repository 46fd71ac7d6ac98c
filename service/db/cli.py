"""``python -m trainyard.service.db.cli``: upgrade, copy or back up the database without the service."""

import argparse
import os
import sqlite3
import sys
from contextlib import closing
from pathlib import Path

from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError, DBAPIError

from trainyard.contract.rundir import fsync_directory
from trainyard.contract.stdio import run_command
from trainyard.service.db.copy import CopyRefused, TableCopy, copy, printable_url
from trainyard.service.db.engine import Database, UnknownSchemaVersion, error_text
from trainyard.service.db.suitability import UnsuitableDatabase, require_local_file, require_suitable_server
from trainyard.service.home import create_database, create_directory
from trainyard.service.settings import DATABASE_FILE, InvalidSettings, Settings, sqlite_url
from trainyard.service.settings_base import parse_database_url


class BackupError(Exception):
    """The backup cannot be made; the message has the reason and what to do."""


def main(arguments: list[str] | None = None) -> int:
    """Run a command and return its exit code."""
    options = _parser().parse_args(arguments)
    try:
        options.run(options)
        return 0
    except DBAPIError as error:
        reason = error_text(error)
    except OSError as error:
        reason = f"{error.filename}: {error.strerror}"
    except (
        CopyRefused,
        BackupError,
        UnknownSchemaVersion,
        UnsuitableDatabase,
        ArgumentError,
        InvalidSettings,
    ) as error:
        reason = str(error)
    print(f"{options.command}: {reason}", file=sys.stderr)
    return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m trainyard.service.db.cli", description="The service's database")
    commands = parser.add_subparsers(dest="command", required=True)
    upgrade = commands.add_parser("upgrade", help="bring the tables up to date")
    upgrade.set_defaults(run=_upgrade)
    backup_ = commands.add_parser("backup", help="write a copy of the SQLite database while the service runs")
    backup_.set_defaults(run=_backup)
    for command in (upgrade, backup_):
        command.add_argument("--database-url", help="default: TRAINYARD_DATABASE_URL, or SQLite in the home")
    backup_.add_argument("file", type=Path)
    copy_ = commands.add_parser("copy", help="copy everything into another, empty database")
    copy_.set_defaults(run=_copy)
    for name in ("source", "target"):
        copy_.add_argument(name, help="URL of a database, a SQLite file, or a home")
    return parser


def _upgrade(options: argparse.Namespace) -> None:
    settings = _settings(options)
    create_directory(settings.home, settings.home_mode)
    if settings.database_file is not None:
        require_local_file(settings.database_file)
    database = Database(settings.database_url)
    try:
        for warning in require_suitable_server(database):
            print(warning, file=sys.stderr)
        database.upgrade(settings.home / "migrate.lock")
    finally:
        database.close()
    print("the database is up to date", file=sys.stderr)


def _backup(options: argparse.Namespace) -> None:
    url = make_url(_settings(options).database_url)
    if url.get_backend_name() != "sqlite":
        raise BackupError("Postgres has its own tool: pg_dump --format=custom --file=FILE DATABASE")
    backup(Path(url.database or ""), options.file)
    print(f"{options.file}: {options.file.stat().st_size:,} bytes, checked", file=sys.stderr)


def _copy(options: argparse.Namespace) -> None:
    source, target = database_url(options.source), database_url(options.target)
    print(f"copying {printable_url(source)} to {printable_url(target)}", file=sys.stderr)
    tables = copy(source, target, _print_table)
    print(f"{sum(table.rows for table in tables):,} rows are in both, each table with the same digest", file=sys.stderr)


def _print_table(table: TableCopy) -> None:
    print(f"{table.table:<20} {table.rows:>12,} rows   sha256 {table.digest}", flush=True)


def _settings(options: argparse.Namespace) -> Settings:
    return Settings.read(os.environ, host="127.0.0.1", database_url=options.database_url)


def database_url(text: str) -> str:
    """Return a URL as it is, and the path of a home or SQLite file as a URL. Raises InvalidSettings."""
    if "://" in text:
        try:
            parse_database_url(text)
        except InvalidSettings as error:
            raise InvalidSettings(f"the URL of a database {error}") from None
        return text
    path = Path(text).resolve()
    return sqlite_url(path / DATABASE_FILE if path.is_dir() else path)


def backup(database: Path, target: Path) -> None:
    """Write a complete, checked copy of a SQLite database that may be in use. Raises BackupError."""
    if not database.is_file():
        raise BackupError(f"there is no database at {database}")
    if not target.parent.is_dir():
        raise BackupError(f"{target.parent} is not a directory; create it first")
    if target.exists():
        raise BackupError(f"{target} exists already; name a new file")
    unfinished = target.with_name(f".{target.name}.unfinished")
    unfinished.unlink(missing_ok=True)
    try:
        # Only the service's user may read a copy of the secrets.
        create_database(unfinished)
        with closing(sqlite3.connect(database, timeout=30, isolation_level=None)) as connection:
            # VACUUM INTO reads one snapshot; concurrent writers are not blocked.
            connection.execute("VACUUM INTO ?", (str(unfinished),))
        with closing(sqlite3.connect(unfinished)) as connection:
            result = connection.execute("PRAGMA integrity_check").fetchone()[0]
        if result != "ok":
            raise BackupError(f"{database} is damaged: {result}")
        with unfinished.open("rb") as file:
            os.fsync(file.fileno())
        unfinished.rename(target)
        fsync_directory(target.parent)
    except (sqlite3.Error, OSError) as error:
        raise BackupError(f"{database}: {error}") from error
    finally:
        unfinished.unlink(missing_ok=True)


if __name__ == "__main__":
    sys.exit(run_command("trainyard db", main))
