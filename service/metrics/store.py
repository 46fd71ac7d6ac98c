"""Read the metrics of a job: stitched over its attempts, or of one attempt."""

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from datetime import datetime
from itertools import islice
from operator import itemgetter
from typing import Any

from sqlalchemy import BigInteger, ColumnElement, column, func, or_, select, tuple_
from sqlalchemy import values as value_rows
from sqlalchemy.orm import Session

from trainyard.contract.events import MetricEvent
from trainyard.service.db.models import AttemptRow, MetricRow
from trainyard.service.metrics.downsampling import Aggregate, aggregate_of, sum_of

FIELDS = (
    "step",
    "attempt",
    *(name for name in MetricEvent.model_fields if name not in ("kind", "seq", "at", "step")),
    "at",
)
ALWAYS = ("step", "attempt")
EVALUATION_FIELDS = ("eval_loss", "eval_bpb", "eval")
MAX_NONFINITE_STEPS = 1000
"""Steps in one query's IN list."""


def rows(
    session: Session,
    job_id: str,
    attempt: int | None,
    after_step: int,
    limit: int,
    fields: Sequence[str],
    until_step: int | None = None,
) -> list[dict[str, Any]]:
    """Return at most ``limit`` points after ``after_step``, up to ``until_step``, oldest first, with ``fields``.

    ``attempt`` None: the stitched curve, in which each step is the newest attempt's.
    """
    columns = [getattr(MetricRow, name) for name in fields]
    query = select(*columns).where(*_curve(job_id, attempt), MetricRow.step > after_step)
    if until_step is not None:
        query = query.where(MetricRow.step <= until_step)
    found = session.execute(query.order_by(MetricRow.step, MetricRow.seq).limit(limit)).all()
    return [dict(zip(fields, row, strict=True)) for row in found]


def newest_cursor(session: Session, job_id: str) -> tuple[int, int]:
    """Return (attempt, seq) of the newest point, or (0, 0) if there is none."""
    order = (MetricRow.attempt.desc(), MetricRow.seq.desc())
    query = select(MetricRow.attempt, MetricRow.seq).where(MetricRow.job_id == job_id).order_by(*order).limit(1)
    row = session.execute(query).first()
    return (row.attempt, row.seq) if row is not None else (0, 0)


def rows_after(
    session: Session,
    job_id: str,
    cursor: tuple[int, int],
    limit: int,
    past: tuple[int, int] = (0, 0),
    after_step: int = 0,
) -> list[dict[str, Any]]:
    """Return points of the stitched curve after ``cursor``, an (attempt, seq), in that order, with times as text.

    Of the points up to the cursor ``past``, only those after ``after_step`` are returned.
    """
    reported = tuple_(MetricRow.attempt, MetricRow.seq)
    names = ("seq", *FIELDS)
    query = select(*(getattr(MetricRow, name) for name in names)).where(
        MetricRow.job_id == job_id,
        MetricRow.stitched.is_(True),
        reported > tuple_(*cursor),
        or_(MetricRow.step > after_step, reported > tuple_(*past)),
    )
    found = session.execute(query.order_by(MetricRow.attempt, MetricRow.seq).limit(limit)).all()
    return [with_time_as_text(dict(zip(names, row, strict=True))) for row in found]


def with_time_as_text(row: dict[str, Any]) -> dict[str, Any]:
    """Format the row's time as the API does, in place, and return the row."""
    if isinstance(row.get("at"), datetime):
        row["at"] = row["at"].isoformat().replace("+00:00", "Z")
    return row


def last_step(session: Session, job_id: str, attempt: int | None) -> int:
    """Return the last step of the curve, or 0 if it is empty."""
    return session.scalar(select(func.max(MetricRow.step)).where(*_curve(job_id, attempt))) or 0


def points(
    session: Session, job_id: str, attempt: int | None, until_step: int | None = None, first_step: int = 0
) -> Iterator[Aggregate]:
    """Yield every point of ``first_step`` to ``until_step``, streamed: memory stays flat however long the run is."""
    query = select(MetricRow.step, MetricRow.loss, MetricRow.attempt).where(*_curve(job_id, attempt))
    if first_step:
        query = query.where(MetricRow.step >= first_step)
    if until_step is not None:
        query = query.where(MetricRow.step <= until_step)
    in_order = query.order_by(MetricRow.step, MetricRow.seq)
    # By the connection: the session would process each of millions of rows once more.
    for row in session.connection().execute(in_order, execution_options={"yield_per": 5000}):
        yield aggregate_of(*row)


