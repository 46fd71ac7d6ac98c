"""Roll up long curves as they grow, so that reading a curve of a million points stays fast.

The points before a job's ``sealed_step`` are rolled up into buckets of each width in LEVELS, aligned at multiples of
the width. A bucket is never updated: if the curve itself changes, it is deleted and made again.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from sqlalchemy import Result, delete, func, insert, select
from sqlalchemy.orm import Session

from trainyard.service.db.models import JobRow, MetricRollupRow, MetricRow
from trainyard.service.metrics import store
from trainyard.service.metrics.downsampling import HALF_LIVES, Aggregate, RollupBucket, aggregate, sum_of

LEVELS = (64, 1024, 16_384, 262_144, 4_194_304)
FINEST = LEVELS[0]
ROLLUP_EVERY = 1024
"""Steps that may be left to roll up: most reports then need no query."""

MAX_POINTS = 20_000
"""Points that one query reads, to bound memory."""

COLUMNS = (
    "first_step", "step", "attempt", "count", "nonfinite", "loss", "loss_sum", "loss_min", "loss_max", "finite_step",
)  # fmt: skip


def roll_up(session: Session, job: JobRow, newest_step: int) -> None:
    """Roll up the buckets that are complete, and advance ``sealed_step``. ``newest_step``: the last of the curve."""
    while newest_step + 1 - job.sealed_step >= ROLLUP_EVERY:
        query = select(MetricRow.step, MetricRow.loss, MetricRow.attempt).where(
            MetricRow.job_id == job.id, MetricRow.stitched.is_(True), MetricRow.step >= job.sealed_step
        )
        points = session.execute(query.order_by(MetricRow.step, MetricRow.seq).limit(MAX_POINTS)).all()
        complete = newest_step + 1 if len(points) < MAX_POINTS else points[-1].step
        end = complete // FINEST * FINEST
        if end <= job.sealed_step:
            return
        _store(session, job, FINEST, aggregate((RollupBucket.of(*row) for row in points if row.step < end), FINEST))
        for finer, level in pairwise(LEVELS):
            level_begin, level_end = job.sealed_step // level * level, end // level * level
            _store(session, job, level, aggregate(_read_buckets(session, job.id, finer, level_begin, level_end), level))
        job.sealed_step = end


def invalidate(session: Session, job: JobRow, step: int) -> None:
    """Delete the buckets that include ``step`` or later ones, because the curve changes there."""
    if step >= job.sealed_step:
        return
    job.sealed_step = step // FINEST * FINEST
    outdated = (MetricRollupRow.bucket + 1) * MetricRollupRow.width > job.sealed_step
    session.execute(delete(MetricRollupRow).where(MetricRollupRow.job_id == job.id, outdated))


@dataclass(frozen=True)
class RollupView:
    """Buckets of ``width`` steps from ``begin``, a multiple of it, to ``until_step`` inclusive; None: to the end."""

    width: int
    half_life: float
    begin: int = 0
    until_step: int | None = None


def can_use_rollups(view: RollupView) -> bool:
    """Return True if the rollups help: for wide buckets, or for the EMA before narrow ones that begin late."""
    return max(view.width, view.begin) >= FINEST and view.half_life in HALF_LIVES


def aggregates(session: Session, job: JobRow, view: RollupView) -> Iterator[Aggregate]:
    """Yield the curve from step 0 to the view's end, as few aggregates as possible.

    Before the view begins only the EMA counts, so the widest rollups do; from there none is wider than ``view.width``.
    """
    begin = 0
    if can_use_rollups(view):
        sealed = job.sealed_step if view.until_step is None else min(job.sealed_step, view.until_step + 1)
        for max_width, target in ((LEVELS[-1], min(view.begin, sealed)), (view.width, sealed)):
            for level in reversed([level for level in LEVELS if level <= max_width]):
                end = target // level * level
                if end > begin:
                    rows = _read_rows(session, job.id, level, begin, end, (view.half_life,))
                    yield from map(Aggregate._make, rows)
                    begin = end
    yield from store.points(session, job.id, None, view.until_step, begin)


def sums(session: Session, job: JobRow, width: int, first_step: int, last_step: int) -> Iterator[Aggregate]:
    """Yield the sums of the finite points of the steps given, in order, each over at most ``width`` steps.

    ``width`` is a power of two, at least FINEST, and ``first_step`` a multiple of it. The database adds the rollups
    up, and reads few of their columns: smoothing needs no running mean.
    """
    row, begin, sealed = MetricRollupRow, first_step, min(job.sealed_step, last_step + 1)
    for level in reversed([level for level in LEVELS if level <= width]):
        end = sealed // level * level
        if end <= begin:
            continue
        buckets = (row.job_id == job.id, row.width == level, row.bucket >= begin // level, row.bucket < end // level)
        query = (
            select(
                func.min(row.first_step),
                func.max(row.finite_step),
                func.sum(row.count - row.nonfinite),
                func.sum(row.loss_sum),
            )
            .where(*buckets, row.finite_step.is_not(None))
            .group_by(row.bucket // (width // level))
            .order_by(func.min(row.bucket))
        )
        for first, last, count, total in session.connection().execute(query):
            yield sum_of(first, last or 0, count, total)
        begin = end
    yield from store.points(session, job.id, None, last_step, begin)


def _read_buckets(session: Session, job_id: str, level: int, begin: int, end: int) -> Iterator[RollupBucket]:
    sums = len(COLUMNS) + len(HALF_LIVES)
    for row in _read_rows(session, job_id, level, begin, end, HALF_LIVES).all():
        values: list[Any] = list(row)
        yield RollupBucket(*values[: len(COLUMNS)], values[len(COLUMNS) : sums], values[sums:])  # type: ignore[call-arg] # *values: mypy cannot count


def _read_rows(
    session: Session, job_id: str, level: int, begin: int, end: int, half_lives: Sequence[float]
) -> Result[Any]:
    """Return COLUMNS, the totals and the weights of the level's buckets, in step order."""
    row = MetricRollupRow
    names = (*COLUMNS, *(f"total_{int(h)}" for h in half_lives), *(f"weight_{int(h)}" for h in half_lives))
    buckets = (row.job_id == job_id, row.width == level, row.bucket >= begin // level, row.bucket < end // level)
    return session.execute(select(*(getattr(row, name) for name in names)).where(*buckets).order_by(row.bucket))


def _store(session: Session, job: JobRow, level: int, buckets: list[RollupBucket]) -> None:
    if not buckets:
        return
    rows = [
        {
            "job_id": job.id,
            "width": level,
            "bucket": bucket.step // level,
            **{name: getattr(bucket, name) for name in COLUMNS},
            **{f"total_{h}": total for h, total in zip(HALF_LIVES, bucket.totals, strict=True)},
            **{f"weight_{h}": weight for h, weight in zip(HALF_LIVES, bucket.weights, strict=True)},
        }
        for bucket in buckets
    ]
    session.execute(insert(MetricRollupRow), rows)
