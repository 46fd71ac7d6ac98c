"""From an event to deliveries, in the event's own transaction: what is committed is sent, at least once.

A cursor over the events would lose some on Postgres, where numbers are given before they are seen: a transaction that
commits late has a lower number than one that was already read past.
"""

import json
from collections.abc import Mapping
from datetime import datetime
from typing import Any

from sqlalchemy import func, or_, select
from sqlalchemy.orm import Session

from service.jobs.failing import failure
from service.jobs.views import show_event
from service.shapes import Progress
from service.tables import CheckpointRow, DeliveryRow, EventRow, JobRow, WebhookRow
from service.webhooks.asked import ALL, TEST
from service.webhooks.shapes import JobNews, News, Payload

PENDING, DELIVERED, FAILED = "pending", "delivered", "failed"
TYPES = {"created": "job.created", "checkpoint": "job.checkpoint", "warning": "job.warning"}


def post(session: Session, job: JobRow, event: EventRow) -> None:
    """Put the event into the box of every webhook that wants it. ``event`` has its number, ``job`` is as it left it."""
    kind = _type_of(event)
    if kind is None:
        return
    about = or_(WebhookRow.job_id.is_(None), WebhookRow.job_id == job.id)
    columns = select(WebhookRow.id, WebhookRow.events, WebhookRow.labels)
    query = columns.where(WebhookRow.enabled.is_(True), about).order_by(WebhookRow.number)
    for webhook_id, events, labels in session.connection().execute(query).all():
        if (kind in events or ALL in events) and fits(labels, job.labels):
            put(session, webhook_id, kind, job, event)


def _type_of(event: EventRow) -> str | None:
    return f"job.{event.data['to']}" if event.kind == "status" else TYPES.get(event.kind)


def fits(wanted: Mapping[str, Any], labels: Mapping[str, Any]) -> bool:
    """Whether a job has all the labels that are asked for."""
    return all(labels.get(key) == value for key, value in wanted.items())


def put(session: Session, webhook_id: str, kind: str, job: JobRow, event: EventRow) -> None:
    """One event into one box. The body is made now: later the job is another one."""
    news = News(webhook_id=webhook_id, event=show_event(event), job=_job(session, job))
    payload = Payload(type=kind, id=f"evt_{event.number}", timestamp=event.at, data=news)
    session.add(_row(webhook_id, payload, job.id, job.id, event.at))


def put_test(session: Session, webhook_id: str, test_id: str, now: datetime) -> DeliveryRow:
    """Something to try the receiver with. It waits for nobody: a lane of its own."""
    payload = Payload(type=TEST, id=f"evt_{test_id}", timestamp=now, data=News(webhook_id=webhook_id))
    row = _row(webhook_id, payload, None, test_id, now)
    session.add(row)
    session.flush()
    return row


def put_again(session: Session, earlier: DeliveryRow, lane: str, now: datetime) -> DeliveryRow:
    """The same once more, to the byte and under the same event id."""
    row = DeliveryRow(
        webhook_id=earlier.webhook_id,
        event_id=earlier.event_id,
        kind=earlier.kind,
        job_id=earlier.job_id,
        lane=lane,
        body=earlier.body,
        state=PENDING,
        tries=[],
        next_at=now,
        redelivers=earlier.number,
        created_at=now,
    )
    session.add(row)
    session.flush()
    return row


def _row(webhook_id: str, payload: Payload, job_id: str | None, lane: str, at: datetime) -> DeliveryRow:
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


def _newest(session: Session, job: JobRow) -> int | None:
    """Step of the newest full checkpoint, as far as it was reported: nobody looks at the disk in a transaction."""
    full = (CheckpointRow.job_id == job.id, CheckpointRow.kind == "full")
    return session.scalar(select(func.max(CheckpointRow.step)).where(*full))


def _job(session: Session, job: JobRow) -> JobNews:
    return JobNews(
        id=job.id,
        name=job.name,
        labels=job.labels,
        status=job.status,
        desired=job.desired,
        reason=job.reason,
        message=job.message,
        error=failure(job, _newest(session, job)) if job.error else None,
        progress=Progress.model_validate(job.progress),
        attempt=job.attempt or None,
        restart_at=job.restart_at,
        created_at=job.created_at,
        queued_at=job.queued_at,
        started_at=job.started_at,
        finished_at=job.finished_at,
    )
