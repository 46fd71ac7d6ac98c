"""Rows as the shapes of the API."""

import functools
import os
from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import Row

from trainyard.contract.status import (
    Desired,
    JobStatus,
    Phase,
    Reason,
)
from trainyard.service.db.models import (
    AttemptRow,
    CheckpointRow,
    EventRow,
    JobRow,
    SampleRow,
)
from trainyard.service.jobs import queries
from trainyard.service.jobs.failures import failure_card
from trainyard.service.jobs.lifecycle import (
    ACTIONS,
    JobState,
    Rejected,
    decide,
    resume_blocker,
)
from trainyard.service.jobs.queries import JobRows
from trainyard.service.jobs.summary import SummaryInput, summary
from trainyard.service.schemas import (
    Alert,
    AllowedAction,
    Attempt,
    Checkpoint,
    Event,
    Job,
    Parent,
    Placement,
    Plan,
    Progress,
    Queue,
    Sample,
)

NEXT_ROUND = "the scheduler's next look"


def to_job_responses(found: JobRows, waiting: Mapping[str, str]) -> list[Job]:
    """The jobs as the API shows them. Looks at the disk: a checkpoint is shown only while it is there."""
    now = datetime.now(UTC)
    return [_to_job_response(job, found, waiting, now) for job in found.jobs]


def _to_job_response(job: JobRow, found: JobRows, waiting: Mapping[str, str], now: datetime) -> Job:
    standing = queries.job_state(job)
    blocker = resume_blocker(standing)
    newest = next((row for row in found.checkpoints.get(job.id, ()) if exists_on_disk(row)), None)
    queue = None
    if job.status == JobStatus.QUEUED:
        queue = Queue(position=found.positions.get(job.id, 1), waiting_for=waiting.get(job.id, NEXT_ROUND))
    placement = found.placements.get(job.id)
    if job.status == JobStatus.STARTING and placement is not None and placement["waiting_for"] is not None:
        queue = Queue(position=None, waiting_for=placement["waiting_for"])
    checkpoint = to_checkpoint_response(newest) if newest is not None else None
    progress = Progress.model_validate(job.progress)
    return Job(
        id=job.id,
        name=job.name,
        labels=job.labels,
        status=standing.status,
        desired=standing.desired,
        phase=job.phase,
        reason=job.reason,
        message=job.message,
        error=failure_card(job, newest.step if newest is not None else None),
        spec=job.spec,
        plan=_plan(job.facts),
        progress=progress,
        attempt=job.attempt or None,
        resumable=blocker is None,
        resume_blocker=blocker,
        checkpoint=checkpoint,
        queue=queue,
        placement=Placement.model_validate(placement) if placement is not None else None,
        parent=_parent(job),
        submitted_by=job.submitted_by,
        allowed_actions=_actions(replace(standing, has_checkpoint=newest is not None)),
        summary=summary(_summary_input(job, progress, checkpoint, queue), now),
        alerts=[Alert.model_validate(alert) for alert in job.alerts],
        restart_at=job.restart_at,
        created_at=job.created_at,
        queued_at=job.queued_at,
        started_at=job.started_at,
        finished_at=job.finished_at,
    )


def _plan(facts: Mapping[str, Any]) -> Plan:
    """The plan as far as it is known, and the work that the job's own steps come to."""
    plan = Plan.model_validate(facts)
    if plan.flops is not None or None in (plan.flops_per_token, plan.tokens_per_step, plan.steps):
        return plan
    tokens = (plan.tokens_per_step or 0) * ((plan.steps or 0) - plan.base_step)
    return plan.model_copy(update={"flops": tokens * (plan.flops_per_token or 0)})


def _parent(job: JobRow) -> Parent | None:
    if job.parent_job_id is None:
        return None
    return Parent(job_id=job.parent_job_id, step=job.parent_step, data=(job.lineage or {}).get("data"))


@functools.lru_cache(maxsize=1024)
def _actions(standing: JobState) -> list[AllowedAction]:
    """Shared by all jobs that stand like this: nobody changes it."""
    shown = []
    for action in ACTIONS:
        decision = decide(action, standing)
        why_not = decision.reason if isinstance(decision, Rejected) else None
        shown.append(AllowedAction(action=action, allowed=why_not is None, why_not=why_not))
    return shown


def _summary_input(job: JobRow, progress: Progress, checkpoint: Checkpoint | None, queue: Queue | None) -> SummaryInput:
    return SummaryInput(
        status=JobStatus(job.status),
        desired=Desired(job.desired),
        attempt=job.attempt,
        message=job.message,
        hint=(job.error or {}).get("hint"),
        phase=Phase(job.phase) if job.phase else None,
        phase_detail=job.phase_detail or {},
        progress=progress,
        checkpoint=checkpoint,
        queue=queue,
        heard_at=job.heard_at,
        reason=Reason(job.reason) if job.reason else None,
        parent_step=job.parent_step,
    )


def exists_on_disk(row: CheckpointRow | Row[Any]) -> bool:
    """Whether the checkpoint is still on disk."""
    return os.path.exists(row.path)


def to_checkpoint_response(row: CheckpointRow | Row[Any]) -> Checkpoint:
    """A checkpoint row as the API shows it."""
    return Checkpoint(
        id=str(row.number),
        job_id=row.job_id,
        attempt=row.attempt,
        step=row.step,
        path=row.path,
        bytes=row.bytes,
        sha256=row.sha256,
        kind=row.kind,
        loss=row.loss,
        created_at=row.created_at,
    )


def to_event_response(row: EventRow | Row[Any]) -> Event:
    """An event row as the API shows it."""
    return Event(
        id=str(row.number),
        job_id=row.job_id,
        attempt=row.attempt,
        kind=row.kind,
        actor=row.actor,
        message=row.message,
        data=row.data,
        at=row.at,
    )


def to_attempt_response(row: AttemptRow) -> Attempt:
    """An attempt row as the API shows it; its token's hash stays here."""
    return Attempt.model_validate({**vars(row), "ranks": row.ranks or []})


def to_sample_response(row: SampleRow | Row[Any]) -> Sample:
    """A sample row as the API shows it."""
    return Sample(
        id=str(row.number),
        job_id=row.job_id,
        attempt=row.attempt,
        step=row.step,
        prompt=row.prompt,
        text=row.text,
        at=row.at,
    )
