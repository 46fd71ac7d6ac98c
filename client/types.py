"""Types of the service's responses, for editors and type checkers. At run time they are plain dicts.

A newer service may add keys. Times are RFC 3339 strings in UTC, sizes are in bytes, durations in seconds.
"""

from typing import Any, NotRequired, TypedDict


class NextAction(TypedDict):
    """An action that may help a job that failed: a request of the API, and the same as a command."""

    action: str
    words: str
    command: str
    method: str
    path: str
    body: dict[str, Any] | None


class ErrorCard(TypedDict, total=False):
    """Why a run failed, and what to do."""

    code: str
    message: str
    hint: str | None
    rank: int | None
    traceback: str | None
    log_tail: list[str]
    peak_memory_bytes: int | None
    next: list[NextAction]


class Progress(TypedDict, total=False):
    """Progress of a run. ``step`` counts optimizer steps from 1; ``percent`` is 0 to 100.

    ``eval_loss``, ``eval_bpb``: of all held-out sets together, at ``eval_step``.
    """

    step: int | None
    steps: int | None
    epoch: float | None
    tokens: int | None
    loss: float | None
    bpb: float | None
    learning_rate: float | None
    grad_norm: float | None
    tokens_per_second: float | None
    mfu: float | None
    eta_seconds: float | None
    percent: float | None
    eval_loss: float | None
    eval_bpb: float | None
    eval_step: int | None
    updated_at: str | None


class Checkpoint(TypedDict, total=False):
    """A checkpoint that exists, is complete and loads. ``sha256`` is that of its model.safetensors."""

    object: str
    job_id: str
    attempt: int
    step: int
    path: str
    bytes: int
    sha256: str
    kind: str
    loss: float | None
    created_at: str


class CorpusProgress(TypedDict, total=False):
    """Progress of the preparation of a corpus."""

    done_bytes: int | None
    total_bytes: int | None
    percent: float | None
    bytes_per_second: float | None
    eta_seconds: float | None


class TokenizedCorpus(TypedDict, total=False):
    """A corpus with its tokenizer, tokenized once for all jobs. ``spec``: the fields of a job spec's ``data``.

    ``report``: what it holds, a `contract.corpus_report.CorpusReport`; None until it is tokenized.
    """

    object: str
    id: str
    status: str
    cached: bool
    spec: dict[str, Any]
    launcher: str
    attempt: int | None
    progress: CorpusProgress | None
    report: dict[str, Any] | None
    reason: str | None
    message: str | None
    error: ErrorCard | None
    jobs: list[str]
    restart_at: str | None
    submitted_by: str | None
    created_at: str
    started_at: str | None
    finished_at: str | None


class Export(TypedDict, total=False):
    """An exported checkpoint. ``path`` is on the service's host."""

    object: str
    id: str
    job_id: str
    step: int
    format: str
    path: str
    bytes: int
    files: list[dict[str, Any]]


class GeneratedText(TypedDict, total=False):
    """The continuation of a prompt. ``tokens``: how many new tokens it has. ``finish_reason``: stop or length."""

    object: str
    job_id: str
    step: int
    text: str
    tokens: int
    prompt_tokens: int
    finish_reason: str
    chat_template: bool
    device: str


class Action(TypedDict, total=False):
    """Whether an action is allowed in the job's present state, and if not, why."""

    action: str
    allowed: bool
    why_not: str | None


class Queue(TypedDict, total=False):
    """Position of a queued job, and what it waits for."""

    position: int | None
    waiting_for: str | None


class PlanSource(TypedDict):
    """A source of a planned run's corpus. ``passes``: how often the run reads it."""

    name: str
    files: int
    documents: int | None
    tokens: int | None
    share: float | None
    passes: float | None


class EvalSet(TypedDict):
    """A held-out set. ``tokens``: those that are predicted. ``duplicates``: counted with ``eval_fraction``."""

    name: str
    files: int
    documents: int | None
    tokens: int | None
    duplicates: int | None


class MemoryOption(TypedDict):
    """Memory of each rank with one parallelism, with or without gradient checkpointing; ``fits``: None if unknown."""

    parallelism: str
    gradient_checkpointing: bool
    memory_bytes: dict[str, int | None]
    fits: bool | None


class Plan(TypedDict, total=False):
    """Size and cost of a run. ``estimated``: the numbers that depend on the corpus come from a sample of it."""

    parameters: int | None
    active_parameters: int | None
    tokens: int | None
    samples: int | None
    bad_lines: int | None
    duplicates: int | None
    eval_sets: list[EvalSet]
    special_tokens: int | None
    special_texts: int | None
    bos_token: str | None
    eos_token: str | None
    steps: int | None
    base_step: int
    tokens_per_step: float | None
    world_size: int | None
    memory_bytes: dict[str, int | None]
    memory_limit_bytes: int | None
    memory_options: list[MemoryOption]
    suggested_batch_size: int | None
    settings_that_fit: dict[str, dict[str, Any]] | None
    checkpoint_bytes: int | None
    snapshot_bytes: int | None
    disk_free_bytes: int | None
    flops: float | None
    eta_seconds: float | None
    eta_basis: str | None
    expected_first_loss: float | None
    learning_rate: list[tuple[int, float]] | None
    learning_rate_before: float | None
    learning_rate_after: float | None
    estimated: bool
    warnings: list[str]
    advice: list[str]
    sources: list[PlanSource]
    queue: Queue


