"""Removes a job's files: its run directory, and what it kept in a ``save_dir`` of its own.

What is to go is written down in ``trash/<job>.json`` before the record goes, so that a service that is killed in
between leaves nothing behind: at its next start, `sweep` removes the files of every note whose job is not there any
more. A fork's files are noted the same way until its record is there.
"""

import contextlib
import json
import logging
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from sqlalchemy import select

from trainyard.contract.locks import FileLock, LockBusy
from trainyard.contract.rundir import RunDir
from trainyard.service.db.engine import Database
from trainyard.service.db.models import JobRow
from trainyard.service.errors import Conflict
from trainyard.service.ids import JOB_ID
from trainyard.service.settings import Settings

LOCK_SECONDS = 10.0
"""For another request that removes the same job's files."""

MAX_NOTE_BYTES = 64 << 10

log = logging.getLogger("trainyard")


class PendingDeletion:
    """Directories that go with a job's record. Held by one process at a time: others, `sweep` too, leave them alone."""

    def __init__(self, settings: Settings, note: Path, seconds: float = 0.0) -> None:
        self._settings = settings
        self._note = note
        self._lock = FileLock(note).take(seconds=seconds)

    @property
    def job_id(self) -> str:
        """Whose they are."""
        return self._note.stem

    def write(self, paths: Sequence[Path]) -> None:
        """Note them, before anything is done."""
        os.ftruncate(self._lock.descriptor, 0)
        os.pwrite(self._lock.descriptor, json.dumps([str(path) for path in paths]).encode(), 0)
        os.fsync(self._lock.descriptor)

    def paths(self) -> list[Path]:
        """What was noted; [] where the note was never finished, and so nothing was done."""
        try:
            noted = json.loads(os.pread(self._lock.descriptor, MAX_NOTE_BYTES, 0))
            return [Path(path) for path in noted]
        except (ValueError, TypeError):
            return []

    def delete_files(self) -> None:
        """Remove them, and the note with the last of them."""
        for path in self.paths():
            if path.name == self.job_id and _may_delete(path, self._settings):
                shutil.rmtree(path, onerror=_log_error)
        if not any(path.exists() for path in self.paths()):
            self.cancel()

    def cancel(self) -> None:
        """They stay."""
        self._note.unlink(missing_ok=True)

    def close(self) -> None:
        """What was neither carried out nor forgotten is decided at the next start."""
        self._lock.release()


@contextlib.contextmanager
def mark_for_deletion(settings: Settings, job_id: str, save_dir: str | None) -> Iterator[PendingDeletion]:
    """The files of a job whose record goes now, or is not there yet. Raises Conflict."""
    settings.trash.mkdir(parents=True, exist_ok=True)
    run = RunDir(settings.runs / job_id)
    try:
        note = PendingDeletion(settings, settings.trash / f"{job_id}.json", LOCK_SECONDS)
    except LockBusy:
        raise Conflict() from None
    try:
        note.write(sorted({run.path, run.artifacts(save_dir).path}))
        yield note
    finally:
        note.close()


def sweep(settings: Settings, database: Database) -> int:
    """Carry out what an earlier service noted and did not get to; returns how many notes there were."""
    found = sorted(settings.trash.glob("*.json")) if settings.trash.is_dir() else []
    for path in found:
        if not JOB_ID.fullmatch(path.stem):
            continue
        try:
            note = PendingDeletion(settings, path)
        except (LockBusy, OSError):
            continue  # somebody is at it
        try:
            _settle(note, database)
        finally:
            note.close()
    return len(found)


def _settle(note: PendingDeletion, database: Database) -> None:
    with database.read() as session:
        kept = session.scalar(select(JobRow.id).where(JobRow.id == note.job_id)) is not None
    if kept or not note.paths():
        note.cancel()
        return
    log.info("removing files that were left behind", extra={"job_id": note.job_id})
    note.delete_files()


def _may_delete(path: Path, settings: Settings) -> bool:
    """Looked at once more: a directory may have become a link since the job was submitted."""
    real = path.resolve()
    return real.name == path.name and any(real.is_relative_to(r) for r in (*settings.save_roots, settings.home))


def _log_error(_function: object, path: str, error: object) -> None:
    reason = error[1] if isinstance(error, tuple) else error
    if not isinstance(reason, FileNotFoundError):
        log.warning("could not remove a file of a deleted job: %s: %s", path, type(reason).__name__)
