"""Long curves are summed up as they grow, so that a million points are read in a moment.

What lies before a job's ``sealed_step`` is summed up in stretches of each width of LEVELS, aligned at multiples of the
width. Stretches never change; where the curve itself does, they are removed and made again.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from sqlalchemy import ColumnElement, delete, insert, select
from sqlalchemy.orm import Session

from trainyard.service.db.models import JobRow, MetricRollupRow, MetricRow
from trainyard.service.metrics import store
from trainyard.service.metrics.downsampling import (
    HALF_LIVES,
    Aggregate,
    RollupBucket,
    aggregate,
)

LEVELS = (64, 1024, 16_384, 262_144, 4_194_304)
FINEST = LEVELS[0]
ROLLUP_EVERY = 1024
"""Steps that may be unsealed before they are looked at: a batch with one point then costs nothing."""

MAX_POINTS = 20_000
"""Points that one look sums up: the transaction stays short."""

COLUMNS = (
    "first_step", "step", "attempt", "count", "nonfinite", "loss", "loss_sum", "loss_min", "loss_max", "finite_step",
)  # fmt: skip


def roll_up(session: Session, job: JobRow, newest_step: int) -> None:
    """Sum up what has become complete below ``newest_step``, the newest of the curve."""
    while newest_step + 1 - job.sealed_step >= ROLLUP_EVERY:
        query = select(MetricRow.step, MetricRow.loss, MetricRow.attempt).where(
            MetricRow.job_id == job.id, MetricRow.stitched.is_(True), MetricRow.step >= job.sealed_step
        )
        found = session.execute(query.order_by(MetricRow.step, MetricRow.seq).limit(MAX_POINTS)).all()
        reached = newest_step + 1 if len(found) < MAX_POINTS else found[-1].step
        end = reached // FINEST * FINEST
        if end <= job.sealed_step:
            return
        points = (RollupBucket.of(*row) for row in found if row.step < end)
        _store(session, job, FINEST, aggregate(points, FINEST))
        for below, level in pairwise(LEVELS):
            begun, done = job.sealed_step // level * level, end // level * level
            _store(session, job, level, aggregate(_read_buckets(session, job.id, below, begun, done), level))
        job.sealed_step = end


def invalidate(session: Session, job: JobRow, step: int) -> None:
    """The curve changes from ``step`` on."""
    if step >= job.sealed_step:
        return
    job.sealed_step = step // FINEST * FINEST
    behind = (MetricRollupRow.bucket + 1) * MetricRollupRow.width > job.sealed_step
    session.execute(delete(MetricRollupRow).where(MetricRollupRow.job_id == job.id, behind))


@dataclass(frozen=True)
class RollupView:
    """Rows ``wide`` steps wide, from ``begin``, a multiple of that, up to ``until_step``; None: to the end."""

    width: int
    half_life: float
    begin: int = 0
    until_step: int | None = None


def can_use_rollups(view: RollupView) -> bool:
    """Whether such rows can be made of what is summed up: wide ones, or narrow ones far behind the beginning."""
    return max(view.width, view.begin) >= FINEST and view.half_life in HALF_LIVES


def aggregates(session: Session, job: JobRow, view: RollupView) -> Iterator[Aggregate]:
    """The curve up to the view's end: what lies before it in the widest stretches, then in none wider than its rows."""
    begin = 0
    if can_use_rollups(view):
        sealed = job.sealed_step if view.until_step is None else min(job.sealed_step, view.until_step + 1)
        for wanted, target in ((LEVELS[-1], min(view.begin, sealed)), (view.width, sealed)):
            for level in reversed([level for level in LEVELS if level <= wanted]):
                end = target // level * level
                if end > begin:
                    yield from _read_aggregates(session, job.id, level, begin, end, view.half_life)
                    begin = end
    yield from store.points(session, job.id, None, view.until_step, begin)


def _read_aggregates(
    session: Session, job_id: str, level: int, begin: int, end: int, half_life: float
) -> Iterator[Aggregate]:
    names = (*COLUMNS, f"total_{int(half_life)}", f"weight_{int(half_life)}")
    query = select(*(getattr(MetricRollupRow, name) for name in names)).where(*_where(job_id, level, begin, end))
    for row in session.execute(query.order_by(MetricRollupRow.bucket)):
        yield Aggregate(*row)


def _read_buckets(session: Session, job_id: str, level: int, begin: int, end: int) -> Iterator[RollupBucket]:
    names = (*COLUMNS, *(f"total_{kept}" for kept in HALF_LIVES), *(f"weight_{kept}" for kept in HALF_LIVES))
    query = select(*(getattr(MetricRollupRow, name) for name in names)).where(*_where(job_id, level, begin, end))
    sums = len(COLUMNS) + len(HALF_LIVES)
    for row in session.execute(query.order_by(MetricRollupRow.bucket)).all():
        values: list[Any] = list(row)
        yield RollupBucket(*values[: len(COLUMNS)], values[len(COLUMNS) : sums], values[sums:])  # type: ignore[call-arg] # counted


def _where(job_id: str, level: int, begin: int, end: int) -> tuple[ColumnElement[bool], ...]:
    buckets = (MetricRollupRow.bucket >= begin // level, MetricRollupRow.bucket < end // level)
    return (MetricRollupRow.job_id == job_id, MetricRollupRow.width == level, *buckets)


def _store(session: Session, job: JobRow, level: int, stretches: list[RollupBucket]) -> None:
    if not stretches:
        return
    rows = [
        {
            "job_id": job.id,
            "width": level,
            "bucket": stretch.step // level,
            **{name: getattr(stretch, name) for name in COLUMNS},
            **{f"total_{kept}": total for kept, total in zip(HALF_LIVES, stretch.totals, strict=True)},
            **{f"weight_{kept}": weight for kept, weight in zip(HALF_LIVES, stretch.weights, strict=True)},
        }
        for stretch in stretches
    ]
    session.execute(insert(MetricRollupRow), rows)
