"""The lease of the service that schedules."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

whole = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def upgrade() -> None:
    op.create_table(
        "leader",
        sa.Column("id", whole, autoincrement=False, nullable=False),
        sa.Column("epoch", whole, nullable=False),
        sa.Column("beat", whole, nullable=False),
        sa.Column("holder", sa.Text(), nullable=True),
        sa.PrimaryKeyConstraint("id", name="pk_leader"),
    )


def downgrade() -> None:
    op.drop_table("leader")
