"""The job that another one is paused for; the devices that the scheduling service leases."""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("jobs", sa.Column("preempted_by", sa.String(length=40), nullable=True))
    op.add_column("leader", sa.Column("offer", sa.JSON(none_as_null=True), nullable=True))


def downgrade() -> None:
    op.drop_column("leader", "offer")
    op.drop_column("jobs", "preempted_by")
