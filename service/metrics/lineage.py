"""A fork's lineage: the segments of its ancestors' curves that lead to it, and its curve joined with them.

The segments are stored when the fork is made, because the parent may roll back later.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import groupby
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
    """Return the ancestors' segments before the job's own curve, oldest first."""
    return [LineageSegment(**segment) for segment in (job.lineage or {}).get("curve", ())]


def record(session: Session, parent: JobRow, step: int, attempt: int, data: str) -> dict[str, Any]:
    """Return the lineage to store with a fork of ``parent`` at the checkpoint that ``attempt`` saved at ``step``."""
    curve = [*segments(parent), *own_segments(session, parent, step, attempt)]
    return {"data": data, "curve": [segment._asdict() for segment in curve]}


def own_segments(session: Session, job: JobRow, step: int, attempt: int | None = None) -> list[LineageSegment]:
    """Return the job's own curve up to ``step``, as it was when ``attempt`` was the last; None: as it is now."""
    query = select(AttemptRow.number, AttemptRow.start_step).where(
        AttemptRow.job_id == job.id, AttemptRow.start_step.is_not(None)
    )
    if attempt is not None:
        query = query.where(AttemptRow.number <= attempt)
    started = [(row.number, int(row.start_step)) for row in session.execute(query.order_by(AttemptRow.number))]
    own = []
    for index, (number, start) in enumerate(started):
        until = min([step, *(later for _, later in started[index + 1 :])])
        if until > start:
            own.append(LineageSegment(job.id, number, start, until))
    return own


def by_job(curve: Iterable[LineageSegment]) -> list[tuple[str, list[LineageSegment]]]:
    """Group the segments by ancestor, oldest first."""
    return [(job_id, list(group)) for job_id, group in groupby(curve, key=lambda segment: segment.job_id)]


def lineage_rows(
    session: Session, job: JobRow, after_step: int, limit: int, fields: Sequence[str], until_step: int | None = None
) -> list[dict[str, Any]]:
    """Return at most ``limit`` points after ``after_step``, up to ``until_step``, oldest first, with ``job_id``."""
    found: list[dict[str, Any]] = []
    for whole in segments(job):
        segment = whole if until_step is None else whole._replace(until=min(whole.until, until_step))
        if len(found) < limit and segment.until > after_step:
            more = _segment_rows(session, segment, max(after_step, segment.after), limit - len(found), fields)
            found += [{"job_id": segment.job_id, **row} for row in more]
    if len(found) < limit:
        own = store.rows(session, job.id, None, after_step, limit - len(found), fields, until_step)
        found += [{"job_id": job.id, **row} for row in own]
    return found


def _segment_rows(
    session: Session, segment: LineageSegment, after: int, limit: int, fields: Sequence[str]
) -> list[dict[str, Any]]:
    # Each step once, from its last run: an attempt that rolled back has run some steps twice.
    columns = [getattr(MetricRow, name) for name in fields]
    found: list[dict[str, Any]] = []
    while len(found) < limit:
        page = session.execute(_select_points(segment, after, columns).limit(limit)).all()
        for row in page:
            if row.step > after:
                found.append(dict(zip(fields, row, strict=True)))
                after = row.step
        if len(page) < limit:
            break
    return found[:limit]


def _select_points(segment: LineageSegment, after: int, columns: Sequence[Any]) -> Select[Any]:
    of_attempt = (MetricRow.job_id == segment.job_id, MetricRow.attempt == segment.attempt)
    query = select(*columns).where(*of_attempt, MetricRow.step > after, MetricRow.step <= segment.until)
    return query.order_by(MetricRow.step, MetricRow.seq.desc())


def lineage_buckets(session: Session, job: JobRow, view: rollups.RollupView) -> list[dict[str, Any]]:
    """Return the buckets of the view; the EMA includes everything before them."""
    bounds = [(found[-1].until, job_id) for job_id, found in by_job(segments(job))]

    def job_at(step: int) -> str:
        return next((job_id for until, job_id in bounds if step <= until), job.id)

    buckets = to_buckets(lineage_aggregates(session, job, view), view.width, view.half_life)
    return [{"job_id": job_at(row["step"]), **row} for row in buckets if row["step"] >= view.begin]


def lineage_aggregates(session: Session, job: JobRow, view: rollups.RollupView) -> Iterator[Aggregate]:
    """Yield the joined curve from its first step to the view's end, see `rollups.aggregates`."""
    for _, found in by_job(segments(job)):
        yield from _ancestor_aggregates(session, found, view)
    yield from rollups.aggregates(session, job, view)


def _ancestor_aggregates(
    session: Session, found: list[LineageSegment], view: rollups.RollupView
) -> Iterator[Aggregate]:
    # From the rollups if the ancestor's curve is still the one that led to the fork, else from its points.
    end = found[-1].until
    until = end if view.until_step is None else min(end, view.until_step)
    part = replace(view, until_step=until)
    job = session.scalar(select(JobRow).where(JobRow.id == found[0].job_id))
    if job is not None and rollups.can_use_rollups(part) and own_segments(session, job, end) == found:
        yield from rollups.aggregates(session, job, part)
        return
    for segment in found:
        last = segment.after
        columns = (MetricRow.step, MetricRow.loss, MetricRow.attempt)
        for row in session.execute(_select_points(segment, segment.after, columns).execution_options(yield_per=5000)):
            if last < row.step <= until:
                last = row.step
                yield aggregate_of(*row)


def show_lineage(session: Session, job: JobRow) -> list[dict[str, Any]]:
    """Return each job of the joined curve with its last step, oldest first; ``deleted`` jobs have no points left."""
    ancestors = by_job(segments(job))
    existing = set(session.scalars(select(JobRow.id).where(JobRow.id.in_([job_id for job_id, _ in ancestors]))))
    before = [
        {"job_id": job_id, "until_step": found[-1].until, "deleted": job_id not in existing}
        for job_id, found in ancestors
    ]
    return [*before, {"job_id": job.id, "until_step": None, "deleted": False}]
