"""Which points of its ancestors' curves lead to a fork: recorded when it is made, for a parent may go back later."""

from collections.abc import Iterable
from itertools import groupby
from typing import Any, NamedTuple

from sqlalchemy import select
from sqlalchemy.orm import Session

from service.tables import AttemptRow, JobRow


class Piece(NamedTuple):
    """What attempt ``attempt`` of a job did behind step ``after``, up to and with step ``until``."""

    job_id: str
    attempt: int
    after: int
    until: int


def pieces(job: JobRow) -> list[Piece]:
    """The ancestors' points that come before the job's own, oldest first."""
    return [Piece(**piece) for piece in (job.lineage or {}).get("curve", ())]


def record(session: Session, parent: JobRow, step: int, attempt: int, data: str) -> dict[str, Any]:
    """What a fork of ``parent`` at the checkpoint that ``attempt`` saved at ``step`` is to remember."""
    curve = [*pieces(parent), *own_pieces(session, parent, step, attempt)]
    return {"data": data, "curve": [piece._asdict() for piece in curve]}


def own_pieces(session: Session, job: JobRow, step: int, attempt: int | None = None) -> list[Piece]:
    """The job's own curve up to ``step``, as it stood when ``attempt`` was the last; None: as it stands now."""
    query = select(AttemptRow.number, AttemptRow.start_step).where(
        AttemptRow.job_id == job.id, AttemptRow.start_step.is_not(None)
    )
    if attempt is not None:
        query = query.where(AttemptRow.number <= attempt)
    started = [(row.number, int(row.start_step)) for row in session.execute(query.order_by(AttemptRow.number))]
    found = []
    for place, (number, start) in enumerate(started):
        until = min([step, *(later for _, later in started[place + 1 :])])
        if until > start:
            found.append(Piece(job.id, number, start, until))
    return found


def by_job(curve: Iterable[Piece]) -> list[tuple[str, list[Piece]]]:
    """The pieces of each ancestor together, oldest first."""
    return [(job_id, list(found)) for job_id, found in groupby(curve, key=lambda piece: piece.job_id)]
