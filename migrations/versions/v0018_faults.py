"""Per-rank step times of a metric point, and XID errors of GPUs."""

import sqlalchemy as sa
from alembic import op

revision = "0018"
down_revision = "0017"
branch_labels = None
depends_on = None

whole = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
instant = sa.DateTime(timezone=True)


def upgrade() -> None:
    op.add_column("metrics", sa.Column("step_seconds_max_rank", whole, nullable=True))
    op.add_column("metrics", sa.Column("step_seconds_spread", sa.Float(precision=53), nullable=True))
    op.create_table(
        "xid_errors",
        sa.Column("id", whole, autoincrement=True, nullable=False),
        sa.Column("gpu_uuid", sa.String(length=80), nullable=False),
        sa.Column("xid", whole, nullable=False),
        sa.Column("at", instant, nullable=False),
        sa.Column("cleared_at", instant, nullable=True),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_xid_errors")),
    )
    op.create_index("ix_xid_errors_at", "xid_errors", ["at"])


def downgrade() -> None:
    op.drop_table("xid_errors")
    op.drop_column("metrics", "step_seconds_spread")
    op.drop_column("metrics", "step_seconds_max_rank")
