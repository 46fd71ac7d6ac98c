"""Models of the API's responses, and of the request bodies of tokens. A field without a value is null, not missing."""

from datetime import datetime
from typing import Annotated, Any, Generic, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from trainyard.contract.corpus_report import CorpusReport
from trainyard.contract.events import HeldOutResult
from trainyard.contract.messages import ErrorCard, FailureCard
from trainyard.contract.patterns import TOKEN_NAME
from trainyard.contract.scopes import Scope
from trainyard.contract.status import CorpusStatus, Desired, JobStatus
from trainyard.contract.task_files import TaskKind
from trainyard.service.bodies import OptionalBody, StrictBody
from trainyard.service.notice_urls import masked_url

T = TypeVar("T")


class ResponseModel(BaseModel):
    """Base of response models. Built from a database row or a mapping."""

    model_config = ConfigDict(frozen=True, from_attributes=True)


class Page(ResponseModel, Generic[T]):
    """One page of a list. The next page is ``after=<last id>``, or ``after_step=<last step>`` for metrics."""

    object: Literal["list"] = "list"
    data: list[T]
    has_more: bool


class MemoryPlan(ResponseModel):
    """Memory of each rank, in bytes."""

    weights: int | None = None
    gradients: int | None = None
    optimizer: int | None = None
    activations: int | None = None


class RankPlace(ResponseModel):
    """Where a rank runs. ``name``: the model of its device."""

    rank: int
    host: str
    device: str
    name: str
    pci_bus_id: str | None = None


class EvalSet(ResponseModel):
    """A held-out set. ``tokens``: those that are predicted. null: unknown, or not counted."""

    name: str
    files: int
    documents: int | None
    tokens: int | None
    duplicates: int | None = None


class MemoryOption(ResponseModel):
    """Memory of each rank with one parallelism, with or without gradient checkpointing.

    ``fits``: null if the memory of the device is unknown.
    """

    parallelism: str
    gradient_checkpointing: bool
    memory_bytes: MemoryPlan
    fits: bool | None


class Plan(ResponseModel):
    """Size of a run. Fields that depend on the corpus are null until an attempt has started.

    ``base_step``: steps of a fork's ancestors before its own schedule; ``steps`` includes them.
    ``snapshot_bytes``: memory of rank 0's host for the copies of the state that a save is written from.
    ``estimated``: fields that depend on the corpus are estimated from a sample of it. ``eta_basis``: the source of the
    speed. ``learning_rate_before``: at the checkpoint of the last resume, ``learning_rate_after``: at the next step.
    """

    parameters: int | None = None
    active_parameters: int | None = None
    tokens: int | None = None
    samples: int | None = None
    documents: int | None = None
    bad_lines: int | None = None
    duplicates: int | None = None
    eval_sets: list[EvalSet] = []
    special_tokens: int | None = None
    special_texts: int | None = None
    bos_token: str | None = None
    eos_token: str | None = None
    steps: int | None = None
    base_step: int = 0
    steps_per_epoch: int | None = None
    tokens_per_step: float | None = None
    global_batch: int | None = None
    world_size: int | None = None
    device: str | None = None
    device_name: str | None = None
    ranks: list[RankPlace] = []
    dtype: str | None = None
    torch_version: str | None = None
    vocab_size: int | None = None
    flops_per_token: float | None = None
    memory_bytes: MemoryPlan = MemoryPlan()
    checkpoint_bytes: int | None = None
    snapshot_bytes: int | None = None
    disk_free_bytes: int | None = None
    flops: float | None = None
    eta_seconds: float | None = None
    eta_basis: str | None = None
    memory_limit_bytes: int | None = None
    expected_first_loss: float | None = None
    learning_rate_before: float | None = None
    learning_rate_after: float | None = None
    warnings: list[str] = []
    estimated: bool = False


