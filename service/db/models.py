"""The database tables as SQLAlchemy models. A test compares them with the result of the migrations."""

from datetime import UTC, datetime
from typing import Any

from sqlalchemy import (
    JSON,
    BigInteger,
    DateTime,
    Dialect,
    Float,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    String,
    Text,
    TypeDecorator,
    UniqueConstraint,
    false,
)
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

BigInt = BigInteger().with_variant(Integer, "sqlite")
"""64 bits. On SQLite the type must be INTEGER: only such a primary key is numbered automatically."""


class UtcDateTime(TypeDecorator[datetime]):
    """A timezone-aware time in UTC, on both databases."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, _dialect: Dialect) -> datetime | None:
        if value is not None and value.tzinfo is None:
            raise ValueError("a time without time zone")
        return value.astimezone(UTC) if value is not None else None

    def process_result_value(self, value: datetime | None, _dialect: Dialect) -> datetime | None:
        if value is None:
            return None
        # SQLite drops the time zone, which was UTC.
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


class Base(DeclarativeBase):
    """Base of all tables."""

    metadata = MetaData(
        naming_convention={
            "ix": "ix_%(column_0_N_label)s",
            "uq": "uq_%(table_name)s_%(column_0_N_name)s",
            "fk": "fk_%(table_name)s_%(column_0_name)s_%(referred_table_name)s",
            "pk": "pk_%(table_name)s",
        }
    )
    type_annotation_map = {  # noqa: RUF012 - SQLAlchemy's own spelling
        datetime: UtcDateTime(),
        dict[str, Any]: JSON(none_as_null=True),
        list[Any]: JSON(none_as_null=True),
        int: BigInt,
        float: Float(53),
        str: Text(),
    }


def _job_id() -> Mapped[str]:
    return mapped_column(String(40), ForeignKey("jobs.id", ondelete="CASCADE"))


class JobRow(Base):
    """One job. ``version`` counts changes of status; ``number`` orders jobs by age.

    ``facts``: the plan. ``asked_at``: when a stop was requested. ``heard_at``: the last report of an agent.
    ``resume_step``: the checkpoint that the next attempt is to start from; null once it has started.
    ``sealed_step``: the curve up to this step is in rollups. ``preempted_by``: the job for which this one is paused.
    ``lineage``: the ancestors of a fork, see `service.metrics.lineage`. ``submitted_by`` created the job; ``queued_by``
    queued it last, and the job counts against its quota. ``score``: see `service.metrics.score`. ``corpus_id``: a
    queued job waits until this corpus is ready; null if there is nothing to prepare, and in jobs of release 0.1.
    """

    __tablename__ = "jobs"
    __table_args__ = (
        Index("ix_jobs_status", "status", "priority", "queued_at"),
        Index("ix_jobs_name", "name"),
        Index("ix_jobs_queued_by", "queued_by", "status"),
        Index("ix_jobs_corpus_id", "corpus_id"),
        Index("ix_jobs_submitted_by", "submitted_by", "discarded", "number"),
        Index("ix_jobs_discarded", "discarded", "number"),
        Index("ix_jobs_discarded_score", "discarded", "score", "number"),
        Index("ix_jobs_group_name", "group_name", "discarded", "number"),
        Index("ix_jobs_group_name_score", "group_name", "discarded", "score", "number"),
        Index("ix_jobs_name_discarded", "name", "discarded", "number"),
        Index("ix_jobs_status_discarded", "status", "discarded", "number"),
    )

    number: Mapped[int] = mapped_column(primary_key=True, autoincrement=True)
    id: Mapped[str] = mapped_column(String(40), unique=True)
    version: Mapped[int] = mapped_column(default=1)
    name: Mapped[str]
    labels: Mapped[dict[str, Any]]
    status: Mapped[str] = mapped_column(String(20))
    desired: Mapped[str] = mapped_column(String(20))
    phase: Mapped[str | None] = mapped_column(String(20))
    phase_detail: Mapped[dict[str, Any] | None]
    reason: Mapped[str | None] = mapped_column(String(40))
    message: Mapped[str | None]
    error: Mapped[dict[str, Any] | None]
    spec: Mapped[dict[str, Any]]
    facts: Mapped[dict[str, Any]]
    progress: Mapped[dict[str, Any]]
    alerts: Mapped[list[Any]]
    device: Mapped[str] = mapped_column(String(20))
    ranks: Mapped[int]
    priority: Mapped[int]
    attempt: Mapped[int] = mapped_column(default=0)
    trigger: Mapped[str] = mapped_column(String(20), default="submit")
    restarts: Mapped[int] = mapped_column(default=0)
    restart_at: Mapped[datetime | None]
    asked_at: Mapped[datetime | None]
    heard_at: Mapped[datetime | None]
    parent_job_id: Mapped[str | None] = mapped_column(String(40), index=True)
    parent_step: Mapped[int | None]
    created_at: Mapped[datetime]
    queued_at: Mapped[datetime]
    started_at: Mapped[datetime | None]
    finished_at: Mapped[datetime | None]
    resume_step: Mapped[int | None]
    sealed_step: Mapped[int] = mapped_column(default=0)
    preempted_by: Mapped[str | None] = mapped_column(String(40))
    lineage: Mapped[dict[str, Any] | None]
    submitted_by: Mapped[str | None] = mapped_column(String(64))
    queued_by: Mapped[str | None] = mapped_column(String(64))
    description: Mapped[str] = mapped_column(default="", server_default="")
    group_name: Mapped[str | None] = mapped_column(String(200))
    discarded: Mapped[bool] = mapped_column(default=False, server_default=false())
    score: Mapped[float | None]
    score_metric: Mapped[str | None] = mapped_column(String(20))
    score_step: Mapped[int | None]
    corpus_id: Mapped[str | None] = mapped_column(String(40))


class CorpusRow(Base):
    """One corpus with its tokenizer, and its preparation. ``key``, ``parts``: see `contract.prepared`.

    ``spec``: of the job that caused the preparation, or of a job with the data of the request. ``attempt`` counts the
    launches of its process; ``launched_at`` is null until the launcher has confirmed the last one. ``requested``: it is
    prepared although no job waits for it. ``deleted``: it is removed once its process has ended. ``acked_seq``: the
    last line of the attempt's outbox that was read, at ``heard_at``. ``fruitless``: attempts in a row without progress.
    ``prepared``: its token shards, a `contract.prepared.PreparedCorpus`; null until it was ready once.
    """

    __tablename__ = "corpora"
    __table_args__ = (Index("ix_corpora_status", "status"),)

    number: Mapped[int] = mapped_column(primary_key=True, autoincrement=True)
    id: Mapped[str] = mapped_column(String(40), unique=True)
    key: Mapped[str] = mapped_column(String(32), unique=True)
    parts: Mapped[list[Any]]
    status: Mapped[str] = mapped_column(String(20))
    spec: Mapped[dict[str, Any]]
    launcher: Mapped[str] = mapped_column(String(20))
    attempt: Mapped[int] = mapped_column(default=0)
    requested: Mapped[bool] = mapped_column(default=False)
    deleted: Mapped[bool] = mapped_column(default=False)
    acked_seq: Mapped[int] = mapped_column(default=0)
    progress: Mapped[dict[str, Any]]
    prepared: Mapped[dict[str, Any] | None]
    reason: Mapped[str | None] = mapped_column(String(40))
    message: Mapped[str | None]
    error: Mapped[dict[str, Any] | None]
    restarts: Mapped[int] = mapped_column(default=0)
    fruitless: Mapped[int] = mapped_column(default=0)
    restart_at: Mapped[datetime | None]
    asked_at: Mapped[datetime | None]
    heard_at: Mapped[datetime | None]
    created_at: Mapped[datetime]
    queued_at: Mapped[datetime]
    launched_at: Mapped[datetime | None]
    started_at: Mapped[datetime | None]
    finished_at: Mapped[datetime | None]
    submitted_by: Mapped[str | None] = mapped_column(String(64))


class LabelRow(Base):
    """One label of a job, also in ``JobRow.labels``; for finding jobs by label."""

    __tablename__ = "job_labels"
    __table_args__ = (Index("ix_job_labels_key_value", "key", "value"),)

    job_id: Mapped[str] = mapped_column(String(40), ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True)
    key: Mapped[str] = mapped_column(primary_key=True)
    value: Mapped[str]


class IdempotencyRow(Base):
    """The idempotency key of a submission. ``owner``: the name of the caller; others may use the same key."""

    __tablename__ = "idempotency_keys"

    key: Mapped[str] = mapped_column(String(255), primary_key=True)
    body_sha256: Mapped[str] = mapped_column(String(64))
    job_id: Mapped[str] = mapped_column(String(40), ForeignKey("jobs.id", ondelete="CASCADE"), index=True)
    created_at: Mapped[datetime] = mapped_column(index=True)
    owner: Mapped[str] = mapped_column(String(64), primary_key=True)


class TokenRow(Base):
    """A named token. ``sha256`` is the hash of the whole token, which is not stored. Names are never used again.

    ``previous_sha256``: hash of the token before the last rotation, which is valid until ``previous_until``.
    """

    __tablename__ = "tokens"

    id: Mapped[str] = mapped_column(String(40), primary_key=True)
    name: Mapped[str] = mapped_column(String(64), unique=True)
    scope: Mapped[str] = mapped_column(String(20))
    sha256: Mapped[str] = mapped_column(String(64))
    previous_sha256: Mapped[str | None] = mapped_column(String(64))
    previous_until: Mapped[datetime | None]
    max_jobs: Mapped[int | None]
    max_devices: Mapped[int | None]
    created_by: Mapped[str] = mapped_column(String(64))
    created_at: Mapped[datetime]
    rotated_at: Mapped[datetime | None]
    expires_at: Mapped[datetime | None]
    revoked_at: Mapped[datetime | None]
    last_used_at: Mapped[datetime | None]


class AttemptRow(Base):
    """One attempt. ``launched_at`` is null until the launcher has confirmed the start.

    ``acked_seq``: the last outbox line that is stored. ``heard_at``: the last report of its agent.
    ``placement``: its nodes and devices on a cluster, see `service.launch.base.Placement`; null on this host.
    """

    __tablename__ = "attempts"
    __table_args__ = (UniqueConstraint("job_id", "number"), Index("ix_attempts_ended_at", "ended_at"))

    id: Mapped[str] = mapped_column(String(40), primary_key=True)
    job_id: Mapped[str] = _job_id()
    number: Mapped[int]
    token_sha256: Mapped[str] = mapped_column(String(64))
    trigger: Mapped[str] = mapped_column(String(20))
    devices: Mapped[list[Any]]
    acked_seq: Mapped[int] = mapped_column(default=0)
    created_at: Mapped[datetime]
    launched_at: Mapped[datetime | None]
    started_at: Mapped[datetime | None]
    heard_at: Mapped[datetime | None]
    ended_at: Mapped[datetime | None]
    start_step: Mapped[int | None]
    end_step: Mapped[int | None]
    outcome: Mapped[str | None] = mapped_column(String(20))
    reason: Mapped[str | None] = mapped_column(String(40))
    message: Mapped[str | None]
    error: Mapped[dict[str, Any] | None]
    ranks: Mapped[list[Any] | None]
    launcher: Mapped[str] = mapped_column(String(20), default="local", server_default="local")
    placement: Mapped[dict[str, Any] | None]


class DeviceLeaseRow(Base):
    """A device leased to an attempt, or to a side process of a service. A free device has no row.

    ``sidecar``: the identity of that service, see `service.sidecars.sidecars`; null for an attempt.
    """

    __tablename__ = "leases"

    device: Mapped[str] = mapped_column(String(20), primary_key=True)
    attempt_id: Mapped[str | None] = mapped_column(
        String(40), ForeignKey("attempts.id", ondelete="CASCADE"), index=True
    )
    job_id: Mapped[str | None] = mapped_column(String(40))
    sidecar: Mapped[str | None]


class SchedulerLeaseRow(Base):
    """The leader lease, a single row: ``holder`` is the service that schedules, or null.

    ``offer``: the devices of the leader, for services on other hosts; see `service.scheduler.published_inventory`.
    """

    __tablename__ = "leader"

    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    epoch: Mapped[int]
    beat: Mapped[int]
    holder: Mapped[str | None]
    offer: Mapped[dict[str, Any] | None]


class MetricRow(Base):
    """One point of a curve. ``stitched`` is false if a later attempt or a rollback has repeated this step."""

    __tablename__ = "metrics"
    __table_args__ = (
        Index("ix_metrics_curve", "job_id", "stitched", "step"),
        Index("ix_metrics_attempt", "job_id", "attempt", "step"),
    )

    job_id: Mapped[str] = mapped_column(String(40), ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True)
    attempt: Mapped[int] = mapped_column(primary_key=True)
    seq: Mapped[int] = mapped_column(primary_key=True)
    step: Mapped[int]
    stitched: Mapped[bool]
    epoch: Mapped[float]
    loss: Mapped[float | None]
    aux_loss: Mapped[float | None]
    learning_rate: Mapped[float]
    grad_norm: Mapped[float | None]
    tokens: Mapped[int]
    tokens_per_second: Mapped[float | None]
    mfu: Mapped[float | None]
    step_seconds: Mapped[float | None]
    data_seconds: Mapped[float | None]
    memory_bytes: Mapped[int | None]
    eval_loss: Mapped[float | None]
    nonfinite: Mapped[bool]
    at: Mapped[datetime]
    expert_load: Mapped[list[Any] | None]
    bpb: Mapped[float | None]
    eval_bpb: Mapped[float | None]
    eval: Mapped[dict[str, Any] | None]
    train_seconds: Mapped[float | None]
    step_seconds_max_rank: Mapped[int | None]
    step_seconds_spread: Mapped[float | None]


class MetricRollupRow(Base):
    """Aggregated points of a long curve, see `service.metrics.rollups`. ``bucket`` is ``step // width``.

    ``total_H`` and ``weight_H`` are the sums of the exponential moving average with half-life H, at ``finite_step``.
    """

    __tablename__ = "metric_stretches"

    job_id: Mapped[str] = mapped_column(String(40), ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True)
    width: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    bucket: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    first_step: Mapped[int]
    step: Mapped[int]
    attempt: Mapped[int]
    count: Mapped[int]
    nonfinite: Mapped[int]
    loss: Mapped[float | None]
    loss_sum: Mapped[float]
    loss_min: Mapped[float | None]
    loss_max: Mapped[float | None]
    finite_step: Mapped[int | None]
    total_10: Mapped[float]
    total_50: Mapped[float]
    total_200: Mapped[float]
    total_1000: Mapped[float]
    weight_10: Mapped[float]
    weight_50: Mapped[float]
    weight_200: Mapped[float]
    weight_1000: Mapped[float]


class EventRow(Base):
    """One event of a job. ``actor`` caused it."""

    __tablename__ = "events"
    __table_args__ = (Index("ix_events_job_id", "job_id", "number"),)

    number: Mapped[int] = mapped_column(primary_key=True, autoincrement=True)
    job_id: Mapped[str] = _job_id()
    attempt: Mapped[int | None]
    seq: Mapped[int | None]
    kind: Mapped[str] = mapped_column(String(40))
    actor: Mapped[str] = mapped_column(String(64))
    message: Mapped[str]
    data: Mapped[dict[str, Any]]
    at: Mapped[datetime]


class CheckpointRow(Base):
    """A published checkpoint or weights file that was not deleted."""

    __tablename__ = "checkpoints"
    # No unique index on the path: it may be longer than an index entry. Writers lock the job and replace by path.
    __table_args__ = (Index("ix_checkpoints_job_id_step", "job_id", "step"),)

    number: Mapped[int] = mapped_column(primary_key=True, autoincrement=True)
    job_id: Mapped[str] = _job_id()
    attempt: Mapped[int]
    seq: Mapped[int]
    step: Mapped[int]
    path: Mapped[str]
    bytes: Mapped[int]
    sha256: Mapped[str]
    kind: Mapped[str] = mapped_column(String(20))
    loss: Mapped[float | None]
    created_at: Mapped[datetime]


class SampleRow(Base):
    """A text that the model generated."""

    __tablename__ = "samples"
    __table_args__ = (Index("ix_samples_job_id", "job_id", "number"),)

    number: Mapped[int] = mapped_column(primary_key=True, autoincrement=True)
    job_id: Mapped[str] = _job_id()
    attempt: Mapped[int]
    seq: Mapped[int]
    step: Mapped[int]
    prompt: Mapped[str]
    text: Mapped[str]
    at: Mapped[datetime]
    note: Mapped[str | None]


class EvaluationRow(Base):
    """The scores of one checkpoint, or of the weights at a step of the run, on one task.

    ``attempt``: scored it during training; null: it was requested, by ``requested_by``. ``evaluation_id``: the rows of
    one request have the same. ``state``: pending, running, done or failed; ``error``: why it failed. ``stitched`` is
    false if a later attempt or a rollback has repeated this step.
    """

    __tablename__ = "evaluations"
    __table_args__ = (
        Index("ix_evaluations_job_id", "job_id", "step", "task", "number"),
        Index("ix_evaluations_evaluation_id", "evaluation_id"),
        Index("ix_evaluations_state", "state"),
    )

    number: Mapped[int] = mapped_column(primary_key=True, autoincrement=True)
    job_id: Mapped[str] = _job_id()
    attempt: Mapped[int | None]
    evaluation_id: Mapped[str | None] = mapped_column(String(40))
    step: Mapped[int]
    task: Mapped[str] = mapped_column(String(64))
    kind: Mapped[str] = mapped_column(String(20))
    path: Mapped[str | None]
    file_sha256: Mapped[str | None] = mapped_column(String(64))
    state: Mapped[str] = mapped_column(String(20))
    stitched: Mapped[bool]
    examples: Mapped[int | None]
    truncated: Mapped[int | None]
    acc: Mapped[float | None]
    acc_norm: Mapped[float | None]
    bpb: Mapped[float | None]
    seconds: Mapped[float | None]
    device: Mapped[str | None] = mapped_column(String(20))
    error: Mapped[str | None]
    requested_by: Mapped[str | None] = mapped_column(String(64))
    created_at: Mapped[datetime]
    started_at: Mapped[datetime | None]
    finished_at: Mapped[datetime | None]


class WebhookRow(Base):
    """A webhook. ``secret`` signs deliveries, and until ``old_secret_until`` so does ``old_secret``.

    ``rules_since``: rules ignore earlier points and events. ``failures``: consecutive failed attempts.
    ``retry_at``: nothing is sent before this time.
    """

    __tablename__ = "webhooks"
    __table_args__ = (Index("ix_webhooks_job_id", "job_id"),)

    number: Mapped[int] = mapped_column(primary_key=True, autoincrement=True)
    id: Mapped[str] = mapped_column(String(40), unique=True)
    url: Mapped[str]
    description: Mapped[str]
    secret: Mapped[str]
    old_secret: Mapped[str | None]
    old_secret_until: Mapped[datetime | None]
    events: Mapped[list[Any]]
    labels: Mapped[dict[str, Any]]
    job_id: Mapped[str | None] = mapped_column(String(40))
    rules: Mapped[list[Any]]
    rules_since: Mapped[datetime]
    enabled: Mapped[bool]
    disabled_reason: Mapped[str | None]
    failures: Mapped[int] = mapped_column(default=0)
    failing_since: Mapped[datetime | None]
    retry_at: Mapped[datetime | None]
    succeeded_at: Mapped[datetime | None]
    created_at: Mapped[datetime]
    updated_at: Mapped[datetime]


class DeliveryRow(Base):
    """One delivery to a webhook. ``body`` is sent byte for byte. Deliveries with the same ``lane`` are sent in order.

    ``claimed_by``: the sender that is delivering it. There is no foreign key: if the webhook is deleted concurrently, a
    job's change of status must not fail.
    """

    __tablename__ = "webhook_deliveries"
    __table_args__ = (
        Index("ix_webhook_deliveries_open", "state", "webhook_id", "lane", "number"),
        Index("ix_webhook_deliveries_log", "webhook_id", "number"),
        Index("ix_webhook_deliveries_ended_at", "ended_at"),
    )

    number: Mapped[int] = mapped_column(primary_key=True, autoincrement=True)
    webhook_id: Mapped[str] = mapped_column(String(40))
    event_id: Mapped[str] = mapped_column(String(60))
    kind: Mapped[str] = mapped_column(String(60))
    job_id: Mapped[str | None] = mapped_column(String(40))
    lane: Mapped[str] = mapped_column(String(60))
    body: Mapped[str]
    state: Mapped[str] = mapped_column(String(20))
    attempts: Mapped[int] = mapped_column(default=0)
    tries: Mapped[list[Any]]
    next_at: Mapped[datetime | None]
    claimed_by: Mapped[str | None] = mapped_column(String(60))
    redelivers: Mapped[int | None]
    created_at: Mapped[datetime]
    ended_at: Mapped[datetime | None]


class RuleStateRow(Base):
    """The state of a webhook's rule for one job: the last line it has read, and what it has already reported."""

    __tablename__ = "webhook_watches"

    webhook_id: Mapped[str] = mapped_column(String(40), ForeignKey("webhooks.id", ondelete="CASCADE"), primary_key=True)
    job_id: Mapped[str] = mapped_column(String(40), ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True)
    rule: Mapped[str] = mapped_column(String(200), primary_key=True)
    attempt: Mapped[int]
    seq: Mapped[int]
    seen: Mapped[dict[str, Any]]
    final: Mapped[bool]


class XidErrorRow(Base):
    """An XID error of a GPU, as its driver reported it. It counts for 24 hours, or until it is cleared.

    While it is not cleared, ``at`` is the time of the last error with this number.
    """

    __tablename__ = "xid_errors"
    __table_args__ = (Index("ix_xid_errors_at", "at"),)

    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=True)
    gpu_uuid: Mapped[str] = mapped_column(String(80))
    xid: Mapped[int]
    at: Mapped[datetime]
    cleared_at: Mapped[datetime | None]
