"""Requests to evaluate a checkpoint: one row for each task, and links to the weights until the evaluation has ended."""

import contextlib
import importlib.util
import shutil
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from trainyard.contract.allowed_paths import directory_inside
from trainyard.contract.rundir import MODEL_FILE, STATE_FILE, ArtifactDir
from trainyard.contract.spec import TaskSpec
from trainyard.service.db.models import EvaluationRow
from trainyard.service.errors import EvaluationUnavailable, StorageError, TooManyEvaluations
from trainyard.service.ids import new_id
from trainyard.service.jobs import repository
from trainyard.service.jobs.repository import EventDraft
from trainyard.service.settings import Settings
from trainyard.service.storage.share import link_checkpoint

MAX_OPEN = 100
"""Evaluations that wait or run."""

NEEDED_FILES = (MODEL_FILE, STATE_FILE)

PENDING, RUNNING, DONE, FAILED = "pending", "running", "done", "failed"


def require_evaluator(settings: Settings) -> None:
    """Raise EvaluationUnavailable if torch is not installed, or if evaluations are turned off."""
    if importlib.util.find_spec("torch") is None or settings.evaluation_processes == 0:
        raise EvaluationUnavailable()


def hold_weights(checkpoint: Path, artifacts: ArtifactDir, roots: Sequence[Path]) -> str:
    """Return the id of a new evaluation. Its directory has links to the weights, so that no deletion removes them.

    Raises StepUnavailable or StorageError.
    """
    evaluation_id = new_id("eval")
    directory = artifacts.evaluation(evaluation_id)
    try:
        link_checkpoint(checkpoint, directory, roots, NEEDED_FILES)
    except OSError as error:
        release_weights(directory, roots)
        raise StorageError.from_os_error(error) from error
    except BaseException:
        release_weights(directory, roots)
        raise
    return evaluation_id


def release_weights(directory: Path, roots: Sequence[Path]) -> None:
    """Delete the directory of an evaluation, and that of all evaluations if it is empty then."""
    with contextlib.suppress(OSError), directory_inside(directory.parent, roots) as folder:
        shutil.rmtree(folder / directory.name, ignore_errors=True)
    with contextlib.suppress(OSError):
        directory.parent.rmdir()


def create(
    session: Session, job_id: str, evaluation_id: str, step: int, tasks: Sequence[TaskSpec], by: str, now: datetime
) -> None:
    """Insert the rows of an evaluation. Raises JobNotFound or TooManyEvaluations."""
    job = repository.lock(session, job_id)
    opened = select(func.count(EvaluationRow.evaluation_id.distinct())).where(
        EvaluationRow.state.in_((PENDING, RUNNING))
    )
    if (session.scalar(opened) or 0) >= MAX_OPEN:
        raise TooManyEvaluations()
    for task in tasks:
        row = EvaluationRow(
            job_id=job.id,
            evaluation_id=evaluation_id,
            step=step,
            task=task.name,
            kind=task.kind,
            path=task.path,
            state=PENDING,
            stitched=True,
            requested_by=by,
            created_at=now,
        )
        session.add(row)
    names = ", ".join(task.name for task in tasks)
    message = f"asked to evaluate the checkpoint of step {step:,} on {names}"
    data = {"step": step, "evaluation_id": evaluation_id, "tasks": [task.name for task in tasks]}
    repository.record_event(session, job, EventDraft("evaluation", message, by, data=data), now)
