"""Select the deliveries to send next, and delete old ones."""

from dataclasses import dataclass
from datetime import datetime, timedelta

from sqlalchemy import and_, delete, exists, func, or_, select
from sqlalchemy.orm import Session

from trainyard.service.db.models import DeliveryRow, JobRow, WebhookRow
from trainyard.service.jobs.event_outbox import PENDING
from trainyard.service.notice_urls import is_notice_url
from trainyard.service.webhooks.retry_policy import MAX_CONCURRENT, NextDelivery

RETENTION = timedelta(days=30)


@dataclass(frozen=True)
class ExpiredClaims:
    """Whether the claims of other senders have expired. A notice may take longer to send than a signed webhook."""

    webhooks: bool
    notices: bool


def next_deliveries(session: Session, now: datetime, sender: str, expired: ExpiredClaims) -> list[NextDelivery]:
    """Return the first pending delivery of each lane if it is due, a few of each webhook, oldest first.

    Deliveries claimed by another ``sender`` are left to it, unless the claim has ``expired``. A disabled webhook sends
    only tests and manual redeliveries.
    """
    row = DeliveryRow
    first = select(func.min(row.number)).where(row.state == PENDING).group_by(row.webhook_id, row.lane)
    manual = or_(row.job_id.is_(None), row.lane != row.job_id)
    signed = or_(WebhookRow.url.ilike("http://%"), WebhookRow.url.ilike("https://%"))
    kinds = [kind for kind, over in ((signed, expired.webhooks), (~signed, expired.notices)) if over]
    free = or_(row.claimed_by.is_(None), row.claimed_by == sender, *kinds)
    position = func.row_number().over(partition_by=row.webhook_id, order_by=row.number).label("position")
    due = (
        select(row.number, row.webhook_id, WebhookRow.failures, WebhookRow.url, position)
        .join(WebhookRow, WebhookRow.id == row.webhook_id)
        .where(
            row.number.in_(first),
            row.next_at <= now,
            free,
            or_(WebhookRow.enabled.is_(True), manual),
            or_(WebhookRow.retry_at.is_(None), WebhookRow.retry_at <= now, manual),
        )
        .subquery()
    )
    query = select(due).where(due.c.position <= MAX_CONCURRENT).order_by(due.c.number)
    return [
        NextDelivery(row.number, row.webhook_id, row.failures, is_notice_url(row.url)) for row in session.execute(query)
    ]


def sweep(session: Session, now: datetime) -> None:
    """Delete old finished deliveries, those of deleted webhooks, and idle webhooks of deleted jobs."""
    row = DeliveryRow
    session.execute(delete(row).where(row.ended_at < now - RETENTION))
    session.execute(delete(row).where(row.webhook_id.not_in(select(WebhookRow.id))))
    waiting = exists().where(and_(row.webhook_id == WebhookRow.id, row.state == PENDING))
    orphaned = (WebhookRow.job_id.is_not(None), WebhookRow.job_id.not_in(select(JobRow.id)), ~waiting)
    session.execute(delete(WebhookRow).where(*orphaned).execution_options(synchronize_session=False))
