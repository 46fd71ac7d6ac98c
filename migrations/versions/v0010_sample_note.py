"""What was cut of a sample's prompt."""

import sqlalchemy as sa
from alembic import op

revision = "0010"
down_revision = "0009"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("samples", sa.Column("note", sa.Text(), nullable=True))


def downgrade() -> None:
    op.drop_column("samples", "note")
