"""The step that a job is to resume from; the expert load of a point of the curve."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

whole = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def upgrade() -> None:
    op.add_column("jobs", sa.Column("resume_step", whole, nullable=True))
    op.add_column("metrics", sa.Column("expert_load", sa.JSON(none_as_null=True), nullable=True))


def downgrade() -> None:
    op.drop_column("metrics", "expert_load")
    op.drop_column("jobs", "resume_step")
