"""Convert database rows to the API's response models."""

import functools
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sqlalchemy import Row

from trainyard.contract.rundir import ArtifactDir
from trainyard.contract.status import Desired, JobStatus, Phase, Reason
from trainyard.service.auth.principal import LOCAL
from trainyard.service.db.models import AttemptRow, CheckpointRow, EventRow, JobRow, SampleRow
from trainyard.service.jobs import queries
from trainyard.service.jobs.failures import failure_card
from trainyard.service.jobs.lifecycle import ACTIONS, JobState, Rejected, decide, resume_blocker
from trainyard.service.jobs.queries import JobRows
from trainyard.service.jobs.summary import SummaryInput, summary
from trainyard.service.schemas import (
    Alert,
    AllowedAction,
    Attempt,
    Checkpoint,
    CorpusProgress,
    Event,
    Job,
    JobSummary,
    LimitsLeft,
    Parent,
    Placement,
    Plan,
    Progress,
    Queue,
    ResponseModel,
    Sample,
    Score,
)

NEXT_ROUND = "the next scheduling round"


def to_job_responses(rows: JobRows, waiting: Mapping[str, str]) -> list[Job]:
    """Return the jobs as the API shows them. ``waiting``: job id -> what a queued job waits for.

    Reads the disk, because a checkpoint is shown only while it exists.
    """
    return [_complete(row, job) for row, job in zip(rows.jobs, to_job_summaries(rows, waiting), strict=True)]


def to_job_summaries(rows: JobRows, waiting: Mapping[str, str]) -> list[JobSummary]:
    """Return the jobs as `to_job_responses` does, without spec, plan and allowed actions."""
    now = datetime.now(UTC)
    return [_to_job_summary(row, rows, waiting, now) for row in rows.jobs]


def _complete(row: JobRow, job: JobSummary) -> Job:
    state = replace(queries.job_state(row), has_checkpoint=job.checkpoint is not None)
    # The summary is validated already, and a second validation would take as long as the first.
    return Job.model_construct(
        **vars(job),
        spec=row.spec,
        plan=_plan(row.facts),
        allowed_actions=_actions(state),
        weights_path=weights_path(row, job.checkpoint),
    )


def weights_path(row: JobRow, checkpoint: Checkpoint | CheckpointRow | None) -> str | None:
    """Return the path of the weights file of the job's newest checkpoint, or None if there is no such file."""
    if checkpoint is None:
        return None
    # From the checkpoint's path: after a resume with another save_dir, the files are moved only at the start.
    artifacts = ArtifactDir(Path(checkpoint.path).parent.parent)
    model = row.spec["model"]
    file = artifacts.weights(row.spec["checkpoint"]["save_weight"], model["hidden_size"], model["use_moe"])
    return str(file) if file.is_file() else None


def _to_job_summary(job: JobRow, rows: JobRows, waiting: Mapping[str, str], now: datetime) -> JobSummary:
    state = queries.job_state(job)
    blocker = resume_blocker(state)
    newest = newest_on_disk(rows.checkpoints.get(job.id, ()))
    queue = None
    if job.status == JobStatus.QUEUED:
        queue = Queue(position=rows.positions.get(job.id, 1), waiting_for=waiting.get(job.id, NEXT_ROUND))
    placement = rows.placements.get(job.id)
    if job.status == JobStatus.STARTING and placement is not None and placement["waiting_for"] is not None:
        queue = Queue(position=None, waiting_for=placement["waiting_for"])
    checkpoint = to_checkpoint_response(newest) if newest is not None else None
    progress, limits_left = Progress.model_validate(job.progress), _limits_left(job)
    if limits_left is not None and limits_left.seconds is not None and progress.eta_seconds is not None:
        progress = progress.model_copy(update={"eta_seconds": min(progress.eta_seconds, limits_left.seconds)})
    return JobSummary(
        id=job.id,
        name=job.name,
        labels=job.labels,
        description=job.description,
        group=job.group_name,
        discarded=job.discarded,
        score=_score(job),
        status=state.status,
        desired=state.desired,
        phase=job.phase,
        corpus_id=job.corpus_id,
        preparation=_preparation(job),
        reason=job.reason,
        message=job.message,
        error=failure_card(job, newest.step if newest is not None else None),
        progress=progress,
        limits_left=limits_left,
        attempt=job.attempt or None,
        resumable=blocker is None,
        resume_blocker=blocker,
        checkpoint=checkpoint,
        queue=queue,
        placement=Placement.model_validate(placement) if placement is not None else None,
        parent=_parent(job),
        owner=job.submitted_by or LOCAL.name,
        submitted_by=job.submitted_by,
        summary=summary(_summary_input(job, progress, checkpoint, queue), now),
        alerts=[Alert.model_validate(alert) for alert in job.alerts],
        restart_at=job.restart_at,
        created_at=job.created_at,
        queued_at=job.queued_at,
        started_at=job.started_at,
        finished_at=job.finished_at,
    )