class Progress(ResponseModel):
    """Progress of the job at its last report. ``percent`` is 0 to 100. ``step`` is 0 before the first report."""

    step: int = 0
    steps: int | None = None
    epoch: float | None = None
    tokens: int | None = None
    loss: float | None = None
    bpb: float | None = None
    learning_rate: float | None = None
    grad_norm: float | None = None
    tokens_per_second: float | None = None
    mfu: float | None = None
    eta_seconds: float | None = None
    step_seconds_max_rank: int | None = None
    step_seconds_spread: float | None = None
    percent: float | None = None
    eval_loss: float | None = None
    eval_bpb: float | None = None
    eval_step: int | None = None
    updated_at: datetime | None = None
    nonfinite: bool = False
    train_seconds: float | None = None


class Queue(ResponseModel):
    """Position of a queued job (1 is next; null in a cluster's queue), and what it waits for."""

    position: int | None
    waiting_for: str


class PlanSource(ResponseModel):
    """A source of the corpus. ``share`` of the tokens that the run reads; ``passes`` over the source; null: unknown."""

    name: str
    files: int
    documents: int | None
    tokens: int | None
    share: float | None
    passes: float | None


class PlanPreview(Plan):
    """The plan of a run that is not submitted, and its position in the queue.

    ``start_step``: the step that a fork starts from; its time and FLOPs are those of the remaining steps.
    ``learning_rate``: (step, rate) of at most 200 steps; null if the number of steps is unknown. ``settings_that_fit``:
    changes of the spec, by group and field, that make the run fit; null if it fits, or if none help.
    """

    object: Literal["plan"] = "plan"
    start_step: int = 0
    learning_rate: list[tuple[int, float]] | None = None
    memory_options: list[MemoryOption] = []
    suggested_batch_size: int | None = None
    settings_that_fit: dict[str, dict[str, Any]] | None = None
    sources: list[PlanSource] = []
    advice: list[str] = []
    queue: Queue


class ProposedSetting(ResponseModel):
    """One proposed value, where it is in the spec, and why. ``source``: a publication, or null."""

    pointer: str
    value: int | float | str
    reason: str
    source: str | None


class Proposal(ResponseModel):
    """A spec for a run of some depth, by published rules, to be edited. What the client gave is unchanged."""

    object: Literal["proposal"] = "proposal"
    depth: int
    parameters: int
    spec: dict[str, Any]
    settings: list[ProposedSetting]


class Parent(ResponseModel):
    """The job and checkpoint that a fork started from. ``data``: keep or restart."""

    job_id: str
    step: int | None
    data: str | None = None


class Placement(ResponseModel):
    """Placement of an attempt on a cluster, as the cluster reports it. ``engine_id`` is the cluster's job id.

    ``devices``: ``node1/cuda:0``, or ``node1/cpu:0`` if it has no GPU on the node.
    """

    engine_id: str
    state: str
    waiting_for: str | None
    nodes: list[str]
    devices: list[str]


class AllowedAction(ResponseModel):
    """Whether an action is allowed in the current status, and if not, why."""

    action: str
    allowed: bool
    why_not: str | None


class Alert(ResponseModel):
    """A problem of the run that the user should know about."""

    code: str
    message: str
    step: int | None = None
    at: datetime


class Checkpoint(ResponseModel):
    """A published checkpoint. ``sha256`` is that of model.safetensors; ``bytes`` is the size of all its files."""

    object: Literal["checkpoint"] = "checkpoint"
    id: str
    job_id: str
    attempt: int
    step: int
    path: str
    bytes: int
    sha256: str
    kind: str
    loss: float | None
    created_at: datetime


class Score(ResponseModel):
    """What a job is ranked by; less is better. ``step``: the step that ``value`` is of.

    ``metric``: bpb, the best held-out bits per byte; eval_loss, the best one; or loss, the newest smoothed one.
    """

    metric: Literal["bpb", "eval_loss", "loss"]
    value: float
    step: int


