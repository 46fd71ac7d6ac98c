"""What waits to be sent, and what is kept no longer."""

from datetime import datetime, timedelta

from sqlalchemy import and_, delete, exists, false, func, or_, select, true
from sqlalchemy.orm import Session

from trainyard.service.db.models import DeliveryRow, JobRow, WebhookRow
from trainyard.service.jobs.event_outbox import PENDING
from trainyard.service.webhooks.retry_policy import MAX_CONCURRENT, NextDelivery

RETENTION = timedelta(days=30)


def next_deliveries(session: Session, now: datetime, sender: str, others_are_late: bool) -> list[NextDelivery]:
    """The first open delivery of each lane where it is due, a few of each webhook, oldest first.

    One that another ``sender`` is at is left to it, unless ``others_are_late``. Of a webhook that is switched off only
    what somebody asked for by hand is sent.
    """
    row = DeliveryRow
    first = select(func.min(row.number)).where(row.state == PENDING).group_by(row.webhook_id, row.lane)
    by_hand = or_(row.job_id.is_(None), row.lane != row.job_id)
    free = or_(row.claimed_by.is_(None), row.claimed_by == sender, true() if others_are_late else false())
    place = func.row_number().over(partition_by=row.webhook_id, order_by=row.number).label("place")
    due = (
        select(row.number, row.webhook_id, WebhookRow.failures, place)
        .join(WebhookRow, WebhookRow.id == row.webhook_id)
        .where(
            row.number.in_(first),
            row.next_at <= now,
            free,
            or_(WebhookRow.enabled.is_(True), by_hand),
            or_(WebhookRow.retry_at.is_(None), WebhookRow.retry_at <= now, by_hand),
        )
        .subquery()
    )
    query = select(due).where(due.c.place <= MAX_CONCURRENT).order_by(due.c.number)
    return [NextDelivery(found.number, found.webhook_id, found.failures) for found in session.execute(query)]


def sweep(session: Session, now: datetime) -> None:
    """Forget old ends, what was to go to webhooks that are no more, and webhooks of jobs that are no more."""
    row = DeliveryRow
    session.execute(delete(row).where(row.ended_at < now - RETENTION))
    session.execute(delete(row).where(row.webhook_id.not_in(select(WebhookRow.id))))
    waiting = exists().where(and_(row.webhook_id == WebhookRow.id, row.state == PENDING))
    orphaned = (WebhookRow.job_id.is_not(None), WebhookRow.job_id.not_in(select(JobRow.id)), ~waiting)
    session.execute(delete(WebhookRow).where(*orphaned).execution_options(synchronize_session=False))
