"""Read, lock and change jobs in the database. Every change of status is one guarded update plus its event row."""

import hashlib
import json
import logging
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any

from sqlalchemy import delete, insert, select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from trainyard.contract.spec import JobSpec
from trainyard.contract.status import Desired, JobStatus, can_transition
from trainyard.service.auth import quotas
from trainyard.service.auth.principal import Principal
from trainyard.service.db.models import EventRow, IdempotencyRow, JobRow, LabelRow
from trainyard.service.errors import Conflict, JobNotFound, KeyReused
from trainyard.service.ids import JOB_ID, new_id
from trainyard.service.jobs import event_outbox

MAX_ALERTS = 20

log = logging.getLogger("trainyard")


class ImpossibleTransition(RuntimeError):
    """A change of status that `can_transition` does not allow: a bug in the caller."""


def find(session: Session, job_id: str) -> JobRow:
    """Return the job. Raises JobNotFound, also for text that is no job id."""
    job = session.scalar(select(JobRow).where(JobRow.id == job_id)) if JOB_ID.fullmatch(job_id) else None
    if job is None:
        raise JobNotFound()
    return job


def lock(session: Session, job_id: str) -> JobRow:
    """Return the job, locked with its attempts until this transaction ends. Raises JobNotFound."""
    if not JOB_ID.fullmatch(job_id):
        raise JobNotFound()
    job = session.scalar(select(JobRow).where(JobRow.id == job_id).with_for_update())
    if job is None:
        raise JobNotFound()
    return job


@dataclass(frozen=True)
class EventDraft:
    """An event to record; ``message`` is one sentence. ``actor``: a caller's name, service, scheduler or agent."""

    kind: str
    message: str
    actor: str = "service"
    attempt: int | None = None
    seq: int | None = None
    data: dict[str, Any] | None = None


def record_event(session: Session, job: JobRow, draft: EventDraft, now: datetime) -> EventRow:
    """Write an event row, and queue its deliveries to webhooks."""
    event = _insert_event(session, job, draft, now)
    event_outbox.enqueue(session, job, event)
    return event


def _insert_event(session: Session, job: JobRow, draft: EventDraft, now: datetime) -> EventRow:
    event = {
        "job_id": job.id,
        "attempt": draft.attempt if draft.attempt is not None else (job.attempt or None),
        "seq": draft.seq,
        "kind": draft.kind,
        "actor": draft.actor,
        "message": draft.message,
        "data": draft.data or {},
        "at": now,
    }
    number = session.connection().execute(insert(EventRow).returning(EventRow.number), event).scalar_one()
    return EventRow(number=number, **event)


def transition(session: Session, job: JobRow, to: JobStatus, draft: EventDraft, now: datetime, **changes: Any) -> None:
    """Change the status and the columns in ``changes``, and record the event.

    Raises:
        ImpossibleTransition: if `can_transition` does not allow it.
        Conflict: if another transaction changed the job since it was read.
    """
    before = JobStatus(job.status)
    if not can_transition(before, to):
        raise ImpossibleTransition(f"{job.id}: {before} -> {to}")
    session.flush()
    guard = (JobRow.id == job.id, JobRow.status == before, JobRow.version == job.version)
    values = {"status": to, "version": job.version + 1, **changes}
    result = session.execute(update(JobRow).where(*guard).values(values).execution_options(synchronize_session=False))
    if getattr(result, "rowcount", 0) != 1:
        raise Conflict()
    data = {"from": before, "to": to, "reason": changes.get("reason"), **(draft.data or {})}
    event = _insert_event(session, job, replace(draft, kind="status", data=data), now)
    session.flush()
    session.refresh(job)
    # After the refresh: the payload shows the job as the event left it.
    event_outbox.enqueue(session, job, event)
    log.info("%s -> %s", before, to, extra={"job_id": job.id, "attempt": job.attempt, "actor": draft.actor})


SUBMITTED = EventDraft("", "submitted")


def create(
    session: Session,
    spec: JobSpec,
    facts: dict[str, Any],
    alerts: list[Any],
    by: Principal,
    now: datetime,
    job_id: str | None = None,
    draft: EventDraft = SUBMITTED,
) -> JobRow:
    """Create a queued job. ``draft``: how it came to be, for its first event. Raises QuotaExceeded."""
    ranks = spec.resources.ranks
    quotas.check_quota(session, by, ranks)
    job = JobRow(
        id=job_id or new_id("job"),
        name=spec.name,
        labels=dict(spec.labels),
        description=spec.description,
        group_name=spec.group,
        status=JobStatus.QUEUED,
        desired=Desired.RUN,
        spec=spec.model_dump(mode="json"),
        facts=facts,
        progress={},
        alerts=alerts,
        device=spec.resources.device,
        ranks=ranks,
        priority=spec.resources.priority,
        created_at=now,
        queued_at=now,
        submitted_by=by.name,
        queued_by=by.name,
    )
    session.add(job)
    session.flush()
    _add_labels(session, job, dict(spec.labels))
    data = {"to": JobStatus.QUEUED, **(draft.data or {})}
    record_event(session, job, EventDraft("created", draft.message, by.name, data=data), now)
    return job


def put_labels(session: Session, job: JobRow, labels: dict[str, str]) -> None:
    """Replace the job's labels."""
    session.connection().execute(delete(LabelRow).where(LabelRow.job_id == job.id))
    _add_labels(session, job, labels)
    job.labels = labels


def _add_labels(session: Session, job: JobRow, labels: dict[str, str]) -> None:
    if labels:
        rows = [{"job_id": job.id, "key": key, "value": value} for key, value in labels.items()]
        session.connection().execute(insert(LabelRow), rows)


def add_alert(job: JobRow, code: str, message: str, now: datetime, step: int | None = None) -> None:
    """Add an alert to the job; it replaces one of the same code."""
    others = [other for other in job.alerts if other.get("code") != code]
    job.alerts = [*others, new_alert(code, message, now, step)][-MAX_ALERTS:]


def new_alert(code: str, message: str, now: datetime, step: int | None = None) -> dict[str, Any]:
    """Return an alert as it is stored."""
    return {"code": code, "message": message, "step": step, "at": now.isoformat().replace("+00:00", "Z")}


def body_digest(raw: object) -> str:
    """Return the sha256 of a JSON value, independent of spacing and of the order of keys."""
    return hashlib.sha256(json.dumps(raw, sort_keys=True).encode()).hexdigest()


def find_by_idempotency_key(
    session: Session, key: str, owner: Principal, digest: str, oldest: datetime
) -> JobRow | None:
    """Return the owner's job made under this key since ``oldest``, or None. Raises KeyReused if the body differs."""
    row = session.get(IdempotencyRow, (key, owner.name))
    if row is None or row.created_at < oldest:
        return None
    if row.body_sha256 != digest:
        raise KeyReused()
    return find(session, row.job_id)


def delete_old_keys(session: Session, oldest: datetime) -> None:
    """Delete the idempotency keys made before ``oldest``; their jobs stay."""
    session.execute(delete(IdempotencyRow).where(IdempotencyRow.created_at < oldest))


def save_key(session: Session, key: str, owner: Principal, digest: str, job: JobRow, now: datetime) -> bool:
    """Store the owner's key with its job; return False if another request of the owner has stored it first."""
    row = IdempotencyRow(key=key, owner=owner.name, body_sha256=digest, job_id=job.id, created_at=now)
    try:
        with session.begin_nested():
            session.add(row)
    except IntegrityError:
        return False
    return True