class LimitsLeft(ResponseModel):
    """What is left of ``limits.max_minutes`` and ``training.max_tokens``, at the last report; null if not limited."""

    seconds: float | None
    tokens: int | None


class CorpusProgress(ResponseModel):
    """Progress of the preparation of a corpus. ``percent`` is 0 to 100."""

    done_bytes: int | None
    total_bytes: int | None
    percent: float | None
    bytes_per_second: float | None
    eta_seconds: float | None


class TokenizedCorpus(ResponseModel):
    """A corpus with its tokenizer: tokenized on CPUs, once, for all jobs that have the same.

    ``status``: queued, preparing, ready, failed or stopped. ``cached``: its token shards are in the cache. ``spec``:
    the fields of a job spec's ``data``. ``jobs``: the jobs with this corpus. ``progress``: null once it is ready.
    ``report``: what it holds; null until it is ready.
    """

    object: Literal["corpus"] = "corpus"
    id: str
    status: CorpusStatus
    cached: bool
    spec: dict[str, Any]
    launcher: str
    attempt: int | None
    progress: CorpusProgress | None
    reason: str | None
    message: str | None
    error: ErrorCard | None
    jobs: list[str]
    report: CorpusReport | None
    restart_at: datetime | None
    submitted_by: str | None
    created_at: datetime
    started_at: datetime | None
    finished_at: datetime | None


class JobSummary(ResponseModel):
    """One pretraining run, without its spec, plan and allowed actions: an entry of a light list.

    ``preparation``: the progress of its corpus while the status is preparing, else null.
    """

    object: Literal["job"] = "job"
    id: str
    name: str
    labels: dict[str, str]
    description: str
    group: str | None
    discarded: bool
    score: Score | None
    limits_left: LimitsLeft | None
    status: JobStatus
    desired: Desired
    phase: str | None
    corpus_id: str | None
    preparation: CorpusProgress | None
    reason: str | None
    message: str | None
    error: FailureCard | None
    progress: Progress
    attempt: int | None
    resumable: bool
    resume_blocker: str | None
    checkpoint: Checkpoint | None
    queue: Queue | None
    placement: Placement | None
    parent: Parent | None
    owner: str
    submitted_by: str | None
    summary: str
    alerts: list[Alert]
    restart_at: datetime | None
    created_at: datetime
    queued_at: datetime | None
    started_at: datetime | None
    finished_at: datetime | None


class Job(JobSummary):
    """One pretraining run. ``weights_path``: the weights alone, in MiniMind's format, if they are written."""

    spec: dict[str, Any]
    plan: Plan
    allowed_actions: list[AllowedAction]
    weights_path: str | None = None


class ResumedJob(Job):
    """A job that was resumed, with the rates of the checkpoint's step and of the next one; null if it has none."""

    learning_rate_before: float | None
    learning_rate_after: float | None


class Event(ResponseModel):
    """An event of a job. ``actor``: the name of a token, admin, local, service, scheduler or agent."""

    object: Literal["event"] = "event"
    id: str
    job_id: str
    attempt: int | None
    kind: str
    actor: str
    message: str
    data: dict[str, Any]
    at: datetime


class Attempt(ResponseModel):
    """One launch of a job's workers. ``trigger``: submit, resume, restart or preemption."""

    object: Literal["attempt"] = "attempt"
    id: str
    job_id: str
    number: int
    trigger: str
    launcher: str
    placement: Placement | None
    devices: list[str]
    start_step: int | None
    end_step: int | None
    outcome: str | None
    reason: str | None
    message: str | None
    error: ErrorCard | None
    ranks: list[Any]
    created_at: datetime
    launched_at: datetime | None
    started_at: datetime | None
    heard_at: datetime | None
    ended_at: datetime | None


class ExportedFile(ResponseModel):
    """A file of an export."""

    name: str
    bytes: int