class ProposedSetting(TypedDict):
    """One proposed value, its place in the spec, and why. ``source``: a publication, or None."""

    pointer: str
    value: int | float | str
    reason: str
    source: str | None


class Proposal(TypedDict):
    """A spec to edit, see `Client.propose`. ``parameters``: those of the proposed model."""

    object: str
    depth: int
    parameters: int
    spec: dict[str, Any]
    settings: list[ProposedSetting]


class Score(TypedDict):
    """What a job is ranked by; less is better.

    ``metric``: bpb (best held-out bits per byte), eval_loss (the best one) or loss (the newest smoothed one).
    """

    metric: str
    value: float
    step: int


class LimitsLeft(TypedDict):
    """What is left of ``limits.max_minutes`` and ``training.max_tokens``; null if not limited."""

    seconds: float | None
    tokens: int | None


class Token(TypedDict, total=False):
    """A named token, without its secret."""

    object: str
    id: str
    name: str
    scope: str
    max_jobs: int | None
    max_devices: int | None
    jobs: int
    devices: int
    created_by: str
    created_at: str
    rotated_at: str | None
    previous_until: str | None
    expires_at: str | None
    revoked_at: str | None
    last_used_at: str | None


class NewToken(Token, total=False):
    """A token with its secret, which is returned only once."""

    token: str


class HeldOutResult(TypedDict):
    """The evaluation of a held-out set: loss in nats per token, and bits per byte of text."""

    loss: float | None
    bpb: float | None


class Metric(TypedDict, total=False):
    """One point of the curve. ``loss`` is the mean over all tokens since the previous point, ``bpb`` in bits per byte.

    ``eval``: the results of each held-out set, by its name; ``eval_loss`` and ``eval_bpb``: of all sets together.
    """

    job_id: str
    step: int
    attempt: int
    epoch: float
    loss: float | None
    aux_loss: float | None
    learning_rate: float
    grad_norm: float | None
    tokens: int
    tokens_per_second: float | None
    mfu: float | None
    step_seconds: float | None
    step_seconds_max_rank: int | None
    step_seconds_spread: float | None
    data_seconds: float | None
    memory_bytes: int | None
    eval_loss: float | None
    eval_bpb: float | None
    eval: dict[str, HeldOutResult] | None
    bpb: float | None
    nonfinite: bool
    at: str


class CurvePoint(TypedDict, total=False):
    """Some steps of a curve, from ``first_step`` to ``step``. Losses are in nats per token.

    ``loss`` is the last one, ``loss_ema`` the running mean at ``step``. A loss is None if none was finite;
    ``nonfinite_count``: how many were not.
    """

    job_id: str
    first_step: int
    step: int
    attempt: int
    count: int
    loss: float | None
    loss_mean: float | None
    loss_min: float | None
    loss_max: float | None
    loss_ema: float | None
    nonfinite_count: int
    nonfinite: bool


class TaskScore(TypedDict, total=False):
    """The scores on one task, at a step of the training or of a checkpoint. ``evaluation_id``: null if in training."""

    object: str
    id: str
    evaluation_id: str | None
    job_id: str
    attempt: int | None
    step: int
    task: str
    kind: str
    state: str
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
    created_at: str
    started_at: str | None
    finished_at: str | None


class Evaluation(TypedDict, total=False):
    """An evaluation of a checkpoint. ``state``: pending, running, done or failed."""

    object: str
    id: str
    job_id: str
    step: int
    state: str
    device: str | None
    error: str | None
    requested_by: str
    created_at: str
    started_at: str | None
    finished_at: str | None
    results: list[TaskScore]


class LogChunk(TypedDict):
    """A part of a log, and the offset of the next one."""

    data: str
    next_offset: int


class Version(TypedDict, total=False):
    """Name and version of the service. ``caller``, ``scope``: of the token that asked."""

    name: str
    version: str
    api: int
    python: str
    database: str
    caller: NotRequired[str]
    scope: NotRequired[str]


class Webhook(TypedDict):
    """A webhook. ``secret`` is there only if it is new; None for a URL of Apprise's kinds."""

    object: str
    id: str
    url: str
    description: str
    events: list[str]
    labels: dict[str, str]
    job_id: str | None
    rules: list[dict[str, Any]]
    enabled: bool
    disabled_reason: str | None
    failures: int
    failing_since: str | None
    retry_at: str | None
    succeeded_at: str | None
    old_secret_until: str | None
    created_at: str
    updated_at: str
    secret: NotRequired[str | None]


class Delivery(TypedDict):
    """Delivery of one event to one webhook. Each of ``tries`` has ``at, status, seconds, error, response``."""

    object: str
    id: str
    webhook_id: str
    event_id: str
    type: str
    job_id: str | None
    state: str
    attempts: int
    tries: list[dict[str, Any]]
    next_attempt_at: str | None
    redelivers: str | None
    created_at: str
    ended_at: str | None
    payload: NotRequired[dict[str, Any]]
