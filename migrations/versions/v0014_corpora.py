"""Corpora, and the one that a job waits for."""

import sqlalchemy as sa
from alembic import op

revision = "0014"
down_revision = "0013"
branch_labels = None
depends_on = None

INTEGER = sa.BigInteger().with_variant(sa.Integer, "sqlite")
TIME = sa.DateTime(timezone=True)
JSON = sa.JSON(none_as_null=True)


def upgrade() -> None:
    op.create_table(
        "corpora",
        sa.Column("number", INTEGER, autoincrement=True, nullable=False),
        sa.Column("id", sa.String(length=40), nullable=False),
        sa.Column("key", sa.String(length=32), nullable=False),
        sa.Column("parts", JSON, nullable=False),
        sa.Column("status", sa.String(length=20), nullable=False),
        sa.Column("spec", JSON, nullable=False),
        sa.Column("launcher", sa.String(length=20), nullable=False),
        sa.Column("attempt", INTEGER, nullable=False),
        sa.Column("requested", sa.Boolean(), nullable=False),
        sa.Column("deleted", sa.Boolean(), nullable=False),
        sa.Column("acked_seq", INTEGER, nullable=False),
        sa.Column("progress", JSON, nullable=False),
        sa.Column("prepared", JSON, nullable=True),
        sa.Column("reason", sa.String(length=40), nullable=True),
        sa.Column("message", sa.Text(), nullable=True),
        sa.Column("error", JSON, nullable=True),
        sa.Column("restarts", INTEGER, nullable=False),
        sa.Column("fruitless", INTEGER, nullable=False),
        sa.Column("restart_at", TIME, nullable=True),
        sa.Column("asked_at", TIME, nullable=True),
        sa.Column("heard_at", TIME, nullable=True),
        sa.Column("created_at", TIME, nullable=False),
        sa.Column("queued_at", TIME, nullable=False),
        sa.Column("launched_at", TIME, nullable=True),
        sa.Column("started_at", TIME, nullable=True),
        sa.Column("finished_at", TIME, nullable=True),
        sa.Column("submitted_by", sa.String(length=64), nullable=True),
        sa.PrimaryKeyConstraint("number", name="pk_corpora"),
        sa.UniqueConstraint("id", name="uq_corpora_id"),
        sa.UniqueConstraint("key", name="uq_corpora_key"),
    )
    op.create_index("ix_corpora_status", "corpora", ["status"])
    op.add_column("jobs", sa.Column("corpus_id", sa.String(length=40), nullable=True))
    op.create_index("ix_jobs_corpus_id", "jobs", ["corpus_id"])


def downgrade() -> None:
    op.drop_index("ix_jobs_corpus_id", table_name="jobs")
    op.drop_column("jobs", "corpus_id")
    op.drop_table("corpora")
