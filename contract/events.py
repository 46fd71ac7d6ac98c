"""The events that rank 0 of an attempt writes to ``events.jsonl``: all that the service learns of a run.

One strict JSON object a line. ``seq`` counts the lines of an attempt from 1, so (job, attempt, seq) identifies a line
permanently. A number that is not finite is null, with ``nonfinite: true``. Readers ignore unknown keys, so an older
service can read the events of a newer worker.
"""

from datetime import UTC, datetime
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from trainyard.contract.file_identity import FileFingerprint
from trainyard.contract.status import Phase, Reason
from trainyard.contract.task_files import TaskKind

Step = Annotated[int, Field(ge=0)]


class EventBase(BaseModel):
    """The fields of every event."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    seq: int = Field(default=0, ge=0)
    at: datetime = Field(default_factory=lambda: datetime.now(UTC))


class RankInfo(BaseModel):
    """Where a rank runs. ``device``: as `GET /devices` numbers it, ``cuda:3`` or ``cpu``. ``name``: its model."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    rank: int
    host: str
    device: str
    name: str
    pci_bus_id: str | None = None

    def __str__(self) -> str:
        bus = f", PCI {self.pci_bus_id}" if self.pci_bus_id is not None else ""
        return f"rank {self.rank} (host {self.host}, {self.device} {self.name}{bus})"


class HeldOutFacts(BaseModel):
    """Size of a held-out set. ``tokens``: those that are predicted. ``documents``: null if unknown.

    ``duplicates``: documents of its source with the text of an earlier one, counted if ``eval_fraction`` is used.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    name: str
    files: int
    documents: int | None
    tokens: int
    duplicates: int | None = None


class Started(EventBase):
    """The attempt is ready to train: its devices, its corpus, and the step that it starts from.

    ``base_step``: steps before the run's own schedule, see `contract.messages.Fork`; ``steps`` includes them.
    ``base_tokens``: tokens trained in them. ``train_seconds``: active training time of all earlier attempts.
    ``special_tokens``: occurrences in the corpus's texts, in ``special_texts`` of them; None if they were not counted.
    ``bos_token``, ``eos_token``: the tokens before and after each document. ``inputs``: the files that were read, see
    `contract.file_identity.fingerprint_inputs`.
    ``ranks``: host and device of each rank; [] from an older worker.
    ``duplicates``: documents with the text of an earlier one, counted if ``eval_fraction`` is used; else null.
    """

    kind: Literal["started"] = "started"
    start_step: Step
    steps: int
    world_size: int
    device: str
    device_name: str
    dtype: str
    torch_version: str
    parameters: int
    active_parameters: int
    vocab_size: int
    samples: int
    documents: int
    tokens: int
    bad_lines: int
    special_tokens: int | None = None
    special_texts: int | None = None
    bos_token: str | None = None
    eos_token: str | None = None
    inputs: dict[str, FileFingerprint] = Field(default_factory=dict)
    global_batch: int
    tokens_per_step: float
    steps_per_epoch: int
    flops_per_token: float
    base_step: Step = 0
    base_tokens: int = Field(default=0, ge=0)
    train_seconds: float = Field(default=0.0, ge=0)
    duplicates: int | None = None
    eval_sets: list[HeldOutFacts] = Field(default_factory=list)
    resumed_from: str | None = None
    ranks: list[RankInfo] = Field(default_factory=list)


class PhaseChanged(EventBase):
    """The attempt has entered a phase. ``done`` of ``total``: its progress, if known."""

    kind: Literal["phase"] = "phase"
    phase: Phase
    message: str | None = None
    done: int | None = None
    total: int | None = None


class HeldOutResult(BaseModel):
    """The evaluation of a held-out set. ``loss``: in nats per token. ``bpb``: in bits per byte of text."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    loss: float | None = None
    bpb: float | None = None


