"""What ranks jobs: description, group, score and the mark of discarded ones. Runs of 0.1 get their score."""

import math

import sqlalchemy as sa
from alembic import op

revision = "0012"
down_revision = "0011"
branch_labels = None
depends_on = None

HALF_LIFE = 50.0
SMOOTHED_STEPS = 1000
"""Points further back have less than a millionth of the weight."""

INDEXES = {
    "ix_jobs_discarded": ["discarded", "number"],
    "ix_jobs_discarded_score": ["discarded", "score", "number"],
    "ix_jobs_group_name": ["group_name", "discarded", "number"],
    "ix_jobs_group_name_score": ["group_name", "discarded", "score", "number"],
}


def upgrade() -> None:
    op.add_column("jobs", sa.Column("description", sa.Text(), nullable=False, server_default=""))
    op.add_column("jobs", sa.Column("group_name", sa.String(length=200), nullable=True))
    op.add_column("jobs", sa.Column("discarded", sa.Boolean(), nullable=False, server_default=sa.false()))
    op.add_column("jobs", sa.Column("score", sa.Float(53), nullable=True))
    op.add_column("jobs", sa.Column("score_metric", sa.String(length=20), nullable=True))
    op.add_column("jobs", sa.Column("score_step", sa.BigInteger().with_variant(sa.Integer, "sqlite"), nullable=True))
    _score_jobs(op.get_bind())
    for name, columns in INDEXES.items():
        op.create_index(name, "jobs", columns)


def downgrade() -> None:
    for name in INDEXES:
        op.drop_index(name, table_name="jobs")
    for column in ("score_step", "score_metric", "score", "discarded", "group_name", "description"):
        op.drop_column("jobs", column)


def _score_jobs(connection: sa.Connection) -> None:
    metrics = sa.table("metrics", *map(sa.column, ("job_id", "step", "loss", "eval_loss", "stitched")))
    jobs = sa.table("jobs", *map(sa.column, ("id", "score", "score_metric", "score_step")))
    newest = connection.execute(
        sa.select(metrics.c.job_id, sa.func.max(metrics.c.step)).where(metrics.c.stitched).group_by(metrics.c.job_id)
    ).all()
    for job_id, last in newest:
        curve = (metrics.c.job_id == job_id, metrics.c.stitched)
        best = sa.select(metrics.c.eval_loss, metrics.c.step).where(*curve, metrics.c.eval_loss.is_not(None))
        row = connection.execute(best.order_by(metrics.c.eval_loss, metrics.c.step).limit(1)).first()
        metric, value, step = ("eval_loss", *row) if row is not None else ("loss", None, None)
        if row is None:
            points = sa.select(metrics.c.step, metrics.c.loss).where(*curve, metrics.c.step > last - SMOOTHED_STEPS)
            finite = [(at, loss) for at, loss in connection.execute(points) if loss is not None and math.isfinite(loss)]
            if not finite:
                continue
            step = max(at for at, _ in finite)
            weights = [0.5 ** ((step - at) / HALF_LIFE) for at, _ in finite]
            value = math.fsum(w * loss for w, (_, loss) in zip(weights, finite, strict=True)) / math.fsum(weights)
        scored = {"score": value, "score_metric": metric, "score_step": step}
        connection.execute(sa.update(jobs).where(jobs.c.id == job_id).values(scored))
