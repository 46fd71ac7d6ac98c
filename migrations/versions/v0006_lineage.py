"""The curve segments that a fork has from its ancestors."""

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("jobs", sa.Column("lineage", sa.JSON(none_as_null=True), nullable=True))
    op.create_index(op.f("ix_jobs_parent_job_id"), "jobs", ["parent_job_id"], unique=False)


def downgrade() -> None:
    op.drop_index(op.f("ix_jobs_parent_job_id"), table_name="jobs")
    op.drop_column("jobs", "lineage")
