"""Pages of jobs, and of what belongs to one job."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from sqlalchemy import BindParameter, Connection, Row, Select, bindparam, or_, select

from contract.parsing import Problem
from contract.status import JobStatus
from service.errors import RequestInvalid, with_problems
from service.jobs.gathering import PLACED, require
from service.jobs.ids import JOB_ID
from service.tables import JobRow, LabelRow, Table

LONGEST_NUMBER = 18
BEHIND_ALL = 2**62


@dataclass(frozen=True)
class Wanted:
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


def jobs(connection: Connection, wanted: Wanted) -> tuple[Sequence[Row[Any]], bool]:
    """A page, as rows of `PLACED`, and whether more follow."""
    behind = {"number": _number(connection, wanted.after)} if wanted.after is not None else {}
    # Whoever turns pages asks the same each time, but for where the page begins.
    query = _query(replace(wanted, after="") if behind else wanted)
    found = connection.execute(query, behind).all()
    return found[: wanted.limit], len(found) > wanted.limit


@functools.lru_cache(maxsize=64)
def _query(wanted: Wanted) -> Select[Any]:
    """Kept: a dashboard asks the same again and again, and to build it costs more than to run it."""
    query = _filtered(wanted)
    if wanted.after is not None:
        number: BindParameter[int] = bindparam("number")
        query = query.where(JobRow.number < number if wanted.newest_first else JobRow.number > number)
    order = JobRow.number.desc() if wanted.newest_first else JobRow.number.asc()
    return query.order_by(order).limit(wanted.limit + 1)


def _filtered(wanted: Wanted) -> Select[Any]:
    query: Select[Any] = PLACED
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


@dataclass(frozen=True)
class Pages:
    """Pages of one table's rows that belong to a job, by their numbers. The statement is built once."""

    statement: Select[Any]
    newest_first: bool

    @classmethod
    def of(cls, table: type[Table], newest_first: bool = False) -> "Pages":
        """Of a table whose rows have a ``number`` and a ``job_id``."""
        columns = table.__table__.c
        behind: BindParameter[int] = bindparam("behind")
        of_job = (
            columns.job_id == bindparam("job_id"),
            columns.number < behind if newest_first else columns.number > behind,
        )
        order = columns.number.desc() if newest_first else columns.number.asc()
        found = select(*columns).where(*of_job).order_by(order).limit(bindparam("most"))
        return cls(found, newest_first)

    def read(
        self, connection: Connection, job_id: str, limit: int, after: str | None
    ) -> tuple[Sequence[Row[Any]], bool]:
        """A page, and whether more follow; ``after`` is the last row's number as text. Raises JobNotFound."""
        require(connection, job_id)
        behind = BEHIND_ALL if self.newest_first else 0
        if after is not None:
            if not after.isdecimal() or not after.isascii() or len(after) > LONGEST_NUMBER:
                raise with_problems(RequestInvalid, [Problem("/query/after", "must be an id from this list")])
            behind = int(after)
        asked = {"job_id": job_id, "behind": behind, "most": limit + 1}
        found = connection.execute(self.statement, asked).all()
        return found[:limit], len(found) > limit
