"""Delete a checkpoint on request: never the last valid one, and never one that an attempt may be reading."""

import contextlib
import logging
import shutil
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

from sqlalchemy import delete, select
from sqlalchemy.orm import Session

from trainyard.contract.allowed_paths import directory_inside
from trainyard.contract.rundir import REMOVING_PREFIX, RunDir
from trainyard.contract.status import LIVE, WAITING, JobStatus
from trainyard.service.auth.principal import Principal
from trainyard.service.db.models import AttemptRow, CheckpointRow, JobRow
from trainyard.service.errors import CheckpointInUse, CheckpointNotFound, LastCheckpoint
from trainyard.service.jobs import repository
from trainyard.service.jobs.repository import EventDraft
from trainyard.service.settings import Settings
from trainyard.service.storage.checkpoint_files import checkpoint_directory, is_valid

log = logging.getLogger("trainyard")


def unpublish(session: Session, settings: Settings, job_id: str, step: int, by: Principal, now: datetime) -> Path:
    """Remove the full checkpoint of ``step`` from the list, and return its renamed directory for the caller to delete.

    Raises CheckpointNotFound, LastCheckpoint or CheckpointInUse.
    """
    job = repository.lock(session, job_id)
    rows = session.scalars(
        select(CheckpointRow).where(CheckpointRow.job_id == job.id, CheckpointRow.kind == "full")
    ).all()
    run, save_dir = RunDir(settings.runs / job.id), job.spec["checkpoint"]["save_dir"]
    found = {row.step: checkpoint_directory(run, save_dir, row.step, row.path) for row in rows}
    paths = {number: path for number, path in found.items() if path is not None}
    if step not in paths or not paths[step].is_dir():
        raise CheckpointNotFound()
    others = [other for other, path in paths.items() if other != step and is_valid(path, settings.writable_roots)]
    if not others and is_valid(paths[step], settings.writable_roots):
        raise LastCheckpoint()
    _require_unused(session, job, step, max(others, default=-1))
    same = (CheckpointRow.job_id == job.id, CheckpointRow.path == str(paths[step]))
    session.execute(delete(CheckpointRow).where(*same))
    message = f"removed the checkpoint of step {step:,}: asked to"
    repository.record_event(session, job, EventDraft("checkpoint_removed", message, by.name, data={"step": step}), now)
    session.flush()
    # Under the job's lock: otherwise two removals at once would each count on the other's checkpoint to stay.
    return _rename_away(paths[step], settings.writable_roots)


def _require_unused(session: Session, job: JobRow, step: int, newest_other: int) -> None:
    # A live run may roll back to its newest checkpoint, and one that starts reads one of them.
    status = JobStatus(job.status)
    if status not in LIVE | WAITING:
        return
    if job.resume_step == step:
        raise CheckpointInUse("The job was asked to resume from this checkpoint.")
    if step > newest_other:
        raise CheckpointInUse("It is the newest one, and the run may go back to it: pause the job first.")
    current = (AttemptRow.job_id == job.id, AttemptRow.number == job.attempt)
    start_step = session.scalar(select(AttemptRow.start_step).where(*current))
    if status not in WAITING and start_step is None:
        raise CheckpointInUse("The attempt may be reading it: wait until it has started.")


def _rename_away(path: Path, roots: Sequence[Path]) -> Path:
    removing = path.with_name(f"{REMOVING_PREFIX}{path.name}")
    try:
        with directory_inside(path.parent, roots) as folder:
            shutil.rmtree(folder / removing.name, ignore_errors=True)
            (folder / path.name).rename(folder / removing.name)
    except OSError as error:
        raise CheckpointInUse(f"It cannot be removed: {error.strerror}.") from error
    return removing


def restore(removing: Path, roots: Sequence[Path] = ()) -> None:
    """Rename an unpublished checkpoint back, after the transaction that removed it from the list has failed."""
    try:
        with directory_inside(removing.parent, roots) as folder:
            (folder / removing.name).rename(folder / removing.name.removeprefix(REMOVING_PREFIX))
    except OSError as error:
        log.warning("could not restore a checkpoint whose deletion failed: %s: %s", removing, error.strerror)


def delete_files(removing: Path, roots: Sequence[Path] = ()) -> None:
    """Delete an unpublished checkpoint. The job's next attempt deletes what remains, by its REMOVING_PREFIX."""
    with contextlib.suppress(OSError), directory_inside(removing.parent, roots) as folder:
        shutil.rmtree(folder / removing.name, ignore_errors=True)
    if removing.exists():
        log.warning("could not delete a removed checkpoint: %s", removing)
