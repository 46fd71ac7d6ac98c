"""Deliveries of events to webhooks, written in the event's own transaction, so that every committed event is sent.

A cursor over the events table would lose some on Postgres: a transaction that commits late may have a lower number than
one that was read before.
"""

import json
from collections.abc import Mapping
from datetime import datetime
from typing import Any, Literal

from sqlalchemy import or_, select
from sqlalchemy.orm import Session

from trainyard.contract.messages import FailureCard
from trainyard.contract.status import Desired, JobStatus
from trainyard.service.db.models import DeliveryRow, EventRow, JobRow, WebhookRow
from trainyard.service.jobs.failures import failure_card
from trainyard.service.jobs.presenters import columns, to_event_response
from trainyard.service.jobs.queries import newest_step
from trainyard.service.schemas import Event, Progress, ResponseModel

ALL = "*"
PENDING, DELIVERED, FAILED = "pending", "delivered", "failed"
TYPES = {"created": "job.created", "checkpoint": "job.checkpoint", "warning": "job.warning"}


class JobPayload(ResponseModel):
    """A job as it was after the event, with the API's field names."""

    object: Literal["job"] = "job"
    id: str
    name: str
    labels: dict[str, str]
    status: JobStatus
    desired: Desired
    reason: str | None
    message: str | None
    error: FailureCard | None
    progress: Progress
    attempt: int | None
    restart_at: datetime | None
    created_at: datetime
    queued_at: datetime | None
    started_at: datetime | None
    finished_at: datetime | None


class EventPayload(ResponseModel):
    """The event and its job; a test has ``webhook_id`` only."""

    webhook_id: str
    event: Event | None = None
    job: JobPayload | None = None


class Payload(ResponseModel):
    """The body of a delivery. ``id`` is also sent as the header ``webhook-id``, and is the same in every retry."""

    type: str
    id: str
    timestamp: datetime
    data: EventPayload


def enqueue(session: Session, job: JobRow, event: EventRow) -> None:
    """Queue the event for each matching webhook. ``event`` has its number; ``job`` is as it was after the event."""
    kind = f"job.{event.data['to']}" if event.kind == "status" else TYPES.get(event.kind)
    if kind is None:
        return
    any_or_this_job = or_(WebhookRow.job_id.is_(None), WebhookRow.job_id == job.id)
    columns = select(WebhookRow.id, WebhookRow.events, WebhookRow.labels)
    query = columns.where(WebhookRow.enabled.is_(True), any_or_this_job).order_by(WebhookRow.number)
    for webhook_id, events, labels in session.connection().execute(query).all():
        if (kind in events or ALL in events) and matches(labels, job.labels):
            enqueue_one(session, webhook_id, kind, job, event)


def matches(required: Mapping[str, Any], labels: Mapping[str, Any]) -> bool:
    """Return True if a job with ``labels`` has all the required ones."""
    return all(labels.get(key) == value for key, value in required.items())


def enqueue_one(session: Session, webhook_id: str, kind: str, job: JobRow, event: EventRow) -> None:
    """Queue one event for one webhook."""
    # The body is rendered now, because the job may change before it is sent.
    data = EventPayload(webhook_id=webhook_id, event=to_event_response(event), job=_job_payload(session, job))
    # The job is part of the id: SQLite reuses numbers of deleted events, and receivers ignore an id that they know.
    event_id = f"evt_{event.number}_{job.id.removeprefix('job_')}"
    payload = Payload(type=kind, id=event_id, timestamp=event.at, data=data)
    session.add(delivery_row(webhook_id, payload, job.id, job.id, event.at))


def delivery_row(webhook_id: str, payload: Payload, job_id: str | None, lane: str, at: datetime) -> DeliveryRow:
    """Return a pending delivery of ``payload``. ``lane``: deliveries of one lane are sent in order, one at a time."""
    # ASCII only: safe for every receiver's decoder and every database's encoding.
    body = json.dumps(payload.model_dump(mode="json"), separators=(",", ":"), allow_nan=False)
    return DeliveryRow(
        webhook_id=webhook_id,
        event_id=payload.id,
        kind=payload.type,
        job_id=job_id,
        lane=lane,
        body=body,
        state=PENDING,
        tries=[],
        next_at=at,
        created_at=at,
    )


def _job_payload(session: Session, job: JobRow) -> JobPayload:
    return JobPayload(
        **columns(job, JobPayload, "error", "progress", "attempt"),
        error=failure_card(job, newest_step(session, job.id)) if job.error else None,
        progress=Progress.model_validate(job.progress),
        attempt=job.attempt or None,
    )
