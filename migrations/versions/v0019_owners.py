"""Owners: tokens of the scope `submit` become `operate`, because that is what they could do, and an index by owner."""

import sqlalchemy as sa
from alembic import op

revision = "0019"
down_revision = "0018"
branch_labels = None
depends_on = None

TOKENS = sa.table("tokens", sa.column("scope"))


def upgrade() -> None:
    op.execute(sa.update(TOKENS).where(TOKENS.c.scope == "submit").values(scope="operate"))
    op.create_index("ix_jobs_submitted_by", "jobs", ["submitted_by", "discarded", "number"])


def downgrade() -> None:
    op.drop_index("ix_jobs_submitted_by", table_name="jobs")
    op.execute(sa.update(TOKENS).where(TOKENS.c.scope == "operate").values(scope="submit"))
