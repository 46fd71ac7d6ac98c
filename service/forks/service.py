"""Makes a fork: the parent's files first, under a name that nobody knows yet, then the record in one transaction."""

import json
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from trainyard.contract.messages import Fork
from trainyard.contract.rundir import RunDir, write_json
from trainyard.contract.spec import JobSpec
from trainyard.service.auth.principal import Principal
from trainyard.service.db.models import CheckpointRow, JobRow
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

WEIGHTS_ONLY = 'Of this step only the weights are kept: no run can be kept from it, data "restart" begins with them.'


@dataclass(frozen=True)
class ForkParent:
    """What is forked, as it was read."""

    job: JobRow
    checkpoint: Path
    step: int
    attempt: int
    origin: ForkOrigin


def find_parent(session: Session, runs: Path, job_id: str, asked: ForkRequest) -> ForkParent:
    """The parent and its checkpoint. Raises JobNotFound or StepUnavailable."""
    job = repository.find(session, job_id)
    row = _checkpoint(session, job, asked)
    place = checkpoint_directory(
        RunDir(runs / job.id).artifacts(job.spec["checkpoint"]["save_dir"]), row.step, row.path
    )
    if place is None:
        raise StepUnavailable()
    rows = job.facts.get("global_batch") or JobSpec.model_validate_json(json.dumps(job.spec)).rows_per_step
    per_epoch = job.facts.get("steps_per_epoch")
    origin = ForkOrigin(row.step, job.spec, rows, base_step(job), per_epoch)
    return ForkParent(job, place, row.step, row.attempt, origin)


def base_step(job: JobRow) -> int:
    """Steps that lie before the job's own schedule."""
    return int(job.facts.get("base_step") or 0)


def _checkpoint(session: Session, job: JobRow, asked: ForkRequest) -> CheckpointRow:
    """That of the step, the full one where there are both; the newest full one where no step is named."""
    query = select(CheckpointRow).where(CheckpointRow.job_id == job.id)
    if asked.step is None:
        query = query.where(CheckpointRow.kind == "full")
    else:
        query = query.where(CheckpointRow.step == asked.step)
    row = session.scalar(query.order_by(CheckpointRow.step.desc(), CheckpointRow.kind).limit(1))
    if row is None:
        raise StepUnavailable("The job has no checkpoint of this step." if asked.step is not None else None)
    if row.kind != "full" and asked.data == "keep":
        raise StepUnavailable(WEIGHTS_ONLY)
    return row


def prepare_run_dir(settings: Settings, fork_id: str, spec: JobSpec, asked: ForkRequest, parent: ForkParent) -> None:
    """The fork's directory as its first attempt is to find it. Raises StepUnavailable, and OSError on a full disk."""
    run = RunDir(settings.runs / fork_id)
    run.path.mkdir(parents=True)
    link_checkpoint(parent.checkpoint, run.artifacts(spec.checkpoint.save_dir).origin)
    write_json(run.fork, Fork(job_id=parent.job.id, step=parent.step, data=asked.data).model_dump(mode="json"))


def insert(
    session: Session,
    fork_id: str,
    spec: JobSpec,
    asked: ForkRequest,
    parent: ForkParent,
    host: HostLimits,
    by: Principal,
    now: datetime,
) -> JobRow:
    """The record of the fork, and an event on both jobs. Raises JobNotFound where the parent was deleted meanwhile."""
    job = repository.lock(session, parent.job.id)
    kind = kind_of(spec, host)
    message = f"forked from {job.id} at step {parent.step:,}, {_meaning(asked)}"
    said = {"parent": job.id, "step": parent.step, "data": asked.data}
    fork = repository.create(
        session, spec, fork_plan(spec, asked, parent, kind), [], by, now, fork_id, EventDraft("", message, data=said)
    )
    fork.parent_job_id, fork.parent_step = job.id, parent.step
    fork.lineage = lineage.record(session, job, parent.step, parent.attempt, asked.data)
    fork.progress = percent_done(parent.step, fork.facts["steps"])
    told = {"fork": fork.id, "step": parent.step, "data": asked.data}
    repository.record_event(
        session, job, EventDraft("forked", f"forked at step {parent.step:,} as {fork.id}", by.name, data=told), now
    )
    session.flush()
    return fork


def _meaning(asked: ForkRequest) -> str:
    return "its data order kept" if asked.data == "keep" else "with data and schedule that begin anew"


def fork_plan(spec: JobSpec, asked: ForkRequest, parent: ForkParent, kind: str) -> dict[str, Any]:
    """What is known of it before it has run. Length and steps are counted over the whole curve."""
    facts = initial_plan(spec, kind)
    restart = asked.data == "restart"
    base = parent.step if restart else parent.origin.base_step
    per_epoch = None if restart else parent.origin.steps_per_epoch
    own = spec.training.max_steps or (per_epoch and per_epoch * spec.training.epochs)
    batch = spec.rows_per_step if restart else parent.origin.rows_per_step
    return {**facts, "base_step": base, "steps": base + own if own else None, "global_batch": batch}
