"""Read and change webhooks and their deliveries in the database, on behalf of users."""

from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import delete, func, select
from sqlalchemy.orm import Session

from trainyard.contract.parsing import Problem
from trainyard.service.db.models import DeliveryRow, JobRow, RuleStateRow, WebhookRow
from trainyard.service.errors import DeliveryNotFound, RequestInvalid, TooManyWebhooks, WebhookNotFound, with_problems
from trainyard.service.ids import new_id
from trainyard.service.jobs.event_outbox import PENDING, EventPayload, Payload, delivery_row
from trainyard.service.webhooks import signing
from trainyard.service.webhooks.requests import TEST, WebhookCreate

MAX_WEBHOOKS = 1000
"""Every event is matched against all of them."""

SECRET_OVERLAP = timedelta(hours=24)
"""After a rotation, the old secret signs as well for this long."""


def find(session: Session, webhook_id: str, lock: bool = False) -> WebhookRow:
    """Return the webhook, locked if ``lock``. Raises WebhookNotFound, also for text that is no id."""
    query = select(WebhookRow).where(WebhookRow.id == webhook_id)
    valid = webhook_id.isascii() and webhook_id.isprintable()
    row = session.scalar(query.with_for_update(key_share=True) if lock else query) if valid else None
    if row is None:
        raise WebhookNotFound()
    return row


def create(session: Session, request: WebhookCreate, now: datetime) -> WebhookRow:
    """Create a webhook with a secret. Raises TooManyWebhooks, or RequestInvalid if there is no such job."""
    if (session.scalar(select(func.count()).select_from(WebhookRow)) or 0) >= MAX_WEBHOOKS:
        raise TooManyWebhooks()
    if request.job_id is not None and session.scalar(select(JobRow.id).where(JobRow.id == request.job_id)) is None:
        raise with_problems(RequestInvalid, [Problem("/job_id", "no job has this id")])
    fields = request.model_dump(mode="json")
    row = WebhookRow(
        id=new_id("wh"), secret=signing.new_secret(), rules_since=now, created_at=now, updated_at=now, **fields
    )
    session.add(row)
    session.flush()
    return row


def change(session: Session, row: WebhookRow, request: WebhookCreate, now: datetime) -> None:
    """Apply the request. A webhook that is enabled again starts without failures."""
    fields = request.model_dump(mode="json")
    if fields["rules"] != row.rules:
        keys = [rule.key for rule in request.rules]
        session.execute(delete(RuleStateRow).where(RuleStateRow.webhook_id == row.id, RuleStateRow.rule.not_in(keys)))
        row.rules_since = now
    if request.enabled and not row.enabled:
        row.failures, row.failing_since, row.retry_at, row.disabled_reason = 0, None, None, None
    for name, value in fields.items():
        setattr(row, name, value)
    row.updated_at = now


def request_of(row: WebhookRow) -> dict[str, Any]:
    """Return the request that would create this webhook."""
    return {name: getattr(row, name) for name in WebhookCreate.model_fields}


def remove(session: Session, webhook_id: str) -> None:
    """Delete the webhook and its deliveries. Raises WebhookNotFound."""
    row = find(session, webhook_id, lock=True)
    session.execute(delete(DeliveryRow).where(DeliveryRow.webhook_id == row.id))
    session.delete(row)


def rotate(row: WebhookRow, now: datetime) -> str:
    """Give the webhook a new secret and return it; the old one signs as well for SECRET_OVERLAP."""
    row.old_secret, row.old_secret_until = row.secret, now + SECRET_OVERLAP
    row.secret = signing.new_secret()
    row.updated_at = now
    return row.secret


def secrets_of(row: WebhookRow, now: datetime) -> list[str]:
    """Return the secrets that sign now, newest first."""
    old = row.old_secret if row.old_secret_until is not None and row.old_secret_until > now else None
    return [row.secret, *([old] if old else [])]


def page(session: Session, limit: int, after: str | None) -> tuple[Sequence[WebhookRow], bool]:
    """Return a page of webhooks, newest first, and whether more follow. Raises WebhookNotFound for ``after``."""
    query = select(WebhookRow).order_by(WebhookRow.number.desc()).limit(limit + 1)
    if after is not None:
        query = query.where(WebhookRow.number < find(session, after).number)
    rows = session.scalars(query).all()
    return rows[:limit], len(rows) > limit


def deliveries(
    session: Session, webhook_id: str, state: str | None, limit: int, after: int | None
) -> tuple[Sequence[DeliveryRow], bool]:
    """Return a page of the webhook's deliveries, newest first, and whether more follow. Raises WebhookNotFound."""
    query = select(DeliveryRow).where(DeliveryRow.webhook_id == find(session, webhook_id).id)
    if state is not None:
        query = query.where(DeliveryRow.state == state)
    if after is not None:
        query = query.where(DeliveryRow.number < after)
    rows = session.scalars(query.order_by(DeliveryRow.number.desc()).limit(limit + 1)).all()
    return rows[:limit], len(rows) > limit


def delivery(session: Session, webhook_id: str, number: int, lock: bool = False) -> DeliveryRow:
    """Return one of the webhook's deliveries. Raises WebhookNotFound or DeliveryNotFound."""
    query = select(DeliveryRow).where(
        DeliveryRow.webhook_id == find(session, webhook_id).id, DeliveryRow.number == number
    )
    row = session.scalar(query.with_for_update() if lock else query)
    if row is None:
        raise DeliveryNotFound()
    return row


def test(session: Session, webhook_id: str, now: datetime) -> DeliveryRow:
    """Queue a test delivery, also if the webhook is disabled. Raises WebhookNotFound."""
    row = find(session, webhook_id, lock=True)
    row.retry_at = None
    test_id = new_id("test", 16)
    payload = Payload(type=TEST, id=f"evt_{test_id}", timestamp=now, data=EventPayload(webhook_id=row.id))
    delivery = delivery_row(row.id, payload, None, test_id, now)  # a lane of its own: it waits for no other delivery
    session.add(delivery)
    session.flush()
    return delivery


def redeliver(session: Session, webhook_id: str, number: int, now: datetime) -> DeliveryRow:
    """Queue the delivery again; one that is still pending becomes due now. Raises as `delivery` does."""
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
