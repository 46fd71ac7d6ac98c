"""Which checkpoint a request names: by job and step, or as a model ``<job id or name>@<step or latest>``."""

from collections.abc import Iterator
from pathlib import Path

from sqlalchemy import select
from sqlalchemy.orm import Session

from trainyard.contract.rundir import RunDir
from trainyard.service.db.models import CheckpointRow, EventRow, JobRow
from trainyard.service.errors import CheckpointNotFound, JobNotFound, ModelNotFound
from trainyard.service.jobs import repository
from trainyard.service.schemas import OpenAIModel
from trainyard.service.settings import Settings
from trainyard.service.storage.checkpoint_files import checkpoint_directory

LATEST = "latest"
MAX_STEP_DIGITS = 15
MAX_MODELS = 1000
MAX_LISTED_STEPS = 10


def parse_step(text: str) -> int | None:
    """Return the step, or None for "latest". Raises ValueError."""
    if text == LATEST:
        return None
    if not (text.isascii() and text.isdecimal() and len(text) <= MAX_STEP_DIGITS):
        raise ValueError(text)
    return int(text)


def find_checkpoint(session: Session, settings: Settings, job: JobRow, step: int | None) -> tuple[int, Path]:
    """Return the step and directory of a checkpoint; None: the newest. Raises CheckpointNotFound, with the reason."""
    run, save_dir = RunDir(settings.runs / job.id), job.spec["checkpoint"]["save_dir"]
    # The full checkpoint first, if its weights are also kept as a milestone.
    order = (CheckpointRow.step.desc(), CheckpointRow.kind)
    others: dict[int, None] = {}
    for row in session.scalars(select(CheckpointRow).where(CheckpointRow.job_id == job.id).order_by(*order)):
        path = checkpoint_directory(run, save_dir, row.step, row.path)
        if path is None or not path.is_dir():
            continue
        if step is None or row.step == step:
            return row.step, path
        others[row.step] = None
    raise CheckpointNotFound(_why_not_found(session, job, step, list(others)))


def _why_not_found(session: Session, job: JobRow, step: int | None, others: list[int]) -> str:
    if step is None:
        return "The job has no checkpoint yet."
    removals = select(EventRow).where(EventRow.job_id == job.id, EventRow.kind == "checkpoint_removed")
    newest_first = session.scalars(removals.order_by(EventRow.number.desc()))
    removed = next((event for event in newest_first if event.data.get("step") == step), None)
    what = f"The job has no checkpoint of step {step:,}."
    if removed is not None:
        what = f"The checkpoint of step {step:,} was removed by {removed.actor} ({removed.message})."
    shown = ", ".join(f"{other:,}" for other in others[:MAX_LISTED_STEPS])
    more = ", ..." if len(others) > MAX_LISTED_STEPS else ""
    return f"{what} Those it has: {shown}{more}." if others else what


def find_model(session: Session, settings: Settings, model: str) -> tuple[JobRow, int, Path]:
    """Return job, step and directory of a model. Of several jobs with the name, the newest counts.

    Without a step, the newest checkpoint is meant. Raises ModelNotFound, with the reason.
    """
    name, _, text = model.rpartition("@")
    try:
        step = parse_step(text)
    except ValueError:
        name, step = model, None
    try:
        try:
            job = _find_job(session, name)
        except JobNotFound:
            job, step = _find_job(session, model), None  # a name may have an @ too
        return job, *find_checkpoint(session, settings, job, step)
    except CheckpointNotFound as error:
        raise ModelNotFound(error.detail) from error
    except JobNotFound:
        raise ModelNotFound() from None


def _find_job(session: Session, id_or_name: str) -> JobRow:
    try:
        return repository.find(session, id_or_name)
    except JobNotFound:
        named = select(JobRow).where(JobRow.name == id_or_name).order_by(JobRow.discarded, JobRow.number.desc())
        # Postgres takes no NUL, and no lone surrogate can be sent to a database.
        job = session.scalar(named.limit(1)) if id_or_name.isprintable() else None
        if job is None:
            raise
        return job


def list_models(session: Session, job_id: str | None = None) -> Iterator[OpenAIModel]:
    """Yield the newest checkpoints of a job, or of all that are not discarded; a job's newest also as ``@latest``."""
    which = JobRow.id == job_id if job_id is not None else JobRow.discarded.is_(False)
    rows = session.execute(
        select(CheckpointRow, JobRow)
        .join(JobRow, JobRow.id == CheckpointRow.job_id)
        .where(which)
        .order_by(CheckpointRow.number.desc())
        .limit(MAX_MODELS)
    ).all()
    by_job: dict[str, dict[int, OpenAIModel]] = {}
    for checkpoint, job in rows:
        by_job.setdefault(job.id, {}).setdefault(checkpoint.step, _to_model(checkpoint, job))
    for own_id, models in by_job.items():
        yield models[max(models)].model_copy(update={"id": f"{own_id}@{LATEST}"})
        yield from (models[step] for step in sorted(models, reverse=True))


def _to_model(checkpoint: CheckpointRow, job: JobRow) -> OpenAIModel:
    return OpenAIModel(
        id=f"{job.id}@{checkpoint.step}",
        created=int(checkpoint.created_at.timestamp()),
        owned_by=job.submitted_by or "trainyard",
        name=job.name,
        step=checkpoint.step,
    )
