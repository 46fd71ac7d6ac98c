"""Leases of side processes: a device that no attempt has, but a service that generates text or evaluates."""

import sqlalchemy as sa
from alembic import op

revision = "0016"
down_revision = "0015"
branch_labels = None
depends_on = None


def upgrade() -> None:
    with op.batch_alter_table("leases") as batch:
        batch.alter_column("attempt_id", existing_type=sa.String(length=40), nullable=True)
        batch.alter_column("job_id", existing_type=sa.String(length=40), nullable=True)
        batch.add_column(sa.Column("sidecar", sa.Text(), nullable=True))


def downgrade() -> None:
    op.execute("DELETE FROM leases WHERE attempt_id IS NULL")
    with op.batch_alter_table("leases") as batch:
        batch.drop_column("sidecar")
        batch.alter_column("job_id", existing_type=sa.String(length=40), nullable=False)
        batch.alter_column("attempt_id", existing_type=sa.String(length=40), nullable=False)
