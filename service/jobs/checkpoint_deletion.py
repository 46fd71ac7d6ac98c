"""Removes a checkpoint that nobody needs: never the last valid one, and never one that an attempt may be reading."""

import logging
import shutil
from datetime import datetime
from pathlib import Path

from sqlalchemy import delete, select
from sqlalchemy.orm import Session

from trainyard.contract.rundir import REMOVING_PREFIX, RunDir
from trainyard.contract.status import LIVE, JobStatus
from trainyard.service.auth.principal import Principal
from trainyard.service.db.models import AttemptRow, CheckpointRow, JobRow
from trainyard.service.errors import CheckpointInUse, CheckpointNotFound, LastCheckpoint
from trainyard.service.jobs import repository
from trainyard.service.jobs.repository import EventDraft
from trainyard.service.storage.checkpoint_files import checkpoint_directory, is_valid

"""What a name begins with that the worker takes for a leftover, and collects."""

log = logging.getLogger("trainyard")


def unpublish(session: Session, runs: Path, job_id: str, step: int, by: Principal, now: datetime) -> Path:
    """Take the full checkpoint of ``step`` out of the list and away from its name; the caller deletes what is returned.

    The rename is done here, under the job's lock: decision and deed are one, or two removals at once would each take
    the other's checkpoint for the one that stays.
    """
    job = repository.lock(session, job_id)
    rows = session.scalars(
        select(CheckpointRow).where(CheckpointRow.job_id == job.id, CheckpointRow.kind == "full")
    ).all()
    products = RunDir(runs / job.id).artifacts(job.spec["checkpoint"]["save_dir"])
    places = {
        row.step: place for row in rows if (place := checkpoint_directory(products, row.step, row.path)) is not None
    }
    if step not in places or not places[step].is_dir():
        raise CheckpointNotFound()
    others = [other for other, place in places.items() if other != step and is_valid(place)]
    if not others and is_valid(places[step]):
        raise LastCheckpoint()
    _require_unused(session, job, step, max(others, default=-1))
    same = (CheckpointRow.job_id == job.id, CheckpointRow.path == str(places[step]))
    session.execute(delete(CheckpointRow).where(*same))
    repository.record_event(
        session, job, EventDraft("checkpoint_removed", _message(step), by.name, data={"step": step}), now
    )
    session.flush()
    return _rename_away(places[step])


def _message(step: int) -> str:
    return f"removed the checkpoint of step {step:,}: asked to"


def _require_unused(session: Session, job: JobRow, step: int, newest_other: int) -> None:
    """A run that lives may go back to its newest checkpoint, and one that begins reads one of them."""
    status = JobStatus(job.status)
    if status not in LIVE and status is not JobStatus.QUEUED:
        return
    if job.resume_step == step:
        raise CheckpointInUse("The job was asked to go on from this checkpoint.")
    current = (AttemptRow.job_id == job.id, AttemptRow.number == job.attempt)
    begun = session.scalar(select(AttemptRow.start_step).where(*current))
    if step > newest_other:
        raise CheckpointInUse("It is the newest one, and the run may go back to it: pause the job first.")
    if status is not JobStatus.QUEUED and begun is None:
        raise CheckpointInUse("The attempt may be reading it: wait until it has started.")


def _rename_away(path: Path) -> Path:
    leaving = path.with_name(f"{REMOVING_PREFIX}{path.name}")
    shutil.rmtree(leaving, ignore_errors=True)
    try:
        path.rename(leaving)
    except OSError as error:
        raise CheckpointInUse(f"It cannot be removed: {error.strerror}.") from error
    return leaving


def delete_files(leaving: Path) -> None:
    """Delete what was unpublished. What stays is collected when the job's next attempt begins."""
    shutil.rmtree(leaving, ignore_errors=True)
    if leaving.exists():
        log.warning("could not delete a removed checkpoint: %s", leaving)