class Export(ResponseModel):
    """A checkpoint exported to a Hugging Face directory or to MiniMind's format."""

    object: Literal["export"] = "export"
    id: str
    job_id: str
    step: int
    format: str
    path: str
    bytes: int
    files: list[ExportedFile]


class GeneratedText(ResponseModel):
    """The continuation of a prompt by a checkpoint. ``tokens``: how many new tokens it has."""

    object: Literal["generation"] = "generation"
    job_id: str
    step: int
    text: str
    tokens: int
    prompt_tokens: int
    finish_reason: Literal["stop", "length"]
    chat_template: bool
    device: str


class OpenAIModel(ResponseModel):
    """A checkpoint, in OpenAI's format. ``id`` is ``<job>@<step>``, or ``<job>@latest`` for the newest."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str
    name: str
    step: int


class OpenAIModels(ResponseModel):
    """All models, in OpenAI's format."""

    object: Literal["list"] = "list"
    data: list[OpenAIModel]


class OpenAILogprobs(ResponseModel):
    """Log-probabilities of the tokens of a choice, in OpenAI's format."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class OpenAIChoice(ResponseModel):
    """One continuation, in OpenAI's format."""

    text: str
    index: int
    logprobs: OpenAILogprobs | None
    finish_reason: Literal["stop", "length"] | None


class OpenAIUsage(ResponseModel):
    """Numbers of tokens, in OpenAI's format."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class OpenAICompletion(ResponseModel):
    """Continuations of prompts, or a part of them in a stream, in OpenAI's format."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[OpenAIChoice]
    usage: OpenAIUsage | None = None


class Sample(ResponseModel):
    """A text that the model generated at a step. ``note``: what was cut because it did not fit, or null."""

    object: Literal["sample"] = "sample"
    id: str
    job_id: str
    attempt: int
    step: int
    prompt: str
    text: str
    note: str | None
    at: datetime


class TaskScore(ResponseModel):
    """The scores on one task: of the weights at a step during training, or of a checkpoint on request.

    ``attempt``: the attempt that measured it during training; null: an evaluation, ``evaluation_id``, did.
    """

    object: Literal["task_score"] = "task_score"
    id: str
    evaluation_id: str | None
    job_id: str
    attempt: int | None
    step: int
    task: str
    kind: TaskKind
    state: Literal["pending", "running", "done", "failed"]
    examples: int | None
    acc: float | None
    acc_norm: float | None
    bpb: float | None
    truncated: int | None
    path: str | None
    file_sha256: str | None
    seconds: float | None
    device: str | None
    error: str | None
    requested_by: str | None
    created_at: datetime
    started_at: datetime | None
    finished_at: datetime | None


class Evaluation(ResponseModel):
    """The evaluation of a checkpoint on tasks. ``state``: failed if any of its tasks has failed."""

    object: Literal["evaluation"] = "evaluation"
    id: str
    job_id: str
    step: int
    state: Literal["pending", "running", "done", "failed"]
    device: str | None
    error: str | None
    requested_by: str
    created_at: datetime
    started_at: datetime | None
    finished_at: datetime | None
    results: list[TaskScore]


class LogChunk(ResponseModel):
    """A part of a log. The next part starts at ``next_offset``."""

    data: str
    next_offset: int


class LogLines(ResponseModel):
    """Lines of a log from number ``first_line`` on. ``total_lines`` are in the first ``bytes`` of the log."""

    object: Literal["log_lines"] = "log_lines"
    first_line: int
    lines: list[str]
    total_lines: int
    bytes: int


class LogMatch(ResponseModel):
    """A matching line: its number, counted from 1, and the byte offset of its start."""

    line: int
    offset: int
    text: str


class LogMatches(ResponseModel):
    """Matches in the order of the log. ``searched_lines``: the number of lines searched."""

    object: Literal["list"] = "list"
    data: list[LogMatch]
    has_more: bool
    searched_lines: int


class Health(ResponseModel):
    """The process responds."""

    status: Literal["ok"] = "ok"


