"""The modes of the home and of a SQLite database: by default only the user of the service may enter and read them.

The database has the secrets of webhooks; runs, logs and the corpus cache have the texts that users train on.
"""

import contextlib
import logging
import os
import secrets
from pathlib import Path

from trainyard.contract.service_proof import KEY_FILE, parse_key

DEFAULT_MODE = 0o700
DATABASE_MODE = 0o600
KEY_MODE = 0o600

DIRECTORIES = ("cache", "runs", "trash")
"""What the service makes in its home."""

OWN_FILES = ("lost+found", "migrate.lock", "service.json", KEY_FILE, "service.lock", "trainyard.db")

log = logging.getLogger("trainyard")


def create_directory(path: Path, mode: int) -> None:
    """Create the directory with exactly this mode, if it is missing. Raises OSError."""
    if path.is_dir():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    path.mkdir(mode=DEFAULT_MODE)
    # Unlike that of mkdir, the mode of chmod does not depend on the umask.
    path.chmod(mode)


def create_database(path: Path) -> None:
    """Create the file of a SQLite database, if it is missing. SQLite itself would let everyone read it. Raises OSError.

    SQLite gives its other files (-wal, -shm) the mode of this one.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, DATABASE_MODE))


def service_key(home: Path) -> bytes:
    """Return the key by which clients recognise the service of this home, see `contract.service_proof`.

    It is created if it is missing, invalid, or was readable by others. Raises OSError.
    """
    path = home / KEY_FILE
    with contextlib.suppress(FileNotFoundError):
        key = parse_key(path.read_text("ascii", errors="replace"))
        if key is not None and path.stat().st_mode & 0o077 == 0:
            return key
        path.unlink(missing_ok=True)
    draft = path.with_name(f"{KEY_FILE}.{os.getpid()}.tmp")
    draft.unlink(missing_ok=True)
    with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, KEY_MODE), "w") as file:
        file.write(f"{secrets.token_hex(32)}\n")
    try:
        # Unlike a rename, a link never replaces the key that another service of this home has just made.
        with contextlib.suppress(FileExistsError):
            os.link(draft, path)
    finally:
        draft.unlink()
    key = parse_key(path.read_text("ascii"))
    assert key is not None
    return key


def restrict(home: Path, mode: int, database: Path | None) -> None:
    """Give an existing home and its database the right modes, with one line in the log if anything changed."""
    changed = []
    for path in (home,) if _is_own(home) else _make_directories(home, mode):
        changed += _change_mode(path, mode)
    for path in _database_files(database) if database is not None else ():
        changed += _change_mode(path, DATABASE_MODE)
    if changed:
        log.warning("modes were changed: %s; TRAINYARD_HOME_MODE sets that of the home", ", ".join(changed))


def _is_own(home: Path) -> bool:
    # A folder that was there before, such as /data, may have other users who must be able to enter it.
    names = {path.name for path in home.iterdir()}
    return all(name in (*DIRECTORIES, *OWN_FILES) or name.startswith("trainyard.db") for name in names)


def _make_directories(home: Path, mode: int) -> list[Path]:
    directories = [home / name for name in DIRECTORIES]
    for directory in directories:
        create_directory(directory, mode)
    return directories


def _database_files(database: Path) -> list[Path]:
    files = [database.with_name(f"{database.name}{suffix}") for suffix in ("", "-wal", "-shm", "-journal")]
    return [file for file in files if file.is_file()]


def _change_mode(path: Path, mode: int) -> list[str]:
    before = path.stat().st_mode & 0o7777
    if before in (mode, mode | 0o2000):  # A new directory inherits the set-group-ID bit of its parent.
        return []
    try:
        path.chmod(mode)
    except OSError as error:
        log.warning("the mode of %s stays %04o: %s", path, before, error.strerror)
        return []
    return [f"{path} from {before:04o} to {mode:04o}"]


def share_new_files(mode: int) -> None:
    """Let the umask allow new files what ``mode`` allows for the home: all processes of runs inherit it."""
    umask = os.umask(0o077)
    os.umask(umask & ~mode)
