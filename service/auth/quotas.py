"""How many jobs and devices a named token may have queued or running at once.

A job counts for who queued it last: who submitted or forked it, or who resumed it.
"""

from typing import NamedTuple

from sqlalchemy import ColumnElement, and_, func, or_, select
from sqlalchemy.orm import Session

from trainyard.contract.status import LIVE, JobStatus
from trainyard.service.auth.principal import Principal
from trainyard.service.db.models import JobRow, TokenRow
from trainyard.service.errors import QuotaExceeded

MAX_LISTED_JOBS = 5


class Usage(NamedTuple):
    """What is queued or runs."""

    jobs: int = 0
    devices: int = 0


def usage(session: Session, *which: ColumnElement[bool]) -> dict[str, Usage]:
    """Usage by the name of the token."""
    query = select(JobRow.queued_by, func.count(), func.coalesce(func.sum(JobRow.ranks), 0)).where(_active(), *which)
    found = session.execute(query.group_by(JobRow.queued_by)).all()
    return {str(name): Usage(jobs, int(devices)) for name, jobs, devices in found}


def check_quota(session: Session, by: Principal, ranks: int, but: str | None = None) -> None:
    """Raise QuotaExceeded where one more job of so many ranks is too much. ``but``: that very job, queued again.

    Holds the token until the transaction ends: two submissions at once cannot both take the last place. A job's lock
    is taken before a token's, never after.
    """
    if by.token is None:
        return
    token = session.scalar(select(TokenRow).where(TokenRow.id == by.token).with_for_update())
    if token is None or (token.max_jobs is None and token.max_devices is None):
        return
    mine = (JobRow.queued_by == by.name, JobRow.id != (but or ""))
    have = usage(session, *mine).get(by.name, Usage())
    trouble = [
        f"{_of(limit, what)}, has {_of(used, what)} queued or running, and this one needs {more}"
        for what, limit, used, more in (
            ("job", token.max_jobs, have.jobs, 1),
            ("device", token.max_devices, have.devices, ranks),
        )
        if limit is not None and used + more > limit
    ]
    if trouble:
        raise _exceeded(session, token, have, trouble, mine)


def _exceeded(
    session: Session, token: TokenRow, have: Usage, trouble: list[str], mine: tuple[ColumnElement[bool], ...]
) -> QuotaExceeded:
    query = select(JobRow.id).where(_active(), *mine).order_by(JobRow.number).limit(MAX_LISTED_JOBS)
    ids = list(session.scalars(query))
    of_them = f" ({', '.join(ids)}{', ...' if have.jobs > MAX_LISTED_JOBS else ''})" if ids else ""
    what_to_do = f"Wait for one{of_them} to end, pause or cancel one, or ask an admin to raise the quota."
    if not ids:
        what_to_do = "Ask for fewer devices, or ask an admin to raise the quota."
    quota = {
        "jobs": {"limit": token.max_jobs, "used": have.jobs},
        "devices": {"limit": token.max_devices, "used": have.devices},
    }
    return QuotaExceeded(f"The token {token.name} may have {'; and '.join(trouble)}. {what_to_do}", quota=quota)


def _of(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _active() -> ColumnElement[bool]:
    """Waits for devices, has them, or will start again by itself."""
    due = and_(JobRow.status == JobStatus.INTERRUPTED, JobRow.restart_at.is_not(None))
    return or_(JobRow.status.in_([JobStatus.QUEUED, *sorted(LIVE)]), due)
