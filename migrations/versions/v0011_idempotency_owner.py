"""An idempotency key belongs to the caller that used it. Keys of 0.1 belong to the submitter of their job."""

import sqlalchemy as sa
from alembic import op

revision = "0011"
down_revision = "0010"
branch_labels = None
depends_on = None


def upgrade() -> None:
    owner = sa.Column("owner", sa.String(length=64), nullable=False, server_default="local")
    op.add_column("idempotency_keys", owner)
    op.execute(
        "UPDATE idempotency_keys SET owner = COALESCE("
        "(SELECT jobs.submitted_by FROM jobs WHERE jobs.id = idempotency_keys.job_id), 'local')"
    )
    _primary_key("key", "owner")


def downgrade() -> None:
    # 0.1 has one key for all callers: the first to use it keeps it.
    op.execute(
        "DELETE FROM idempotency_keys WHERE EXISTS (SELECT 1 FROM idempotency_keys AS other WHERE "
        "other.key = idempotency_keys.key AND "
        "(other.created_at, other.owner) < (idempotency_keys.created_at, idempotency_keys.owner))"
    )
    _primary_key("key")
    op.drop_column("idempotency_keys", "owner")


def _primary_key(*columns: str) -> None:
    name = op.f("pk_idempotency_keys")
    with op.batch_alter_table("idempotency_keys") as table:
        table.drop_constraint(name, type_="primary")
        table.create_primary_key(name, list(columns))
