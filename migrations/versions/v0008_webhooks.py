"""Webhooks, their deliveries, and the state of their rules."""

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None

whole = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
instant = sa.DateTime(timezone=True)
json = sa.JSON(none_as_null=True)


def upgrade() -> None:
    _webhooks()
    _deliveries()
    _watches()


def _webhooks() -> None:
    op.create_table(
        "webhooks",
        sa.Column("number", whole, autoincrement=True, nullable=False),
        sa.Column("id", sa.String(length=40), nullable=False),
        sa.Column("url", sa.Text(), nullable=False),
        sa.Column("description", sa.Text(), nullable=False),
        sa.Column("secret", sa.Text(), nullable=False),
        sa.Column("old_secret", sa.Text(), nullable=True),
        sa.Column("old_secret_until", instant, nullable=True),
        sa.Column("events", json, nullable=False),
        sa.Column("labels", json, nullable=False),
        sa.Column("job_id", sa.String(length=40), nullable=True),
        sa.Column("rules", json, nullable=False),
        sa.Column("rules_since", instant, nullable=False),
        sa.Column("enabled", sa.Boolean(), nullable=False),
        sa.Column("disabled_reason", sa.Text(), nullable=True),
        sa.Column("failures", whole, nullable=False),
        sa.Column("failing_since", instant, nullable=True),
        sa.Column("retry_at", instant, nullable=True),
        sa.Column("succeeded_at", instant, nullable=True),
        sa.Column("created_at", instant, nullable=False),
        sa.Column("updated_at", instant, nullable=False),
        sa.PrimaryKeyConstraint("number", name=op.f("pk_webhooks")),
        sa.UniqueConstraint("id", name=op.f("uq_webhooks_id")),
    )
    op.create_index("ix_webhooks_job_id", "webhooks", ["job_id"], unique=False)


def _deliveries() -> None:
    op.create_table(
        "webhook_deliveries",
        sa.Column("number", whole, autoincrement=True, nullable=False),
        sa.Column("webhook_id", sa.String(length=40), nullable=False),
        sa.Column("event_id", sa.String(length=60), nullable=False),
        sa.Column("kind", sa.String(length=60), nullable=False),
        sa.Column("job_id", sa.String(length=40), nullable=True),
        sa.Column("lane", sa.String(length=60), nullable=False),
        sa.Column("body", sa.Text(), nullable=False),
        sa.Column("state", sa.String(length=20), nullable=False),
        sa.Column("attempts", whole, nullable=False),
        sa.Column("tries", json, nullable=False),
        sa.Column("next_at", instant, nullable=True),
        sa.Column("claimed_by", sa.String(length=60), nullable=True),
        sa.Column("redelivers", whole, nullable=True),
        sa.Column("created_at", instant, nullable=False),
        sa.Column("ended_at", instant, nullable=True),
        sa.PrimaryKeyConstraint("number", name=op.f("pk_webhook_deliveries")),
    )
    table = "webhook_deliveries"
    op.create_index("ix_webhook_deliveries_open", table, ["state", "webhook_id", "lane", "number"], unique=False)
    op.create_index("ix_webhook_deliveries_log", table, ["webhook_id", "number"], unique=False)
    op.create_index("ix_webhook_deliveries_ended_at", table, ["ended_at"], unique=False)


def _watches() -> None:
    op.create_table(
        "webhook_watches",
        sa.Column("webhook_id", sa.String(length=40), nullable=False),
        sa.Column("job_id", sa.String(length=40), nullable=False),
        sa.Column("rule", sa.String(length=200), nullable=False),
        sa.Column("attempt", whole, nullable=False),
        sa.Column("seq", whole, nullable=False),
        sa.Column("seen", json, nullable=False),
        sa.Column("final", sa.Boolean(), nullable=False),
        sa.ForeignKeyConstraint(
            ["job_id"], ["jobs.id"], name=op.f("fk_webhook_watches_job_id_jobs"), ondelete="CASCADE"
        ),
        sa.ForeignKeyConstraint(
            ["webhook_id"], ["webhooks.id"], name=op.f("fk_webhook_watches_webhook_id_webhooks"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("webhook_id", "job_id", "rule", name=op.f("pk_webhook_watches")),
    )


def downgrade() -> None:
    op.drop_table("webhook_watches")
    op.drop_table("webhook_deliveries")
    op.drop_table("webhooks")
