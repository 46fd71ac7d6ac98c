"""The lines of ``events.jsonl``: what rank 0 of an attempt says, and all that the service ever learns of a run.

One JSON object a line, strict JSON. ``seq`` counts the lines of an attempt from 1, so (job, attempt, seq) names a line
for ever. A number that was not finite is null with ``nonfinite: true`` beside it. Readers ignore keys they do not know,
so an older service reads a newer worker.
"""

from datetime import UTC, datetime
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from trainyard.contract.status import Phase, Reason

Step = Annotated[int, Field(ge=0)]


class EventBase(BaseModel):
    """What every line has."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    seq: int = Field(default=0, ge=0)
    at: datetime = Field(default_factory=lambda: datetime.now(UTC))


class Started(EventBase):
    """The attempt is set up: what it runs on, what the corpus holds, where it goes on from.

    ``base_step``: steps that lie before the run's own schedule, see `contract.messages.Fork`; ``steps`` counts them too.
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
    global_batch: int
    tokens_per_step: float
    steps_per_epoch: int
    flops_per_token: float
    base_step: Step = 0
    resumed_from: str | None = None


class PhaseChanged(EventBase):
    """What the attempt is busy with now; ``done`` of ``total`` where that can be counted."""

    kind: Literal["phase"] = "phase"
    phase: Phase
    message: str | None = None
    done: int | None = None
    total: int | None = None


class Metric(EventBase):
    """One point of the curve, at an optimizer step.

    ``loss`` is the mean over every token of every rank in the steps since the last line, in nats; ``tokens`` counts
    trained tokens over the whole job; times are in seconds, ``memory_bytes`` is the peak of the fullest rank.
    ``expert_load``: each expert's share of the tokens since the last line, over all layers; null for a dense model.
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
    data_seconds: float | None = None
    memory_bytes: int | None = None
    eval_loss: float | None = None
    expert_load: list[float] | None = None
    nonfinite: bool = False


class CheckpointSaved(EventBase):
    """A checkpoint was published. ``sha256`` is that of its model.safetensors, ``bytes`` that of all its files."""

    kind: Literal["checkpoint"] = "checkpoint"
    step: Step
    path: str
    bytes: int
    sha256: str
    checkpoint_kind: Literal["full", "weights"] = "full"
    loss: float | None = None
    seconds: float | None = None


class CheckpointRemoved(EventBase):
    """Retention removed a checkpoint, or it was found damaged and set aside."""

    kind: Literal["checkpoint_removed"] = "checkpoint_removed"
    step: Step
    path: str
    checkpoint_kind: Literal["full", "weights"] = "full"
    why: str = "retention"


class Sample(EventBase):
    """A text the model wrote."""

    kind: Literal["sample"] = "sample"
    step: Step
    prompt: str
    text: str


class WarningEvent(EventBase):
    """Something the user should know of; training goes on."""

    kind: Literal["warning"] = "warning"
    code: str
    message: str
    step: Step | None = None
    data: dict[str, Any] = Field(default_factory=dict)


class ResumeVerified(EventBase):
    """A checkpoint's probe, rows that are the same for the whole job, was scored again by the attempt that goes on.

    ``expected`` is the loss that the checkpoint was saved with, ``found`` what it gives now, both means in nats a
    token; ``found`` is null where it is not finite. On the same hardware, threads and dtype the difference is 0.
    """

    kind: Literal["resume_verified"] = "resume_verified"
    step: Step
    expected: float
    found: float | None
    difference: float | None


class SettingsChanged(EventBase):
    """Settings that were changed while the run goes on; they hold for what is due behind ``step``."""

    kind: Literal["settings"] = "settings"
    step: Step
    log_interval: int
    save_interval: int
    keep_last: int
    message: str


class Finished(EventBase):
    """The last line of an attempt that ended in its own time; the same truth as outcome.json."""

    kind: Literal["finished"] = "finished"
    outcome: Literal["completed", "stopped", "failed"]
    step: Step
    reason: Reason | None = None
    message: str | None = None


Event: TypeAlias = (
    Started
    | PhaseChanged
    | Metric
    | CheckpointSaved
    | CheckpointRemoved
    | Sample
    | WarningEvent
    | ResumeVerified
    | SettingsChanged
    | Finished
)

EVENT: TypeAdapter[Event] = TypeAdapter(Annotated[Event, Field(discriminator="kind")])
"""Reads one line: ``EVENT.validate_json(line)`` raises ValidationError on anything else."""