class Version(ResponseModel):
    """Versions of the service, the API and Python, the kind of database, and who calls with which scope."""

    name: str
    version: str
    api: int
    python: str
    database: str
    caller: str
    scope: Scope


class Metric(ResponseModel):
    """A point of the curve. ``fields`` selects all but the first two. A value not measured or not finite is null."""

    step: int
    attempt: int
    epoch: float | None = None
    loss: float | None = None
    aux_loss: float | None = None
    learning_rate: float | None = None
    grad_norm: float | None = None
    tokens: int | None = None
    tokens_per_second: float | None = None
    mfu: float | None = None
    step_seconds: float | None = None
    step_seconds_max_rank: int | None = None
    step_seconds_spread: float | None = None
    data_seconds: float | None = None
    memory_bytes: int | None = None
    eval_loss: float | None = None
    expert_load: list[Any] | None = None
    nonfinite: bool | None = None
    bpb: float | None = None
    eval_bpb: float | None = None
    eval: dict[str, HeldOutResult] | None = None
    train_seconds: float | None = None
    at: datetime | None = None
    job_id: str | None = None


class Bucket(ResponseModel):
    """Several consecutive points of the curve. ``loss`` is the last one. Means leave out values that are not finite."""

    first_step: int
    step: int
    attempt: int
    count: int
    loss: float | None
    loss_mean: float | None
    loss_min: float | None
    loss_max: float | None
    loss_ema: float | None
    loss_smooth: float | None = None
    nonfinite_count: int
    nonfinite: bool | None = None
    job_id: str | None = None


class MetricPage(ResponseModel):
    """Points, or with ``max_points`` buckets of ``resolution`` steps.

    ``lineage`` is set if it was requested; ``smooth_width``, the width of the kernel in steps, if one was requested.
    """

    object: Literal["list"] = "list"
    data: list[Bucket | Metric]
    has_more: bool
    resolution: int | None = None
    smooth_width: float | None = None
    lineage: list[Any] | None = None


class FieldError(ResponseModel):
    """The place of a mistake (an RFC 6901 pointer) and what is expected there."""

    pointer: str
    message: str


class ProblemDetails(ResponseModel):
    """RFC 9457. ``code`` is for programs, ``detail`` for people; ``errors`` lists all mistakes of a spec or request."""

    model_config = ConfigDict(extra="allow")

    type: str
    title: str
    status: int
    code: str
    detail: str
    request_id: str | None
    errors: list[FieldError] = []


class OpenAIError(ResponseModel):
    """An error in OpenAI's format. ``param``: the field at fault."""

    message: str
    type: str
    param: str | None
    code: str
    request_id: str | None


class OpenAIErrorBody(ResponseModel):
    """The body of an error response in OpenAI's format."""

    error: OpenAIError


MAX_INT32 = 2**31 - 1

TEN_YEARS = 3650 * 86_400

Lifetime = Annotated[int, Field(ge=1, le=TEN_YEARS, description="seconds from now on; null: it does not expire")]

Quota = Annotated[int, Field(ge=0, le=MAX_INT32, description="null: no limit")]


class QuotaRequest(StrictBody):
    """Limits on a token's queued and running jobs."""

    max_jobs: Quota | None = None
    max_devices: Quota | None = None


class TokenRequest(QuotaRequest):
    """A token to create. Its name is never used again."""

    name: Annotated[str, Field(pattern=TOKEN_NAME)]
    scope: Literal["read", "submit", "operate", "admin"] = "read"
    expires_in: Lifetime | None = None


class RotationRequest(OptionalBody):
    """A new secret for a token. ``overlap``: seconds for which the previous one stays valid."""

    overlap: Annotated[int, Field(ge=0, le=TEN_YEARS)] = 0
    expires_in: Lifetime | None = None


