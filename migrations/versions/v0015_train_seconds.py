"""The active training time of all attempts at each point of a curve. Points of 0.1 have none."""

import sqlalchemy as sa
from alembic import op

revision = "0015"
down_revision = "0014"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("metrics", sa.Column("train_seconds", sa.Float(53), nullable=True))


def downgrade() -> None:
    op.drop_column("metrics", "train_seconds")