def _preparation(job: JobRow) -> CorpusProgress | None:
    if job.status != JobStatus.PREPARING:
        return None
    detail = job.phase_detail or {}
    done, total = detail.get("done"), detail.get("total")
    return CorpusProgress(
        done_bytes=done,
        total_bytes=total,
        percent=100 * done / total if done is not None and total else None,
        bytes_per_second=detail.get("bytes_per_second"),
        eta_seconds=detail.get("eta_seconds"),
    )


def _plan(facts: Mapping[str, Any]) -> Plan:
    plan = Plan.model_validate(facts)
    if plan.flops is not None or None in (plan.flops_per_token, plan.tokens_per_step, plan.steps):
        return plan
    tokens = (plan.tokens_per_step or 0) * ((plan.steps or 0) - plan.base_step)
    return plan.model_copy(update={"flops": tokens * (plan.flops_per_token or 0)})


def _score(job: JobRow) -> Score | None:
    if job.score is None:
        return None
    return Score.model_validate({"metric": job.score_metric, "value": job.score, "step": job.score_step})


def _limits_left(job: JobRow) -> LimitsLeft | None:
    minutes = job.spec.get("limits", {}).get("max_minutes")  # specs of 0.1 have no limits
    tokens = job.spec["training"].get("max_tokens")
    if minutes is None and tokens is None:
        return None
    base = job.facts.get("base_tokens") or 0
    trained = max(0, (job.progress.get("tokens") or 0) - base)
    return LimitsLeft(
        seconds=max(0.0, 60 * minutes - queries.train_seconds(job)) if minutes is not None else None,
        tokens=max(0, tokens - trained) if tokens is not None else None,
    )


def _parent(job: JobRow) -> Parent | None:
    if job.parent_job_id is None:
        return None
    return Parent(job_id=job.parent_job_id, step=job.parent_step, data=(job.lineage or {}).get("data"))


@functools.lru_cache(maxsize=1024)
def _actions(state: JobState) -> list[AllowedAction]:
    # The cached list is shared by all jobs in this state: do not modify it.
    actions = []
    for action in ACTIONS:
        decision = decide(action, state)
        why_not = decision.reason if isinstance(decision, Rejected) else None
        actions.append(AllowedAction(action=action, allowed=why_not is None, why_not=why_not))
    return actions


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


def newest_on_disk(checkpoints: Sequence[CheckpointRow]) -> CheckpointRow | None:
    """Return the first of the checkpoints, which are newest first, that is still on disk; None if there is none."""
    return next((row for row in checkpoints if exists_on_disk(row)), None)


def exists_on_disk(row: CheckpointRow | Row[Any]) -> bool:
    """Return True if the checkpoint is still on disk."""
    return os.path.exists(row.path)


def to_checkpoint_response(row: CheckpointRow | Row[Any]) -> Checkpoint:
    """Return a checkpoint row as the API shows it."""
    return Checkpoint(id=str(row.number), **columns(row, Checkpoint, "id"))


def to_event_response(row: EventRow | Row[Any]) -> Event:
    """Return an event row as the API shows it."""
    return Event(id=str(row.number), **columns(row, Event, "id"))


def to_attempt_response(row: AttemptRow) -> Attempt:
    """Return an attempt row as the API shows it, without its token's hash."""
    return Attempt.model_validate({**vars(row), "ranks": row.ranks or []})


def to_sample_response(row: SampleRow | Row[Any]) -> Sample:
    """Return a sample row as the API shows it."""
    return Sample(id=str(row.number), **columns(row, Sample, "id"))


def columns(row: object, model: type[ResponseModel], *computed: str) -> dict[str, Any]:
    """Return the model's fields that are columns of the row: all but ``computed``."""
    return {name: getattr(row, name) for name in model.model_fields if name not in ("object", *computed)}
