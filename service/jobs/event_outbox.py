"""The deliveries of an event to webhooks, written in the event's own transaction: what is committed is sent.

A cursor over the events would lose some on Postgres: a transaction that commits late has a lower number than one that
was read already.
"""

import json
from collections.abc import Mapping
from datetime import datetime
from typing import Any, Literal

from sqlalchemy import or_, select
from sqlalchemy.orm import Session

from trainyard.contract.messages import FailureCard
from trainyard.contract.status import Desired, JobStatus
from trainyard.service.db.models import (
    DeliveryRow,
    EventRow,
    JobRow,
    WebhookRow,
)
from trainyard.service.jobs.failures import failure_card
from trainyard.service.jobs.presenters import to_event_response
from trainyard.service.jobs.queries import newest_step
from trainyard.service.schemas import Event, Progress, ResponseModel

ALL = "*"
PENDING, DELIVERED, FAILED = "pending", "delivered", "failed"
TYPES = {"created": "job.created", "checkpoint": "job.checkpoint", "warning": "job.warning"}


class JobPayload(ResponseModel):
    """A job in a payload: as it was when the event happened, with the API's field names."""

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
    """What happened, and to which job; ``webhook_id`` alone in a test."""

    webhook_id: str
    event: Event | None = None
    job: JobPayload | None = None


class Payload(ResponseModel):
    """The body of a delivery. ``id`` is also in the header ``webhook-id``, and the same in every try."""

    type: str
    id: str
    timestamp: datetime
    data: EventPayload


def enqueue(session: Session, job: JobRow, event: EventRow) -> None:
    """Queue the event for each webhook that wants it. ``event`` has its number, ``job`` is as it left it."""
    kind = _type_of(event)
    if kind is None:
        return
    about = or_(WebhookRow.job_id.is_(None), WebhookRow.job_id == job.id)
    columns = select(WebhookRow.id, WebhookRow.events, WebhookRow.labels)
    query = columns.where(WebhookRow.enabled.is_(True), about).order_by(WebhookRow.number)
    for webhook_id, events, labels in session.connection().execute(query).all():
        if (kind in events or ALL in events) and matches(labels, job.labels):
            enqueue_one(session, webhook_id, kind, job, event)


def _type_of(event: EventRow) -> str | None:
    return f"job.{event.data['to']}" if event.kind == "status" else TYPES.get(event.kind)


def matches(wanted: Mapping[str, Any], labels: Mapping[str, Any]) -> bool:
    """True if a job has all the wanted labels."""
    return all(labels.get(key) == value for key, value in wanted.items())


def enqueue_one(session: Session, webhook_id: str, kind: str, job: JobRow, event: EventRow) -> None:
    """Queue one event for one webhook. The body is made now: the job may change later."""
    news = EventPayload(webhook_id=webhook_id, event=to_event_response(event), job=_job_payload(session, job))
    payload = Payload(type=kind, id=f"evt_{event.number}", timestamp=event.at, data=news)
    session.add(delivery_row(webhook_id, payload, job.id, job.id, event.at))


def delivery_row(webhook_id: str, payload: Payload, job_id: str | None, lane: str, at: datetime) -> DeliveryRow:
    """A pending delivery of ``payload``."""
    # ASCII alone: no receiver stumbles over an encoding, and no database over a character.
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
        id=job.id,
        name=job.name,
        labels=job.labels,
        status=job.status,
        desired=job.desired,
        reason=job.reason,
        message=job.message,
        error=failure_card(job, newest_step(session, job.id)) if job.error else None,
        progress=Progress.model_validate(job.progress),
        attempt=job.attempt or None,
        restart_at=job.restart_at,
        created_at=job.created_at,
        queued_at=job.queued_at,
        started_at=job.started_at,
        finished_at=job.finished_at,
    )
