"""The curve: stitched over attempts, by attempt, or in buckets."""

from collections.abc import Iterator, Sequence
from typing import Any

from sqlalchemy import ColumnElement, func, select
from sqlalchemy.orm import Session

from service.metrics.buckets import Point
from service.tables import MetricRow

FIELDS = (
    "step",
    "attempt",
    "epoch",
    "loss",
    "aux_loss",
    "learning_rate",
    "grad_norm",
    "tokens",
    "tokens_per_second",
    "mfu",
    "step_seconds",
    "data_seconds",
    "memory_bytes",
    "eval_loss",
    "nonfinite",
    "at",
)
ALWAYS = ("step", "attempt")


def rows(
    session: Session, job_id: str, attempt: int | None, after_step: int, limit: int, fields: Sequence[str]
) -> list[dict[str, Any]]:
    """At most ``limit`` points behind ``after_step``, oldest first, with the columns ``fields``.

    Without ``attempt`` each step stands once: what a later attempt went over again is left out.
    """
    columns = [getattr(MetricRow, name) for name in fields]
    query = select(*columns).where(*_curve(job_id, attempt), MetricRow.step > after_step)
    found = session.execute(query.order_by(MetricRow.step, MetricRow.seq).limit(limit)).all()
    return [dict(zip(fields, row, strict=True)) for row in found]


def last_step(session: Session, job_id: str, attempt: int | None) -> int:
    """The newest step of the curve, 0 where there is none."""
    return session.scalar(select(func.max(MetricRow.step)).where(*_curve(job_id, attempt))) or 0


def points(session: Session, job_id: str, attempt: int | None) -> Iterator[Point]:
    """Every point, streamed: memory stays flat however long the run is."""
    query = select(MetricRow.step, MetricRow.loss, MetricRow.attempt).where(*_curve(job_id, attempt))
    for row in session.execute(query.order_by(MetricRow.step, MetricRow.seq).execution_options(yield_per=5000)):
        yield Point(row.step, row.loss, row.attempt)


def _curve(job_id: str, attempt: int | None) -> tuple[ColumnElement[bool], ...]:
    which = MetricRow.stitched.is_(True) if attempt is None else MetricRow.attempt == attempt
    return MetricRow.job_id == job_id, which
