"""Jobs, attempts, and the events, metrics, checkpoints and samples that attempts report."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

whole = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
instant = sa.DateTime(timezone=True)


def upgrade() -> None:
    _jobs()
    _attempts()
    _checkpoints()
    _events()
    _idempotency_keys()
    _job_labels()
    _metrics()
    _samples()
    _leases()


def _jobs() -> None:
    op.create_table(
        "jobs",
        sa.Column("number", whole, autoincrement=True, nullable=False),
        sa.Column("id", sa.String(length=40), nullable=False),
        sa.Column("version", whole, nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("labels", sa.JSON(none_as_null=True), nullable=False),
        sa.Column("status", sa.String(length=20), nullable=False),
        sa.Column("desired", sa.String(length=20), nullable=False),
        sa.Column("phase", sa.String(length=20), nullable=True),
        sa.Column("phase_detail", sa.JSON(none_as_null=True), nullable=True),
        sa.Column("reason", sa.String(length=40), nullable=True),
        sa.Column("message", sa.Text(), nullable=True),
        sa.Column("error", sa.JSON(none_as_null=True), nullable=True),
        sa.Column("spec", sa.JSON(none_as_null=True), nullable=False),
        sa.Column("facts", sa.JSON(none_as_null=True), nullable=False),
        sa.Column("progress", sa.JSON(none_as_null=True), nullable=False),
        sa.Column("alerts", sa.JSON(none_as_null=True), nullable=False),
        sa.Column("device", sa.String(length=20), nullable=False),
        sa.Column("ranks", whole, nullable=False),
        sa.Column("priority", whole, nullable=False),
        sa.Column("attempt", whole, nullable=False),
        sa.Column("trigger", sa.String(length=20), nullable=False),
        sa.Column("restarts", whole, nullable=False),
        sa.Column("restart_at", instant, nullable=True),
        sa.Column("asked_at", instant, nullable=True),
        sa.Column("heard_at", instant, nullable=True),
        sa.Column("parent_job_id", sa.String(length=40), nullable=True),
        sa.Column("parent_step", whole, nullable=True),
        sa.Column("created_at", instant, nullable=False),
        sa.Column("queued_at", instant, nullable=False),
        sa.Column("started_at", instant, nullable=True),
        sa.Column("finished_at", instant, nullable=True),
        sa.PrimaryKeyConstraint("number", name=op.f("pk_jobs")),
        sa.UniqueConstraint("id", name=op.f("uq_jobs_id")),
    )
    op.create_index("ix_jobs_name", "jobs", ["name"], unique=False)
    op.create_index("ix_jobs_status", "jobs", ["status", "priority", "queued_at"], unique=False)


def _attempts() -> None:
    op.create_table(
        "attempts",
        sa.Column("id", sa.String(length=40), nullable=False),
        sa.Column("job_id", sa.String(length=40), nullable=False),
        sa.Column("number", whole, nullable=False),
        sa.Column("token_sha256", sa.String(length=64), nullable=False),
        sa.Column("trigger", sa.String(length=20), nullable=False),
        sa.Column("devices", sa.JSON(none_as_null=True), nullable=False),
        sa.Column("acked_seq", whole, nullable=False),
        sa.Column("created_at", instant, nullable=False),
        sa.Column("launched_at", instant, nullable=True),
        sa.Column("started_at", instant, nullable=True),
        sa.Column("heard_at", instant, nullable=True),
        sa.Column("ended_at", instant, nullable=True),
        sa.Column("start_step", whole, nullable=True),
        sa.Column("end_step", whole, nullable=True),
        sa.Column("outcome", sa.String(length=20), nullable=True),
        sa.Column("reason", sa.String(length=40), nullable=True),
        sa.Column("message", sa.Text(), nullable=True),
        sa.Column("error", sa.JSON(none_as_null=True), nullable=True),
        sa.Column("ranks", sa.JSON(none_as_null=True), nullable=True),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], name=op.f("fk_attempts_job_id_jobs"), ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_attempts")),
        sa.UniqueConstraint("job_id", "number", name=op.f("uq_attempts_job_id_number")),
    )
    op.create_index("ix_attempts_ended_at", "attempts", ["ended_at"], unique=False)


def _checkpoints() -> None:
    op.create_table(
        "checkpoints",
        sa.Column("number", whole, autoincrement=True, nullable=False),
        sa.Column("job_id", sa.String(length=40), nullable=False),
        sa.Column("attempt", whole, nullable=False),
        sa.Column("seq", whole, nullable=False),
        sa.Column("step", whole, nullable=False),
        sa.Column("path", sa.Text(), nullable=False),
        sa.Column("bytes", whole, nullable=False),
        sa.Column("sha256", sa.Text(), nullable=False),
        sa.Column("kind", sa.String(length=20), nullable=False),
        sa.Column("loss", sa.Float(precision=53), nullable=True),
        sa.Column("created_at", instant, nullable=False),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], name=op.f("fk_checkpoints_job_id_jobs"), ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("number", name=op.f("pk_checkpoints")),
    )
    op.create_index("ix_checkpoints_job_id_step", "checkpoints", ["job_id", "step"], unique=False)


def _events() -> None:
    op.create_table(
        "events",
        sa.Column("number", whole, autoincrement=True, nullable=False),
        sa.Column("job_id", sa.String(length=40), nullable=False),
        sa.Column("attempt", whole, nullable=True),
        sa.Column("seq", whole, nullable=True),
        sa.Column("kind", sa.String(length=40), nullable=False),
        sa.Column("actor", sa.String(length=20), nullable=False),
        sa.Column("message", sa.Text(), nullable=False),
        sa.Column("data", sa.JSON(none_as_null=True), nullable=False),
        sa.Column("at", instant, nullable=False),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], name=op.f("fk_events_job_id_jobs"), ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("number", name=op.f("pk_events")),
    )
    op.create_index("ix_events_job_id", "events", ["job_id", "number"], unique=False)


def _idempotency_keys() -> None:
    op.create_table(
        "idempotency_keys",
        sa.Column("key", sa.String(length=255), nullable=False),
        sa.Column("body_sha256", sa.String(length=64), nullable=False),
        sa.Column("job_id", sa.String(length=40), nullable=False),
        sa.Column("created_at", instant, nullable=False),
        sa.ForeignKeyConstraint(
            ["job_id"], ["jobs.id"], name=op.f("fk_idempotency_keys_job_id_jobs"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("key", name=op.f("pk_idempotency_keys")),
    )
    op.create_index(op.f("ix_idempotency_keys_job_id"), "idempotency_keys", ["job_id"], unique=False)


def _job_labels() -> None:
    op.create_table(
        "job_labels",
        sa.Column("job_id", sa.String(length=40), nullable=False),
        sa.Column("key", sa.Text(), nullable=False),
        sa.Column("value", sa.Text(), nullable=False),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], name=op.f("fk_job_labels_job_id_jobs"), ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("job_id", "key", name=op.f("pk_job_labels")),
    )
    op.create_index("ix_job_labels_key_value", "job_labels", ["key", "value"], unique=False)


def _metrics() -> None:
    op.create_table(
        "metrics",
        sa.Column("job_id", sa.String(length=40), nullable=False),
        sa.Column("attempt", whole, nullable=False),
        sa.Column("seq", whole, nullable=False),
        sa.Column("step", whole, nullable=False),
        sa.Column("stitched", sa.Boolean(), nullable=False),
        sa.Column("epoch", sa.Float(precision=53), nullable=False),
        sa.Column("loss", sa.Float(precision=53), nullable=True),
        sa.Column("aux_loss", sa.Float(precision=53), nullable=True),
        sa.Column("learning_rate", sa.Float(precision=53), nullable=False),
        sa.Column("grad_norm", sa.Float(precision=53), nullable=True),
        sa.Column("tokens", whole, nullable=False),
        sa.Column("tokens_per_second", sa.Float(precision=53), nullable=True),
        sa.Column("mfu", sa.Float(precision=53), nullable=True),
        sa.Column("step_seconds", sa.Float(precision=53), nullable=True),
        sa.Column("data_seconds", sa.Float(precision=53), nullable=True),
        sa.Column("memory_bytes", whole, nullable=True),
        sa.Column("eval_loss", sa.Float(precision=53), nullable=True),
        sa.Column("nonfinite", sa.Boolean(), nullable=False),
        sa.Column("at", instant, nullable=False),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], name=op.f("fk_metrics_job_id_jobs"), ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("job_id", "attempt", "seq", name=op.f("pk_metrics")),
    )
    op.create_index("ix_metrics_attempt", "metrics", ["job_id", "attempt", "step"], unique=False)
    op.create_index("ix_metrics_curve", "metrics", ["job_id", "stitched", "step"], unique=False)


def _samples() -> None:
    op.create_table(
        "samples",
        sa.Column("number", whole, autoincrement=True, nullable=False),
        sa.Column("job_id", sa.String(length=40), nullable=False),
        sa.Column("attempt", whole, nullable=False),
        sa.Column("seq", whole, nullable=False),
        sa.Column("step", whole, nullable=False),
        sa.Column("prompt", sa.Text(), nullable=False),
        sa.Column("text", sa.Text(), nullable=False),
        sa.Column("at", instant, nullable=False),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], name=op.f("fk_samples_job_id_jobs"), ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("number", name=op.f("pk_samples")),
    )
    op.create_index("ix_samples_job_id", "samples", ["job_id", "number"], unique=False)


def _leases() -> None:
    op.create_table(
        "leases",
        sa.Column("device", sa.String(length=20), nullable=False),
        sa.Column("attempt_id", sa.String(length=40), nullable=False),
        sa.Column("job_id", sa.String(length=40), nullable=False),
        sa.ForeignKeyConstraint(
            ["attempt_id"], ["attempts.id"], name=op.f("fk_leases_attempt_id_attempts"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("device", name=op.f("pk_leases")),
    )
    op.create_index(op.f("ix_leases_attempt_id"), "leases", ["attempt_id"], unique=False)


def downgrade() -> None:
    op.drop_table("leases")
    op.drop_table("samples")
    op.drop_table("metrics")
    op.drop_table("job_labels")
    op.drop_table("idempotency_keys")
    op.drop_table("events")
    op.drop_table("checkpoints")
    op.drop_table("attempts")
    op.drop_table("jobs")