class Token(ResponseModel):
    """A named token. ``jobs`` and ``devices`` count its queued and running jobs."""

    object: Literal["token"] = "token"
    id: str
    name: str
    scope: str
    max_jobs: int | None
    max_devices: int | None
    jobs: int
    devices: int
    created_by: str
    created_at: datetime
    rotated_at: datetime | None
    previous_until: datetime | None
    expires_at: datetime | None
    revoked_at: datetime | None
    last_used_at: datetime | None


class NewToken(Token):
    """A token with its secret, which is shown only once."""

    token: str


class XidErrorResponse(ResponseModel):
    """An error that the driver reported for a GPU, and the time of it."""

    xid: int
    at: datetime


class DeviceResponse(ResponseModel):
    """A device, the attempt that leases it, and processes on it that belong to no attempt."""

    object: Literal["device"] = "device"
    id: str
    kind: str
    model: str | None = None
    memory_bytes: int | None = None
    memory_used_bytes: int | None = None
    temperature_celsius: int | None = None
    uuid: str | None = None
    pci_bus_id: str | None = None
    numa_node: int | None = None
    link: Literal["nvlink", "pcie"] | None = None
    nvlink_peers: list[str] = Field(default_factory=list)
    xid_errors: list[XidErrorResponse] = Field(default_factory=list)
    fault: str | None = None
    job_id: str | None
    attempt_id: str | None
    processes: list[int] = Field(default_factory=list)


class ReadyPart(ResponseModel):
    """The health of one component of the service. ``detail`` contains no path, address or secret."""

    name: str
    ok: bool
    detail: str


class Readiness(ResponseModel):
    """The service is ready."""

    status: Literal["ok"] = "ok"
    parts: list[ReadyPart]


class DiskUsage(ResponseModel):
    """A file system that the service writes to. ``state``: ok, low (below ``low_below_bytes``), full or unreadable."""

    id: str
    paths: list[str]
    state: str
    total_bytes: int | None
    free_bytes: int | None
    low_below_bytes: int | None


class ServiceStatus(ResponseModel):
    """The state of the service. ``schedules``: whether it is the one that schedules."""

    object: Literal["status"] = "status"
    ready: bool
    schedules: bool
    parts: list[ReadyPart]
    disks: list[DiskUsage]


class Webhook(ResponseModel):
    """A webhook. A ``url`` of Apprise's kinds is shown as ``KIND://***``.

    ``failing_since``: no delivery has succeeded since then.
    ``old_secret_until``: until then deliveries are also signed with the previous secret.
    """

    object: Literal["webhook"] = "webhook"
    id: str
    url: Annotated[str, AfterValidator(masked_url)]
    description: str
    events: list[str]
    labels: dict[str, str]
    job_id: str | None
    rules: list[dict[str, Any]]
    enabled: bool
    disabled_reason: str | None
    failures: int
    failing_since: datetime | None
    retry_at: datetime | None
    succeeded_at: datetime | None
    old_secret_until: datetime | None
    created_at: datetime
    updated_at: datetime


class WebhookWithSecret(Webhook):
    """A webhook with its secret, which is shown only once. It is null if ``url`` is of Apprise's kinds."""

    secret: str | None


class DeliveryAttempt(ResponseModel):
    """One attempt at a delivery. ``status`` is null if there was no response; ``error`` is the reason of a failure."""

    at: datetime
    status: int | None
    seconds: float
    error: str | None
    response: str | None


class Delivery(ResponseModel):
    """The delivery of one event to one receiver. ``tries``: the last attempts at it."""

    object: Literal["delivery"] = "delivery"
    id: str
    webhook_id: str
    event_id: str
    type: str
    job_id: str | None
    state: Literal["pending", "delivered", "failed"]
    attempts: int
    tries: list[DeliveryAttempt]
    next_attempt_at: datetime | None
    redelivers: str | None
    created_at: datetime
    ended_at: datetime | None


class DeliveryWithPayload(Delivery):
    """A delivery with its payload."""

    payload: dict[str, Any]
