"""The launcher of an attempt, and its placement by the cluster."""

import sqlalchemy as sa
from alembic import op

revision = "0009"
down_revision = "0008"
branch_labels = None
depends_on = None


def upgrade() -> None:
    launcher = sa.Column("launcher", sa.String(length=20), nullable=False, server_default="local")
    op.add_column("attempts", launcher)
    op.add_column("attempts", sa.Column("placement", sa.JSON(none_as_null=True), nullable=True))


def downgrade() -> None:
    op.drop_column("attempts", "placement")
    op.drop_column("attempts", "launcher")
