"""Scores on tasks: during training, and of checkpoints on request."""

import sqlalchemy as sa
from alembic import op

revision = "0017"
down_revision = "0016"
branch_labels = None
depends_on = None

whole = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
instant = sa.DateTime(timezone=True)


def upgrade() -> None:
    op.create_table(
        "evaluations",
        sa.Column("number", whole, autoincrement=True, nullable=False),
        sa.Column("job_id", sa.String(length=40), nullable=False),
        sa.Column("attempt", whole, nullable=True),
        sa.Column("evaluation_id", sa.String(length=40), nullable=True),
        sa.Column("step", whole, nullable=False),
        sa.Column("task", sa.String(length=64), nullable=False),
        sa.Column("kind", sa.String(length=20), nullable=False),
        sa.Column("path", sa.Text(), nullable=True),
        sa.Column("file_sha256", sa.String(length=64), nullable=True),
        sa.Column("state", sa.String(length=20), nullable=False),
        sa.Column("stitched", sa.Boolean(), nullable=False),
        sa.Column("examples", whole, nullable=True),
        sa.Column("truncated", whole, nullable=True),
        sa.Column("acc", sa.Float(53), nullable=True),
        sa.Column("acc_norm", sa.Float(53), nullable=True),
        sa.Column("bpb", sa.Float(53), nullable=True),
        sa.Column("seconds", sa.Float(53), nullable=True),
        sa.Column("device", sa.String(length=20), nullable=True),
        sa.Column("error", sa.Text(), nullable=True),
        sa.Column("requested_by", sa.String(length=64), nullable=True),
        sa.Column("created_at", instant, nullable=False),
        sa.Column("started_at", instant, nullable=True),
        sa.Column("finished_at", instant, nullable=True),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], name=op.f("fk_evaluations_job_id_jobs"), ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("number", name=op.f("pk_evaluations")),
    )
    op.create_index("ix_evaluations_job_id", "evaluations", ["job_id", "step", "task", "number"])
    op.create_index("ix_evaluations_evaluation_id", "evaluations", ["evaluation_id"])
    op.create_index("ix_evaluations_state", "evaluations", ["state"])


def downgrade() -> None:
    op.drop_table("evaluations")
