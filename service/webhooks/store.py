"""Webhooks and their deliveries in the database, as users see and change them."""

from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import delete, func, select
from sqlalchemy.orm import Session

from trainyard.contract.parsing import Problem
from trainyard.service.db.models import (
    DeliveryRow,
    JobRow,
    RuleStateRow,
    WebhookRow,
)
from trainyard.service.errors import (
    DeliveryNotFound,
    RequestInvalid,
    TooManyWebhooks,
    WebhookNotFound,
    with_problems,
)
from trainyard.service.ids import new_id
from trainyard.service.jobs.event_outbox import (
    PENDING,
    EventPayload,
    Payload,
    delivery_row,
)
from trainyard.service.webhooks import signing
from trainyard.service.webhooks.requests import TEST, WebhookCreate

MAX_WEBHOOKS = 1000
"""Every event looks at all of them."""

SECRET_OVERLAP = timedelta(hours=24)
"""So long an old secret signs beside the new one."""


def find(session: Session, webhook_id: str, lock: bool = False) -> WebhookRow:
    """The webhook; ``lock``: for changing it. Raises WebhookNotFound, also for what cannot be an id."""
    query = select(WebhookRow).where(WebhookRow.id == webhook_id)
    usable = webhook_id.isascii() and webhook_id.isprintable()
    row = session.scalar(query.with_for_update(key_share=True) if lock else query) if usable else None
    if row is None:
        raise WebhookNotFound()
    return row


def create(session: Session, asked: WebhookCreate, now: datetime) -> WebhookRow:
    """A new one, with a secret. Raises TooManyWebhooks, and RequestInvalid for a job that is not there."""
    if (session.scalar(select(func.count()).select_from(WebhookRow)) or 0) >= MAX_WEBHOOKS:
        raise TooManyWebhooks()
    if asked.job_id is not None and session.scalar(select(JobRow.id).where(JobRow.id == asked.job_id)) is None:
        raise with_problems(RequestInvalid, [Problem("/job_id", "no job has this id")])
    row = WebhookRow(
        id=new_id("wh"), secret=signing.new_secret(), rules_since=now, created_at=now, updated_at=now, **_fields(asked)
    )
    session.add(row)
    session.flush()
    return row


def change(session: Session, row: WebhookRow, asked: WebhookCreate, now: datetime) -> None:
    """Make it what was asked for. One that is switched on again begins anew."""
    fields = _fields(asked)
    if fields["rules"] != row.rules:
        kept = [rule.key for rule in asked.rules]
        session.execute(delete(RuleStateRow).where(RuleStateRow.webhook_id == row.id, RuleStateRow.rule.not_in(kept)))
        row.rules_since = now
    if asked.enabled and not row.enabled:
        row.failures, row.failing_since, row.retry_at, row.disabled_reason = 0, None, None, None
    for name, value in fields.items():
        setattr(row, name, value)
    row.updated_at = now


def _fields(asked: WebhookCreate) -> dict[str, Any]:
    return asked.model_dump(mode="json")


def request_of(row: WebhookRow) -> dict[str, Any]:
    """What a client would have said to make it what it is."""
    return {name: getattr(row, name) for name in WebhookCreate.model_fields}


def remove(session: Session, webhook_id: str) -> None:
    """The webhook, with what it was still to hear and its log."""
    row = find(session, webhook_id, lock=True)
    session.execute(delete(DeliveryRow).where(DeliveryRow.webhook_id == row.id))
    session.delete(row)


def rotate(row: WebhookRow, now: datetime) -> str:
    """A new secret, returned; the one it had signs as well for a while."""
    row.old_secret, row.old_secret_until = row.secret, now + SECRET_OVERLAP
    row.secret = signing.new_secret()
    row.updated_at = now
    return row.secret


def secrets_of(row: WebhookRow, now: datetime) -> list[str]:
    """Those that sign now, the newest first."""
    old = row.old_secret if row.old_secret_until is not None and row.old_secret_until > now else None
    return [row.secret, *([old] if old else [])]


def page(session: Session, limit: int, after: str | None) -> tuple[Sequence[WebhookRow], bool]:
    """Newest first."""
    query = select(WebhookRow).order_by(WebhookRow.number.desc()).limit(limit + 1)
    if after is not None:
        query = query.where(WebhookRow.number < find(session, after).number)
    rows = session.scalars(query).all()
    return rows[:limit], len(rows) > limit


def deliveries(
    session: Session, webhook_id: str, state: str | None, limit: int, after: int | None
) -> tuple[Sequence[DeliveryRow], bool]:
    """The log, newest first."""
    query = select(DeliveryRow).where(DeliveryRow.webhook_id == find(session, webhook_id).id)
    if state is not None:
        query = query.where(DeliveryRow.state == state)
    if after is not None:
        query = query.where(DeliveryRow.number < after)
    rows = session.scalars(query.order_by(DeliveryRow.number.desc()).limit(limit + 1)).all()
    return rows[:limit], len(rows) > limit


def delivery(session: Session, webhook_id: str, number: int, lock: bool = False) -> DeliveryRow:
    """One of the webhook's deliveries. Raises WebhookNotFound and DeliveryNotFound."""
    query = select(DeliveryRow).where(
        DeliveryRow.webhook_id == find(session, webhook_id).id, DeliveryRow.number == number
    )
    row = session.scalar(query.with_for_update() if lock else query)
    if row is None:
        raise DeliveryNotFound()
    return row


def test(session: Session, webhook_id: str, now: datetime) -> DeliveryRow:
    """A delivery to try the receiver with, also of a webhook that is switched off."""
    row = find(session, webhook_id, lock=True)
    row.retry_at = None
    test_id = new_id("test", 16)
    payload = Payload(type=TEST, id=f"evt_{test_id}", timestamp=now, data=EventPayload(webhook_id=row.id))
    made = delivery_row(row.id, payload, None, test_id, now)  # a lane of its own: it waits for no other
    session.add(made)
    session.flush()
    return made


def redeliver(session: Session, webhook_id: str, number: int, now: datetime) -> DeliveryRow:
    """The delivery once more; one that still waits is due at once."""
    find(session, webhook_id, lock=True).retry_at = None
    row = delivery(session, webhook_id, number, lock=True)
    if row.state == PENDING:
        row.next_at = now
        return row
    again = DeliveryRow(
        webhook_id=row.webhook_id,
        event_id=row.event_id,
        kind=row.kind,
        job_id=row.job_id,
        lane=new_id("again", 16),
        body=row.body,
        state=PENDING,
        tries=[],
        next_at=now,
        redelivers=row.number,
        created_at=now,
    )
    session.add(again)
    session.flush()
    return again
