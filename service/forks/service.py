"""Creates a fork: first its run directory under an unused job id, then its record in one transaction."""

import json
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from trainyard.contract.lr_schedule import LRSchedule
from trainyard.contract.messages import Fork
from trainyard.contract.rundir import RunDir, write_json
from trainyard.contract.spec import JobSpec
from trainyard.service.auth.principal import Principal
from trainyard.service.db.models import CheckpointRow, JobRow, MetricRow
from trainyard.service.errors import StepUnavailable
from trainyard.service.forks.request import ForkOrigin, ForkRequest
from trainyard.service.jobs import repository
from trainyard.service.jobs.repository import EventDraft
from trainyard.service.jobs.submission import HostLimits, initial_plan, kind_of
from trainyard.service.metrics import lineage
from trainyard.service.metrics.progress import percent_done
from trainyard.service.settings import Settings
from trainyard.service.storage.checkpoint_files import checkpoint_directory
from trainyard.service.storage.share import link_checkpoint

WEIGHTS_ONLY = 'Of this step only the weights are kept, so data "keep" is not possible; data "restart" is.'


@dataclass(frozen=True)
class ForkParent:
    """The job and the checkpoint to fork."""

    job: JobRow
    checkpoint: Path
    step: int
    attempt: int
    origin: ForkOrigin


def find_parent(session: Session, runs: Path, job_id: str, request: ForkRequest) -> ForkParent:
    """Find the parent and its checkpoint. Raises JobNotFound or StepUnavailable."""
    job = repository.find(session, job_id)
    row = _find_checkpoint(session, job, request)
    save_dir = job.spec["checkpoint"]["save_dir"]
    directory = checkpoint_directory(RunDir(runs / job.id), save_dir, row.step, row.path)
    if directory is None:
        raise StepUnavailable()
    rows_per_step = job.facts.get("global_batch") or JobSpec.model_validate_json(json.dumps(job.spec)).rows_per_step
    base_step = int(job.facts.get("base_step") or 0)
    origin = ForkOrigin(
        row.step,
        job.spec,
        rows_per_step,
        base_step,
        job.facts.get("steps_per_epoch"),
        job.facts.get("tokens_per_step"),
        _tokens_until(session, job, row.step),
    )
    return ForkParent(job, directory, row.step, row.attempt, origin)


def _tokens_until(session: Session, job: JobRow, step: int) -> int:
    """Return the tokens that the job's own schedule had trained at the last metric line up to ``step``."""
    points = (MetricRow.job_id == job.id, MetricRow.stitched.is_(True), MetricRow.step <= step)
    newest = session.scalar(select(MetricRow.tokens).where(*points).order_by(MetricRow.step.desc()).limit(1))
    return max(0, (newest or 0) - int(job.facts.get("base_tokens") or 0))


def _find_checkpoint(session: Session, job: JobRow, request: ForkRequest) -> CheckpointRow:
    query = select(CheckpointRow).where(CheckpointRow.job_id == job.id)
    if request.step is None:
        query = query.where(CheckpointRow.kind == "full")
    else:
        query = query.where(CheckpointRow.step == request.step)
    # A step may have both kinds: "full" sorts first.
    row = session.scalar(query.order_by(CheckpointRow.step.desc(), CheckpointRow.kind).limit(1))
    if row is None:
        which = "full checkpoint yet" if request.step is None else f"checkpoint of step {request.step:,}"
        raise StepUnavailable(f"The job has no {which}.")
    if row.kind != "full" and request.data == "keep":
        raise StepUnavailable(WEIGHTS_ONLY)
    return row


def prepare_run_dir(settings: Settings, fork_id: str, spec: JobSpec, request: ForkRequest, parent: ForkParent) -> None:
    """Create the fork's run directory for its first attempt. Raises StepUnavailable, and OSError on a full disk."""
    run = RunDir(settings.runs / fork_id)
    run.path.mkdir(parents=True)
    origin = run.artifacts(spec.checkpoint.save_dir).origin
    link_checkpoint(parent.checkpoint, origin, settings.writable_roots)
    write_json(run.fork, Fork(job_id=parent.job.id, step=parent.step, data=request.data).model_dump(mode="json"))


def insert(
    session: Session,
    fork_id: str,
    spec: JobSpec,
    request: ForkRequest,
    parent: ForkParent,
    host: HostLimits,
    caller: Principal,
    now: datetime,
) -> JobRow:
    """Insert the fork, and an event of both jobs. Raises JobNotFound if the parent was deleted meanwhile."""
    job = repository.lock(session, parent.job.id)
    plan = fork_plan(spec, request, parent, kind_of(spec, host))
    effect = "its data order kept" if request.data == "keep" else "with data and schedule from scratch"
    data = {"step": parent.step, "data": request.data}
    message = f"forked from {job.id} at step {parent.step:,}, {effect}"
    event = EventDraft("", message, data={"parent": job.id, **data})
    fork = repository.create(session, spec, plan, [], caller, now, fork_id, event)
    fork.parent_job_id, fork.parent_step = job.id, parent.step
    fork.lineage = lineage.record(session, job, parent.step, parent.attempt, request.data)
    fork.progress = percent_done(parent.step, fork.facts["steps"])
    message = f"forked at step {parent.step:,} as {fork.id}"
    event = EventDraft("forked", message, caller.name, data={"fork": fork.id, **data})
    repository.record_event(session, job, event, now)
    session.flush()
    return fork


def fork_plan(spec: JobSpec, request: ForkRequest, parent: ForkParent, kind: str) -> dict[str, Any]:
    """Return the fork's plan before its first attempt. Its steps count the whole curve, with the ancestors' part."""
    plan = initial_plan(spec, kind)
    restart = request.data == "restart"
    base = parent.step if restart else parent.origin.base_step
    per_epoch, per_step = (None, None) if restart else (parent.origin.steps_per_epoch, parent.origin.tokens_per_step)
    own = spec.training.run_steps(per_epoch, per_step)
    batch = spec.rows_per_step if restart else parent.origin.rows_per_step
    steps = base + own if own else None
    rates = {} if restart or steps is None else _rates(spec, parent, base, steps)
    return {**plan, "base_step": base, "steps": steps, "global_batch": batch, **rates}


def _rates(spec: JobSpec, parent: ForkParent, base: int, steps: int) -> dict[str, float]:
    """Return the learning rates of the parent's checkpoint and of the fork's first step, as a resume does."""
    before = JobSpec.model_validate_json(json.dumps(parent.job.spec)).training
    end = parent.job.facts.get("steps")
    if end is None or parent.step <= base:
        return {}
    return {
        "learning_rate_before": LRSchedule.from_spec(before, end, base).at(parent.step),
        "learning_rate_after": LRSchedule.from_spec(spec.training, steps, base).at(min(parent.step + 1, steps)),
    }
