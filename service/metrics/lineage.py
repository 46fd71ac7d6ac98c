"""A fork's lineage: which points of its ancestors' curves lead to it, and its curve with those before it.

What leads to a fork is recorded when it is made, because the parent may go back later.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import chain, groupby
from typing import Any, NamedTuple

from sqlalchemy import Select, select
from sqlalchemy.orm import Session

from trainyard.service.db.models import AttemptRow, JobRow, MetricRow
from trainyard.service.metrics import rollups, store
from trainyard.service.metrics.downsampling import Aggregate, aggregate_of, to_buckets


class LineageSegment(NamedTuple):
    """The points of attempt ``attempt`` of a job after step ``after``, up to and including ``until``."""

    job_id: str
    attempt: int
    after: int
    until: int


def segments(job: JobRow) -> list[LineageSegment]:
    """Return the ancestors' pieces that come before the job's own, oldest first."""
    return [LineageSegment(**piece) for piece in (job.lineage or {}).get("curve", ())]


def record(session: Session, parent: JobRow, step: int, attempt: int, data: str) -> dict[str, Any]:
    """Return the lineage to store with a fork of ``parent`` at the checkpoint that ``attempt`` saved at ``step``."""
    curve = [*segments(parent), *own_segments(session, parent, step, attempt)]
    return {"data": data, "curve": [piece._asdict() for piece in curve]}


def own_segments(session: Session, job: JobRow, step: int, attempt: int | None = None) -> list[LineageSegment]:
    """Return the job's own curve up to ``step``, as it was when ``attempt`` was the last; None: as it is now."""
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
            found.append(LineageSegment(job.id, number, start, until))
    return found


def by_job(curve: Iterable[LineageSegment]) -> list[tuple[str, list[LineageSegment]]]:
    """Group the pieces by ancestor, oldest first."""
    return [(job_id, list(found)) for job_id, found in groupby(curve, key=lambda piece: piece.job_id)]


def lineage_rows(
    session: Session, job: JobRow, after_step: int, limit: int, fields: Sequence[str], until_step: int | None = None
) -> list[dict[str, Any]]:
    """At most ``limit`` points after ``after_step``, up to ``until_step``, oldest first, with their ``job_id``."""
    found: list[dict[str, Any]] = []
    for whole in segments(job):
        piece = whole if until_step is None else whole._replace(until=min(whole.until, until_step))
        if len(found) < limit and piece.until > after_step:
            more = _segment_rows(session, piece, max(after_step, piece.after), limit - len(found), fields)
            found += [{"job_id": piece.job_id, **row} for row in more]
    if len(found) < limit:
        own = store.rows(session, job.id, None, after_step, limit - len(found), fields, until_step)
        found += [{"job_id": job.id, **row} for row in own]
    return found


def _segment_rows(
    session: Session, piece: LineageSegment, after: int, limit: int, fields: Sequence[str]
) -> list[dict[str, Any]]:
    """Each step once, as it was last done: an attempt that rolled back did some twice."""
    columns = [getattr(MetricRow, name) for name in fields]
    found: list[dict[str, Any]] = []
    while len(found) < limit:
        page = session.execute(_select_points(piece, after, columns).limit(limit)).all()
        for row in page:
            if row.step > after:
                found.append(dict(zip(fields, row, strict=True)))
                after = row.step
        if len(page) < limit:
            break
    return found[:limit]


def _select_points(piece: LineageSegment, after: int, columns: Sequence[Any]) -> Select[Any]:
    of_attempt = (MetricRow.job_id == piece.job_id, MetricRow.attempt == piece.attempt)
    query = select(*columns).where(*of_attempt, MetricRow.step > after, MetricRow.step <= piece.until)
    return query.order_by(MetricRow.step, MetricRow.seq.desc())


def lineage_buckets(session: Session, job: JobRow, view: rollups.RollupView) -> list[dict[str, Any]]:
    """Return the rows of the view, with a running mean over everything before it."""
    ancestors = by_job(segments(job))
    parts = chain.from_iterable(_ancestor_aggregates(session, found, view) for _, found in ancestors)
    own = rollups.aggregates(session, job, view)
    bounds = [(found[-1].until, job_id) for job_id, found in ancestors]

    def whose(step: int) -> str:
        return next((job_id for until, job_id in bounds if step <= until), job.id)

    made = to_buckets(chain(parts, own), view.width, view.half_life)
    return [{"job_id": whose(row["step"]), **row} for row in made if row["step"] >= view.begin]


def _ancestor_aggregates(
    session: Session, found: list[LineageSegment], view: rollups.RollupView
) -> Iterator[Aggregate]:
    """From the sums, if the ancestor's curve still is what led to the fork; else from its points."""
    whole = found[-1].until
    until = whole if view.until_step is None else min(whole, view.until_step)
    part = replace(view, until_step=until)
    job = session.get(JobRow, _number(session, found[0].job_id))
    if job is not None and rollups.can_use_rollups(part) and own_segments(session, job, whole) == found:
        yield from rollups.aggregates(session, job, part)
        return
    for piece in found:
        last = piece.after
        columns = (MetricRow.step, MetricRow.loss, MetricRow.attempt)
        for row in session.execute(_select_points(piece, piece.after, columns).execution_options(yield_per=5000)):
            if last < row.step <= until:
                last = row.step
                yield aggregate_of(*row)


def _number(session: Session, job_id: str) -> int:
    return session.scalar(select(JobRow.number).where(JobRow.id == job_id)) or 0


def show_lineage(session: Session, job: JobRow) -> list[dict[str, Any]]:
    """Return whose curve it is up to which step, oldest first; ``deleted`` jobs have no points left."""
    ancestors = by_job(segments(job))
    there = set(session.scalars(select(JobRow.id).where(JobRow.id.in_([job_id for job_id, _ in ancestors]))))
    known = [
        {"job_id": job_id, "until_step": found[-1].until, "deleted": job_id not in there} for job_id, found in ancestors
    ]
    return [*known, {"job_id": job.id, "until_step": None, "deleted": False}]
