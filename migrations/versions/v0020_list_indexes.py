"""Indexes for lists of jobs by name and by status: with 100,000 jobs they read or sorted thousands of rows."""

from alembic import op

revision = "0020"
down_revision = "0019"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_index("ix_jobs_name_discarded", "jobs", ["name", "discarded", "number"])
    op.create_index("ix_jobs_status_discarded", "jobs", ["status", "discarded", "number"])


def downgrade() -> None:
    op.drop_index("ix_jobs_status_discarded", table_name="jobs")
    op.drop_index("ix_jobs_name_discarded", table_name="jobs")
