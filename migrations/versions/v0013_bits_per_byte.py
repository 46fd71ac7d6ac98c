"""Bits per byte of the training loss, and the results of each held-out set."""

import sqlalchemy as sa
from alembic import op

revision = "0013"
down_revision = "0012"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("metrics", sa.Column("bpb", sa.Float(53), nullable=True))
    op.add_column("metrics", sa.Column("eval_bpb", sa.Float(53), nullable=True))
    op.add_column("metrics", sa.Column("eval", sa.JSON(none_as_null=True), nullable=True))


def downgrade() -> None:
    for column in ("eval", "eval_bpb", "bpb"):
        op.drop_column("metrics", column)
    # The release before ranks by losses alone.
    op.execute("UPDATE jobs SET score = NULL, score_metric = NULL, score_step = NULL WHERE score_metric = 'bpb'")
