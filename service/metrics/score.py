"""The score of a job, by which runs are ranked: a loss in nats per token, so less is better.

It is the best held-out loss (``eval_loss``), or the newest smoothed loss (``loss``) if nothing was evaluated. To rank
by another held-out metric, such as bits per byte, prefer it to ``eval_loss`` in `add_point` and in `compute_again`.
"""

import math

from sqlalchemy import select
from sqlalchemy.orm import Session

from trainyard.contract.events import MetricEvent
from trainyard.service.db.models import JobRow, MetricRow
from trainyard.service.metrics import rollups
from trainyard.service.metrics.downsampling import Ema
from trainyard.service.metrics.rollups import LEVELS, RollupView

HALF_LIFE = 50.0
"""Of the smoothed loss, in steps: that of the curve's default."""

SMOOTHED = "smoothed"
"""Key in ``JobRow.progress``: [total, weight, step] of the moving average."""


def add_point(job: JobRow, event: MetricEvent) -> None:
    """Update the score after the next point of the curve."""
    if event.eval_loss is not None and math.isfinite(event.eval_loss):
        _offer_evaluation(job, event.eval_loss, event.step)
    if event.loss is None or not math.isfinite(event.loss):
        return
    ema = Ema(HALF_LIFE, *job.progress.get(SMOOTHED, ()))
    ema.add(event.step, event.loss)
    _store_smoothed(job, ema)


def compute_again(session: Session, job: JobRow) -> None:
    """Compute the score from the stored curve, after steps were repeated or given up."""
    job.score = job.score_metric = job.score_step = None
    curve = (MetricRow.job_id == job.id, MetricRow.stitched.is_(True))
    best = select(MetricRow.eval_loss, MetricRow.step).where(*curve, MetricRow.eval_loss.is_not(None))
    row = session.execute(best.order_by(MetricRow.eval_loss, MetricRow.step).limit(1)).first()
    if row is not None:
        _offer_evaluation(job, row.eval_loss, row.step)
    ema = Ema(HALF_LIFE)
    for part in rollups.aggregates(session, job, RollupView(LEVELS[-1], HALF_LIFE)):
        if part.finite_step is not None:
            ema.add(part.finite_step, part.total, part.weight)
    if ema.weight:
        _store_smoothed(job, ema)
    else:
        job.progress = {name: value for name, value in job.progress.items() if name != SMOOTHED}


def _offer_evaluation(job: JobRow, loss: float, step: int) -> None:
    if job.score_metric != "eval_loss" or job.score is None or loss < job.score:
        job.score, job.score_metric, job.score_step = loss, "eval_loss", step


def _store_smoothed(job: JobRow, ema: Ema) -> None:
    job.progress = {**job.progress, SMOOTHED: [ema.total, ema.weight, ema.step]}
    if job.score_metric != "eval_loss":
        job.score, job.score_metric, job.score_step = ema.value, "loss", ema.step
