"""Quotas: how many jobs and devices a named token may have queued or running at once.

A job counts for the token that queued it last, by submitting, forking or resuming it.
"""

from typing import NamedTuple

from sqlalchemy import ColumnElement, and_, func, or_, select
from sqlalchemy.orm import Session

from trainyard.contract.status import LIVE, WAITING, JobStatus
from trainyard.service.auth.principal import Principal
from trainyard.service.db.models import JobRow, TokenRow
from trainyard.service.errors import QuotaExceeded

MAX_LISTED_JOBS = 5


class QuotaUsage(NamedTuple):
    """Queued and running jobs and their devices."""

    jobs: int = 0
    devices: int = 0


def usage(session: Session, *conditions: ColumnElement[bool]) -> dict[str, QuotaUsage]:
    """Return the usage of each token, by its name. ``conditions`` restrict the jobs that count."""
    columns = JobRow.queued_by, func.count(), func.coalesce(func.sum(JobRow.ranks), 0)
    rows = session.execute(select(*columns).where(_is_active(), *conditions).group_by(JobRow.queued_by)).all()
    return {str(name): QuotaUsage(jobs, int(devices)) for name, jobs, devices in rows}


def check_quota(session: Session, caller: Principal, ranks: int, requeued_job: str | None = None) -> None:
    """Raise QuotaExceeded if the caller may not queue one more job with so many ranks.

    ``requeued_job``: id of the job if it exists already; it does not count twice.
    """
    if caller.token is None:
        return
    # The row stays locked until the transaction ends, so that two concurrent submissions cannot both take the last
    # place. Lock order: a job before a token, never the other way round.
    token = session.scalar(select(TokenRow).where(TokenRow.id == caller.token).with_for_update())
    if token is None or (token.max_jobs is None and token.max_devices is None):
        return
    conditions = (JobRow.queued_by == caller.name, JobRow.id != (requeued_job or ""))
    used = usage(session, *conditions).get(caller.name, QuotaUsage())
    violations = [
        f"{_count(limit, what)}, has {_count(current, what)} queued or running, and this one needs {needed}"
        for what, limit, current, needed in (
            ("job", token.max_jobs, used.jobs, 1),
            ("device", token.max_devices, used.devices, ranks),
        )
        if limit is not None and current + needed > limit
    ]
    if violations:
        raise _quota_error(session, token, used, violations, conditions)


def _quota_error(
    session: Session,
    token: TokenRow,
    used: QuotaUsage,
    violations: list[str],
    conditions: tuple[ColumnElement[bool], ...],
) -> QuotaExceeded:
    query = select(JobRow.id).where(_is_active(), *conditions).order_by(JobRow.number).limit(MAX_LISTED_JOBS)
    ids = ", ".join(session.scalars(query))
    more = ", ..." if used.jobs > MAX_LISTED_JOBS else ""
    advice = "Ask for fewer devices, or ask an admin to raise the quota."
    if ids:
        advice = f"Wait for one ({ids}{more}) to end, pause or cancel one, or ask an admin to raise the quota."
    quota = {
        "jobs": {"limit": token.max_jobs, "used": used.jobs},
        "devices": {"limit": token.max_devices, "used": used.devices},
    }
    return QuotaExceeded(f"The token {token.name} may have {'; and '.join(violations)}. {advice}", quota=quota)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _is_active() -> ColumnElement[bool]:
    # Also a job that will restart by itself.
    restarts = and_(JobRow.status == JobStatus.INTERRUPTED, JobRow.restart_at.is_not(None))
    return or_(JobRow.status.in_(sorted(LIVE | WAITING)), restarts)