class MetricEvent(EventBase):
    """One point of the curve, at an optimizer step.

    ``loss``: mean over all tokens of all ranks since the previous point, in nats. ``bpb``: the same in bits per byte of
    text; null if the bytes of a token are unknown. ``eval``: the results of each held-out set, by its name;
    ``eval_loss``, ``eval_bpb``: over all sets together, each token counting once. ``tokens``: trained tokens of the
    whole job. ``memory_bytes``: peak of the rank with the highest. ``expert_load``: each expert's share of the tokens
    since the previous point, over all layers; null for a dense model. ``step_seconds_max_rank``: the rank that computed
    longest in a step, and ``step_seconds_spread`` its time over the median of all ranks (of an even number, the lower
    of the middle two), both without the time that a rank waits for others; null for one rank, and with FSDP, where
    ranks wait in every layer. ``train_seconds``: active training time of all attempts together, see
    `contract.rundir.RunDir.train_seconds`. Times are in seconds.
    """

    kind: Literal["metric"] = "metric"
    step: Step
    epoch: float
    loss: float | None
    aux_loss: float | None = None
    learning_rate: float
    grad_norm: float | None = None
    tokens: int
    tokens_per_second: float | None = None
    mfu: float | None = None
    step_seconds: float | None = None
    step_seconds_max_rank: int | None = None
    step_seconds_spread: float | None = None
    data_seconds: float | None = None
    memory_bytes: int | None = None
    eval_loss: float | None = None
    expert_load: list[float] | None = None
    nonfinite: bool = False
    train_seconds: float | None = None
    bpb: float | None = None
    eval_bpb: float | None = None
    eval: dict[str, HeldOutResult] | None = None


class CheckpointSaved(EventBase):
    """A checkpoint was published. ``sha256``: of its model.safetensors. ``bytes``: of all its files."""

    kind: Literal["checkpoint"] = "checkpoint"
    step: Step
    path: str
    bytes: int
    sha256: str
    checkpoint_kind: Literal["full", "weights"] = "full"
    loss: float | None = None
    seconds: float | None = None


class CheckpointRemoved(EventBase):
    """A checkpoint was deleted by retention, or found damaged and moved away."""

    kind: Literal["checkpoint_removed"] = "checkpoint_removed"
    step: Step
    path: str
    checkpoint_kind: Literal["full", "weights"] = "full"
    why: str = "retention"


class SampleEvent(EventBase):
    """A text that the model generated. ``note``: what was cut because it did not fit, or null."""

    kind: Literal["sample"] = "sample"
    step: Step
    prompt: str
    text: str
    note: str | None = None


class TaskScored(EventBase):
    """The weights of a step were scored on a task.

    ``acc``, ``acc_norm``: 0 to 1; ``bpb``: bits per byte, see `worker.training.tasks`; null: not finite, or not of this
    kind. ``truncated``: texts whose context was cut to fit. ``file_sha256``: of the task file. ``seconds``: duration.
    """

    kind: Literal["task"] = "task"
    step: Step
    task: str
    task_kind: TaskKind
    examples: int
    acc: float | None
    acc_norm: float | None
    bpb: float | None
    truncated: int = 0
    file_sha256: str
    seconds: float | None = None


class WarningEvent(EventBase):
    """A warning for the user. Training continues."""

    kind: Literal["warning"] = "warning"
    code: str
    message: str
    step: Step | None = None
    data: dict[str, Any] = Field(default_factory=dict)


class ResumeVerified(EventBase):
    """A resumed attempt has evaluated the same sequences as the attempt that saved the checkpoint.

    ``expected``: the loss at the save. ``found``: the loss now, null if it is not finite. Both are means in nats per
    token. On the same hardware, threads and dtype the difference is 0.
    """

    kind: Literal["resume_verified"] = "resume_verified"
    step: Step
    expected: float
    found: float | None
    difference: float | None


class SettingsChanged(EventBase):
    """Settings were changed during the run. They apply after ``step``. See `contract.messages.RunSettings`."""

    kind: Literal["settings"] = "settings"
    step: Step
    log_interval: int | None
    save_interval: int
    keep_last: int
    max_minutes: float | None = None
    target_loss: float | None = None
    message: str


class Finished(EventBase):
    """The last event of an attempt that was not killed, with the same result as outcome.json.

    ``train_seconds``: see `MetricEvent`.
    """

    kind: Literal["finished"] = "finished"
    outcome: Literal["completed", "stopped", "failed"]
    step: Step
    reason: Reason | None = None
    message: str | None = None
    train_seconds: float | None = None


Event: TypeAlias = (
    Started
    | PhaseChanged
    | MetricEvent
    | CheckpointSaved
    | CheckpointRemoved
    | SampleEvent
    | TaskScored
    | WarningEvent
    | ResumeVerified
    | SettingsChanged
    | Finished
)

EVENT: TypeAdapter[Event] = TypeAdapter(Annotated[Event, Field(discriminator="kind")])
"""Parses one line: ``EVENT.validate_json(line)``. Raises ValidationError."""
