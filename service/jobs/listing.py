"""Pages of jobs, and of the rows of one job."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from sqlalchemy import Connection, Row, Select, false, or_, select, true, tuple_

from trainyard.contract.parsing import Problem
from trainyard.contract.status import JobStatus
from trainyard.service.db.models import Base, JobRow, LabelRow
from trainyard.service.errors import RequestInvalid, with_problems
from trainyard.service.ids import JOB_ID
from trainyard.service.jobs.queries import JOBS_WITH_PLACEMENT, owned_by, require_job

MAX_DIGITS = 18


@dataclass(frozen=True)
class JobFilter:
    """Which jobs to list, in which order, starting after which one.

    ``by_score``: the order is by score, from the best on, or from the worst on if ``newest_first``; jobs without a
    score are last.
    """

    status: tuple[JobStatus, ...]
    labels: tuple[tuple[str, str], ...]
    name: str | None
    newest_first: bool
    limit: int
    after: str | None
    parent: str | None = None
    search: str | None = None
    group: str | None = None
    discarded: bool = False
    by_score: bool = False
    owner: str | None = None


def label_pairs(given: Sequence[str]) -> tuple[tuple[str, str], ...]:
    """Return the pairs of texts like ``key=value``. Raises RequestInvalid."""
    if any("=" not in text or "\0" in text for text in given):
        raise with_problems(RequestInvalid, [Problem("/query/label", "must be key=value")])
    return tuple((text.partition("=")[0], text.partition("=")[2]) for text in given)


def jobs(connection: Connection, filters: JobFilter) -> tuple[Sequence[Row[Any]], bool]:
    """Return a page as rows of `JOBS_WITH_PLACEMENT`, and whether more follow. Raises RequestInvalid."""
    if filters.by_score:
        return _by_score(connection, filters)
    query = _filtered(filters)
    if filters.after is not None:
        number = _number(connection, filters.after)
        query = query.where(JobRow.number < number if filters.newest_first else JobRow.number > number)
    order = JobRow.number.desc() if filters.newest_first else JobRow.number.asc()
    rows = connection.execute(query.order_by(order).limit(filters.limit + 1)).all()
    return rows[: filters.limit], len(rows) > filters.limit


def _by_score(connection: Connection, filters: JobFilter) -> tuple[Sequence[Row[Any]], bool]:
    # Two ranges of an index: SQLite and PostgreSQL sort null differently, and with NULLS LAST they use no index.
    scored = _filtered(filters).where(JobRow.score.is_not(None))
    unscored = _filtered(filters).where(JobRow.score.is_(None)).order_by(JobRow.number.desc())
    key = tuple_(JobRow.score, JobRow.number)
    if filters.after is not None:
        number = _number(connection, filters.after)
        score = connection.scalar(select(JobRow.score).where(JobRow.number == number))
        if score is None:
            unscored, scored = unscored.where(JobRow.number < number), scored.where(false())
        else:
            after = tuple_(score, number)
            scored = scored.where(key < after if filters.newest_first else key > after)
    order = (JobRow.score, JobRow.number)
    ordered = scored.order_by(*(column.desc() if filters.newest_first else column.asc() for column in order))
    rows = list(connection.execute(ordered.limit(filters.limit + 1)))
    if len(rows) <= filters.limit:
        rows += connection.execute(unscored.limit(filters.limit + 1 - len(rows)))
    return rows[: filters.limit], len(rows) > filters.limit


def _filtered(filters: JobFilter) -> Select[Any]:
    query: Select[Any] = JOBS_WITH_PLACEMENT.where(JobRow.discarded == (true() if filters.discarded else false()))
    if filters.group is not None:
        query = query.where(JobRow.group_name == filters.group)
    if filters.owner is not None:
        query = query.where(owned_by(filters.owner))
    if filters.status:
        query = query.where(JobRow.status.in_(filters.status))
    if filters.name is not None:
        query = query.where(JobRow.name == filters.name)
    if filters.parent is not None:
        query = query.where(JobRow.parent_job_id == filters.parent)
    if filters.search:
        in_name = JobRow.name.icontains(filters.search, autoescape=True)
        query = query.where(or_(in_name, JobRow.id.startswith(filters.search, autoescape=True)))
    for key, value in filters.labels:
        labelled = select(LabelRow.job_id).where(LabelRow.key == key, LabelRow.value == value)
        query = query.where(JobRow.id.in_(labelled))
    return query


def _number(connection: Connection, job_id: str) -> int:
    valid = JOB_ID.fullmatch(job_id) is not None
    number = connection.scalar(select(JobRow.number).where(JobRow.id == job_id)) if valid else None
    if number is None:
        raise with_problems(RequestInvalid, [Problem("/query/after", "must be the id of an existing job")])
    return number


class _Listed(Protocol):
    @property
    def id(self) -> str: ...


Item = TypeVar("Item", bound=_Listed)


def page_of_all(items: Sequence[Item], limit: int | None, after: str | None) -> tuple[Sequence[Item], bool]:
    """Return the items after the one with the id ``after``, at most ``limit``, and whether more follow."""
    ids = [item.id for item in items]
    if after is not None and after not in ids:
        raise with_problems(RequestInvalid, [Problem("/query/after", "must be an id from this list")])
    following = items[ids.index(after) + 1 :] if after is not None else items
    return following[:limit], limit is not None and len(following) > limit


def page_of(
    connection: Connection, table: type[Base], job_id: str, limit: int, after: str | None, newest_first: bool = False
) -> tuple[Sequence[Row[Any]], bool]:
    """Return a page of the job's rows by their ``number``, and whether more follow.

    ``after``: the last row's number as text. Raises JobNotFound or RequestInvalid.
    """
    require_job(connection, job_id)
    columns = table.__table__.c
    query = select(*columns).where(columns.job_id == job_id)
    if after is not None:
        if not after.isdecimal() or not after.isascii() or len(after) > MAX_DIGITS:
            raise with_problems(RequestInvalid, [Problem("/query/after", "must be an id from this list")])
        query = query.where(columns.number < int(after) if newest_first else columns.number > int(after))
    order = columns.number.desc() if newest_first else columns.number.asc()
    rows = connection.execute(query.order_by(order).limit(limit + 1)).all()
    return rows[:limit], len(rows) > limit
