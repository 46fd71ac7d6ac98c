"""Rollups of long curves; an index of idempotency keys by age."""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None

whole = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
real = sa.Float(precision=53)


def upgrade() -> None:
    op.add_column("jobs", sa.Column("sealed_step", whole, nullable=False, server_default="0"))
    op.create_index(op.f("ix_idempotency_keys_created_at"), "idempotency_keys", ["created_at"], unique=False)
    op.create_table(
        "metric_stretches",
        sa.Column("job_id", sa.String(length=40), nullable=False),
        sa.Column("width", whole, autoincrement=False, nullable=False),
        sa.Column("bucket", whole, autoincrement=False, nullable=False),
        sa.Column("first_step", whole, nullable=False),
        sa.Column("step", whole, nullable=False),
        sa.Column("attempt", whole, nullable=False),
        sa.Column("count", whole, nullable=False),
        sa.Column("nonfinite", whole, nullable=False),
        sa.Column("loss", real, nullable=True),
        sa.Column("loss_sum", real, nullable=False),
        sa.Column("loss_min", real, nullable=True),
        sa.Column("loss_max", real, nullable=True),
        sa.Column("finite_step", whole, nullable=True),
        *(sa.Column(f"total_{kept}", real, nullable=False) for kept in (10, 50, 200, 1000)),
        *(sa.Column(f"weight_{kept}", real, nullable=False) for kept in (10, 50, 200, 1000)),
        sa.ForeignKeyConstraint(
            ["job_id"], ["jobs.id"], name=op.f("fk_metric_stretches_job_id_jobs"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("job_id", "width", "bucket", name=op.f("pk_metric_stretches")),
    )


def downgrade() -> None:
    op.drop_table("metric_stretches")
    op.drop_index(op.f("ix_idempotency_keys_created_at"), table_name="idempotency_keys")
    op.drop_column("jobs", "sealed_step")
