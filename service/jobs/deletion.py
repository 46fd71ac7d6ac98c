"""Delete a job's files: its run directory, and its directory below a ``save_dir`` outside it.

The paths are written to ``trash/<job>.json`` before the record is deleted. If the service is killed in between, `sweep`
deletes the files of every such note whose job no longer exists at the next start. A fork's files are noted in the same
way until its record exists.
"""

import contextlib
import json
import logging
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from sqlalchemy import select

from trainyard.contract.allowed_paths import directory_inside
from trainyard.contract.locks import FileLock, LockBusy
from trainyard.contract.rundir import RunDir
from trainyard.service.db.engine import Database
from trainyard.service.db.models import JobRow
from trainyard.service.errors import Conflict
from trainyard.service.ids import JOB_ID
from trainyard.service.settings import Settings

LOCK_SECONDS = 10.0
"""How long to wait for another request that deletes the same job's files."""

MAX_NOTE_BYTES = 64 << 10

log = logging.getLogger("trainyard")


class PendingDeletion:
    """The note of directories to delete with a job's record. It is locked: one process at a time works on it."""

    def __init__(self, settings: Settings, note: Path, seconds: float = 0.0) -> None:
        self._settings = settings
        self._note = note
        self._lock = FileLock.acquire(note, seconds=seconds)

    @property
    def job_id(self) -> str:
        """The job whose files they are."""
        return self._note.stem

    def write(self, paths: Sequence[Path]) -> None:
        """Note the paths durably, before anything is deleted."""
        os.ftruncate(self._lock.descriptor, 0)
        os.pwrite(self._lock.descriptor, json.dumps([str(path) for path in paths]).encode(), 0)
        os.fsync(self._lock.descriptor)

    def paths(self) -> list[Path]:
        """Return the noted paths; [] if the note is incomplete, so that nothing was deleted yet."""
        try:
            return [Path(path) for path in json.loads(os.pread(self._lock.descriptor, MAX_NOTE_BYTES, 0))]
        except (ValueError, TypeError):
            return []

    def delete_files(self) -> None:
        """Delete the files; delete the note once all are gone."""
        for path in self.paths():
            if path.name == self.job_id and path.exists():
                self._delete(path)
        if not any(path.exists() for path in self.paths()):
            self.cancel()

    def _delete(self, path: Path) -> None:
        # Below the roots as they are now: a directory may have become a symbolic link since the job was submitted.
        try:
            with directory_inside(path.parent, self._settings.writable_roots) as folder:
                shutil.rmtree(folder / path.name, onerror=_log_error)
        except OSError as error:
            log.warning("could not remove files of a deleted job: %s: %s", path, type(error).__name__)

    def cancel(self) -> None:
        """Delete the note; files that still exist stay."""
        self._note.unlink(missing_ok=True)

    def close(self) -> None:
        """Release the lock. If the note still exists, `sweep` decides at the next start."""
        self._lock.release()


@contextlib.contextmanager
def mark_for_deletion(settings: Settings, job_id: str, save_dir: str | None) -> Iterator[PendingDeletion]:
    """Note the files of a job whose record is deleted now, or does not exist yet. Raises Conflict."""
    settings.trash.mkdir(parents=True, exist_ok=True)
    run = RunDir(settings.runs / job_id)
    try:
        note = PendingDeletion(settings, settings.trash / f"{job_id}.json", LOCK_SECONDS)
    except LockBusy:
        raise Conflict() from None
    try:
        artifacts = {each.path for each in run.artifact_dirs(save_dir)}
        note.write(sorted({run.path, *artifacts}))
        yield note
    finally:
        note.close()


def sweep(settings: Settings, database: Database) -> int:
    """Finish the deletions that an earlier service process noted; return the number of notes found."""
    notes = sorted(settings.trash.glob("*.json")) if settings.trash.is_dir() else []
    for path in notes:
        if not JOB_ID.fullmatch(path.stem):
            continue
        try:
            note = PendingDeletion(settings, path)
        except (LockBusy, OSError):
            continue  # another process works on it
        try:
            _finish(note, database)
        finally:
            note.close()
    return len(notes)


def _finish(note: PendingDeletion, database: Database) -> None:
    with database.read() as session:
        job_exists = session.scalar(select(JobRow.id).where(JobRow.id == note.job_id)) is not None
    if job_exists or not note.paths():
        note.cancel()
        return
    log.info("removing files that were left behind", extra={"job_id": note.job_id})
    note.delete_files()


def _log_error(_function: object, path: str, error: object) -> None:
    reason = error[1] if isinstance(error, tuple) else error
    if not isinstance(reason, FileNotFoundError):
        log.warning("could not remove a file of a deleted job: %s: %s", path, type(reason).__name__)
