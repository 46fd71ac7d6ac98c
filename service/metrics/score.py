"""The score of a job, by which runs are ranked: less is better.

It is the best of the held-out bits per byte (``bpb``), which can be compared between tokenizers. If there are none, it
is the best held-out loss (``eval_loss``), in nats per token, or the newest smoothed loss (``loss``) if nothing was
evaluated.
"""

import math

from sqlalchemy import select
from sqlalchemy.orm import Session

from trainyard.contract.events import MetricEvent
from trainyard.contract.smoothing import HALF_LIFE, Ema
from trainyard.service.db.models import JobRow, MetricRow
from trainyard.service.metrics import rollups
from trainyard.service.metrics.rollups import LEVELS, RollupView

EVALUATED = {"bpb": "eval_bpb", "eval_loss": "eval_loss"}
"""Metric of an evaluated score -> the field of a point that it is taken from. An earlier one is preferred."""

SMOOTHED = "smoothed"
"""Key in ``JobRow.progress``: [total, weight, step] of the moving average."""


def add_point(job: JobRow, event: MetricEvent) -> None:
    """Update the score after the next point of the curve."""
    for metric in EVALUATED:
        value = getattr(event, EVALUATED[metric])
        if value is not None and math.isfinite(value):
            _offer_evaluation(job, metric, value, event.step)
    if event.loss is None or not math.isfinite(event.loss):
        return
    ema = Ema.from_sums(job.progress.get(SMOOTHED, ()))
    ema.add(event.step, event.loss)
    _store_smoothed(job, ema)


def compute_again(session: Session, job: JobRow) -> None:
    """Compute the score from the stored curve, after steps were repeated or given up."""
    job.score = job.score_metric = job.score_step = None
    curve = (MetricRow.job_id == job.id, MetricRow.stitched.is_(True))
    for metric, name in EVALUATED.items():
        column = getattr(MetricRow, name)
        best = select(column, MetricRow.step).where(*curve, column.is_not(None))
        row = session.execute(best.order_by(column, MetricRow.step).limit(1)).first()
        if row is not None:
            _offer_evaluation(job, metric, row[0], row.step)
    ema = Ema(HALF_LIFE)
    for part in rollups.aggregates(session, job, RollupView(LEVELS[-1], HALF_LIFE)):
        if part.finite_step is not None:
            ema.add(part.finite_step, part.total, part.weight)
    if ema.weight:
        _store_smoothed(job, ema)
    else:
        job.progress = {name: value for name, value in job.progress.items() if name != SMOOTHED}


def _offer_evaluation(job: JobRow, metric: str, value: float, step: int) -> None:
    order = [*EVALUATED, "loss", None]
    current, offered = order.index(job.score_metric), order.index(metric)
    if offered < current or (offered == current and job.score is not None and value < job.score):
        job.score, job.score_metric, job.score_step = value, metric, step


def _store_smoothed(job: JobRow, ema: Ema) -> None:
    job.progress = {**job.progress, SMOOTHED: ema.sums}
    if job.score_metric not in EVALUATED:
        job.score, job.score_metric, job.score_step = ema.value, "loss", ema.step
