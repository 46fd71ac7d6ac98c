"""Pages of jobs, and of what belongs to one job."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, Row, Select, or_, select

from trainyard.contract.parsing import Problem
from trainyard.contract.status import JobStatus
from trainyard.service.db.models import Base, JobRow, LabelRow
from trainyard.service.errors import RequestInvalid, with_problems
from trainyard.service.ids import JOB_ID
from trainyard.service.jobs.queries import JOBS_WITH_PLACEMENT, require_job

MAX_DIGITS = 18


@dataclass(frozen=True)
class JobFilter:
    """Which jobs, in which order, from where."""

    status: tuple[JobStatus, ...]
    labels: tuple[tuple[str, str], ...]
    name: str | None
    newest_first: bool
    limit: int
    after: str | None
    parent: str | None = None
    search: str | None = None


def label_pairs(given: Sequence[str]) -> tuple[tuple[str, str], ...]:
    """``key=value`` as pairs. Raises RequestInvalid."""
    if any("=" not in text or "\0" in text for text in given):
        raise with_problems(RequestInvalid, [Problem("/query/label", "must be key=value")])
    return tuple((text.partition("=")[0], text.partition("=")[2]) for text in given)


def jobs(connection: Connection, wanted: JobFilter) -> tuple[Sequence[Row[Any]], bool]:
    """A page, as rows of `PLACED`, and whether more follow."""
    query = _filtered(wanted)
    if wanted.after is not None:
        number = _number(connection, wanted.after)
        query = query.where(JobRow.number < number if wanted.newest_first else JobRow.number > number)
    order = JobRow.number.desc() if wanted.newest_first else JobRow.number.asc()
    found = connection.execute(query.order_by(order).limit(wanted.limit + 1)).all()
    return found[: wanted.limit], len(found) > wanted.limit


def _filtered(wanted: JobFilter) -> Select[Any]:
    query: Select[Any] = JOBS_WITH_PLACEMENT
    if wanted.status:
        query = query.where(JobRow.status.in_(wanted.status))
    if wanted.name is not None:
        query = query.where(JobRow.name == wanted.name)
    if wanted.parent is not None:
        query = query.where(JobRow.parent_job_id == wanted.parent)
    if wanted.search:
        within = JobRow.name.icontains(wanted.search, autoescape=True)
        query = query.where(or_(within, JobRow.id.startswith(wanted.search, autoescape=True)))
    for key, value in wanted.labels:
        holders = select(LabelRow.job_id).where(LabelRow.key == key, LabelRow.value == value)
        query = query.where(JobRow.id.in_(holders))
    return query


def _number(connection: Connection, job_id: str) -> int:
    known = JOB_ID.fullmatch(job_id) is not None
    number = connection.scalar(select(JobRow.number).where(JobRow.id == job_id)) if known else None
    if number is None:
        raise with_problems(RequestInvalid, [Problem("/query/after", "must be the id of a job that is there")])
    return number


def page_of(
    connection: Connection, table: type[Base], job_id: str, limit: int, after: str | None, newest_first: bool = False
) -> tuple[Sequence[Row[Any]], bool]:
    """Return a page of the job's rows by their ``number``, and whether more follow.

    ``after`` is the last row's number as text. Raises JobNotFound.
    """
    require_job(connection, job_id)
    columns = table.__table__.c
    query = select(*columns).where(columns.job_id == job_id)
    if after is not None:
        if not after.isdecimal() or not after.isascii() or len(after) > MAX_DIGITS:
            raise with_problems(RequestInvalid, [Problem("/query/after", "must be an id from this list")])
        query = query.where(columns.number < int(after) if newest_first else columns.number > int(after))
    order = columns.number.desc() if newest_first else columns.number.asc()
    found = connection.execute(query.order_by(order).limit(limit + 1)).all()
    return found[:limit], len(found) > limit