def sums(session: Session, job_id: str, ranges: Sequence[tuple[int, int]], width: int) -> Iterator[Aggregate]:
    """Yield the sums of the finite points of each ``width`` steps within ``ranges`` (first and last step), in order.

    The database adds them up: millions of points would be slow to read.
    """
    bounds = value_rows(column("first", BigInteger), column("last", BigInteger), name="bounds").data([*ranges]).cte()
    found = MetricRow.loss.is_not(None)
    query = (
        select(func.min(MetricRow.step), func.max(MetricRow.step), func.count(), func.sum(MetricRow.loss))
        .join_from(bounds, MetricRow, MetricRow.step.between(bounds.c.first, bounds.c.last))
        .where(*_curve(job_id, None), found)
        .group_by(MetricRow.step // width)
        .order_by(func.min(MetricRow.step))
    )
    for first, last, count, total in session.connection().execute(query, execution_options={"yield_per": 5000}):
        yield sum_of(first, last, count, total or 0.0)


def add_last(session: Session, job_id: str, buckets: list[dict[str, Any]], fields: Sequence[str]) -> None:
    """Add ``fields`` of its last point to each bucket, except those that the bucket has already.

    The fields are None if that point was removed when the curve was thinned. The queries are per attempt, and are
    sorted here: with ORDER BY, SQLite does not use the index on (job, attempt, step) and reads the whole curve.
    """
    extra = [name for name in fields if name not in ("step", "attempt", "loss")]
    columns = [getattr(MetricRow, name) for name in ("seq", "step", *extra)]
    by_attempt: dict[int, dict[int, dict[str, Any]]] = {}
    for row in buckets:
        by_attempt.setdefault(row["attempt"], {})[row["step"]] = row
        for name in extra:
            row.setdefault(name, None)
    for attempt, named in by_attempt.items():
        for some in _batched(named, MAX_NONFINITE_STEPS):
            of_job = (MetricRow.job_id == job_id, MetricRow.attempt == attempt, MetricRow.step.in_(some))
            for _, step, *values in sorted(session.execute(select(*columns).where(*of_job)), key=itemgetter(0)):
                named[step].update(zip(extra, values, strict=True))


def _batched(steps: Iterable[int], size: int) -> Iterator[list[int]]:
    rest = iter(steps)
    while batch := list(islice(rest, size)):
        yield batch


def add_evaluations(
    session: Session,
    job_id: str,
    attempt: int | None,
    buckets: list[dict[str, Any]],
    fields: Sequence[str],
    every: int | None,
) -> None:
    """Add its last evaluation to each bucket whose last point has none.

    ``buckets`` are in the order of their steps. ``fields``: those of EVALUATION_FIELDS that the buckets have. A run is
    evaluated each ``every`` steps, and at the end of an attempt. If the interval has changed, ``every`` is None, and
    all points are searched.
    """
    due = [row for row in buckets if all(row[name] is None for name in fields)]
    if not due:
        return
    columns = [getattr(MetricRow, name) for name in fields]
    query = select(MetricRow.step, *columns).where(*_curve(job_id, attempt)).order_by(MetricRow.step, MetricRow.seq)
    if every is None:
        found = or_(*(evaluated.is_not(None) for evaluated in columns))
        queries = [query.where(found, MetricRow.step.between(due[0]["first_step"], due[-1]["step"]))]
    else:
        ends = session.scalars(select(AttemptRow.end_step).where(AttemptRow.job_id == job_id)).all()
        steps = {row["step"] // every * every for row in due} | {end for end in ends if end is not None}
        queries = [query.where(MetricRow.step.in_(some)) for some in _batched(sorted(steps), MAX_NONFINITE_STEPS)]
    first_steps = [row["first_step"] for row in due]
    for part in queries:
        for step, *values in session.execute(part):
            row = due[max(0, bisect_right(first_steps, step) - 1)]
            if row["first_step"] <= step <= row["step"] and any(value is not None for value in values):
                row.update(zip(fields, values, strict=True))


def _curve(job_id: str, attempt: int | None) -> tuple[ColumnElement[bool], ...]:
    which = MetricRow.stitched.is_(True) if attempt is None else MetricRow.attempt == attempt
    return MetricRow.job_id == job_id, which
