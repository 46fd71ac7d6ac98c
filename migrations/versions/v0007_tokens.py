"""Named tokens, and the principals that submitted and queued a job."""

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None

whole = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
moment = sa.DateTime(timezone=True)


def upgrade() -> None:
    op.create_table(
        "tokens",
        sa.Column("id", sa.String(length=40), nullable=False),
        sa.Column("name", sa.String(length=64), nullable=False),
        sa.Column("scope", sa.String(length=20), nullable=False),
        sa.Column("sha256", sa.String(length=64), nullable=False),
        sa.Column("previous_sha256", sa.String(length=64), nullable=True),
        sa.Column("previous_until", moment, nullable=True),
        sa.Column("max_jobs", whole, nullable=True),
        sa.Column("max_devices", whole, nullable=True),
        sa.Column("created_by", sa.String(length=64), nullable=False),
        sa.Column("created_at", moment, nullable=False),
        sa.Column("rotated_at", moment, nullable=True),
        sa.Column("expires_at", moment, nullable=True),
        sa.Column("revoked_at", moment, nullable=True),
        sa.Column("last_used_at", moment, nullable=True),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_tokens")),
        sa.UniqueConstraint("name", name=op.f("uq_tokens_name")),
    )
    op.add_column("jobs", sa.Column("submitted_by", sa.String(length=64), nullable=True))
    op.add_column("jobs", sa.Column("queued_by", sa.String(length=64), nullable=True))
    op.create_index("ix_jobs_queued_by", "jobs", ["queued_by", "status"], unique=False)
    _actor(64, 20)


def downgrade() -> None:
    # Names that are longer than the old column are cut: they are only shown to users.
    op.execute("UPDATE events SET actor = substr(actor, 1, 20)")
    _actor(20, 64)
    op.drop_index("ix_jobs_queued_by", table_name="jobs")
    op.drop_column("jobs", "queued_by")
    op.drop_column("jobs", "submitted_by")
    op.drop_table("tokens")


def _actor(length: int, before: int) -> None:
    with op.batch_alter_table("events") as events:
        events.alter_column(
            "actor", type_=sa.String(length=length), existing_type=sa.String(length=before), existing_nullable=False
        )
