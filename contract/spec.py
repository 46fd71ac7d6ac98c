"""The job spec: what a user asks for. Frozen, every field validated once, here.

`JobSpec` is the resolved form that is stored, returned and run. What a client sends goes through `contract.parsing`,
which also knows the aliases and reports every mistake at once.
"""

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Discriminator, Field, Tag, model_validator

from trainyard.contract import patterns
from trainyard.contract.task_files import TaskKind
from trainyard.contract.tokenizer_info import SpecialTokens
from trainyard.model.config import ModelConfig


def _encodable(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("holds a lone surrogate, which is no text") from None
    return text


def _printable(text: str) -> str:
    if not text.isprintable():
        raise ValueError("must be one line of printable characters")
    return _encodable(text)


def _text(text: str) -> str:
    # PostgreSQL cannot store it.
    if "\0" in text:
        raise ValueError("must not hold a NUL character")
    return _encodable(text)


def _path(text: str) -> str:
    if "\0" in text:
        raise ValueError("must not hold a NUL character")
    return _encodable(text)


LONG = 2**53 - 1
"""The largest integer that every JSON reader keeps exactly."""

MAX_SOURCES = 256
"""`worker.data.mixture` stores the source of a row in one byte."""

Name = Annotated[str, Field(min_length=1, max_length=200), AfterValidator(_printable)]
LabelValue = Annotated[str, Field(max_length=200), AfterValidator(_printable)]
PathText = Annotated[str, Field(min_length=1, max_length=4096), AfterValidator(_path)]
FileStem = Annotated[str, Field(pattern=patterns.FILE_STEM)]
Prompt = Annotated[str, Field(max_length=4000), AfterValidator(_encodable)]
Description = Annotated[str, Field(max_length=10_000), AfterValidator(_text)]
Positive = Annotated[int, Field(ge=1, le=LONG)]
NonNegative = Annotated[int, Field(ge=0, le=LONG)]
Beta = Annotated[float, Field(ge=0, lt=1)]
Multiplier = Annotated[float, Field(gt=0, le=1000)]
Seconds = Annotated[float, Field(gt=0, le=30 * 86400)]
Nodes = Annotated[int, Field(ge=1, le=4096)]
Parallelism = Literal["ddp", "zero1", "fsdp"]
SlurmWord = Annotated[str, Field(pattern=patterns.SLURM_WORD)]
SlurmLine = Annotated[str, Field(pattern=patterns.SLURM_OPTION)]


class Group(BaseModel):
    """A group of the spec: frozen, strict, unknown keys and non-finite numbers are rejected."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


def _path_or_paths(value: Any) -> str:
    return "[paths]" if isinstance(value, list) else "[path]"


DataPath = Annotated[
    Annotated[PathText, Tag("[path]")]
    | Annotated[Annotated[list[PathText], Field(min_length=1, max_length=10_000)], Tag("[paths]")],
    Discriminator(_path_or_paths),
]
"""A file, a directory, a glob, or a list of these. See `contract.corpus_files`."""

SourceName = Annotated[str, Field(pattern=patterns.SOURCE_NAME)]
TaskName = Annotated[str, Field(pattern=patterns.TASK_NAME)]


class SourceSpec(Group):
    """One source of a corpus that has several."""

    name: SourceName = Field(description="name in metrics and in the plan; unique")
    path: DataPath = Field(description="as data_path")
    weight: Annotated[float, Field(gt=0, le=1e9)] | None = Field(
        None, description="share of the tokens, relative to the other weights; null: each document once per epoch"
    )
    text_field: Name | None = Field(None, description="null: data.text_field")


class EvalSourceSpec(Group):
    """One held-out set."""

    name: SourceName = Field(description="name in metrics and charts; unique")
    path: DataPath = Field(description="as data_path")
    text_field: Name | None = Field(None, description="null: data.text_field")
    max_tokens: Positive | None = Field(
        None,
        description="evaluate only the first whole documents that fit into this number of tokens, but at "
        "least one; null: all",
    )


class DataSpec(Group):
    """Corpus and tokenizer."""

    data_path: DataPath | None = Field(
        None,
        description="corpus: a file, a directory, a glob with `*`, `?` or `**`, or a list of these; files are JSONL "
        "with one document per line, or plain text, both optionally gzip- or zstd-compressed; or Parquet; required "
        "unless sources is given",
    )
    sources: Annotated[list[SourceSpec], Field(min_length=1, max_length=MAX_SOURCES)] | None = Field(
        None, description="several sources instead of data_path, mixed by weight"
    )
    tokenizer_path: PathText = Field(
        "byte", description='directory with a tokenizer.json, or "byte" for bytes as tokens'
    )
    special_tokens: SpecialTokens = Field(
        "text",
        description="special tokens written in a text, such as <|im_end|>. text: tokenized as ordinary text; "
        "tokens: read as their ids, as in MiniMind, whose corpora need it",
    )
    text_field: Name = Field("text", description="JSON key of the text, or its Parquet column")
    max_seq_len: Annotated[int, Field(ge=2, le=2**20)] = Field(340, description="sequence length in tokens")
    packing: Literal["document", "none"] = Field(
        "document",
        description="document: several documents share a sequence, without attention between them; "
        "none: one document per sequence",
    )
    max_bad_lines: Annotated[float, Field(ge=0, le=1)] = Field(
        0.01, description="maximum fraction of invalid documents; above it the run fails"
    )
    eval_data_path: DataPath | None = Field(
        None, description="held-out data, in the same forms as data_path: one held-out set, called eval"
    )
    eval_sources: Annotated[list[EvalSourceSpec], Field(min_length=1, max_length=MAX_SOURCES)] | None = Field(
        None, description="several held-out sets instead of eval_data_path, each with its own loss and bits per byte"
    )
    eval_fraction: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.0,
        description="fraction of the documents of each source that is held out, if there is no other held-out data; "
        "documents with the same text are held out together",
    )
    num_workers: Annotated[int, Field(ge=0, le=256)] | None = Field(
        None, description="tokenization threads; 0: one thread; null: one per core"
    )

    @property
    def training_sources(self) -> list[SourceSpec]:
        """The sources to train on. A ``data_path`` is one source, called ``data``."""
        if self.sources is not None:
            return self.sources
        assert self.data_path is not None, "parsing requires one of the two"
        return [SourceSpec(name="data", path=self.data_path)]

    @property
    def held_out_sources(self) -> list[EvalSourceSpec]:
        """The held-out sets that have files of their own: none with ``eval_fraction``."""
        if self.eval_sources is not None:
            return self.eval_sources
        if self.eval_data_path is not None:
            return [EvalSourceSpec(name="eval", path=self.eval_data_path)]
        return []

    @property
    def is_mixture(self) -> bool:
        """Whether the sources have weights. A weighted mixture has no epochs."""
        return any(source.weight is not None for source in self.training_sources)

    @property
    def corpus_name(self) -> str:
        """The corpus in a message: its path, or the names of its sources."""
        if self.sources is not None:
            return f"sources {', '.join(source.name for source in self.sources)}"
        return ", ".join(paths_in(self.data_path))


def paths_in(data_path: str | list[str] | None) -> list[str]:
    """Return the entries of a ``data_path``."""
    return [] if data_path is None else [data_path] if isinstance(data_path, str) else data_path


class TrainingSpec(Group):
    """Training. A step is an optimizer step."""

    recipe: Literal["minimind", "fast"] = Field(
        "minimind",
        description="fast: fills in the settings that reached a given loss fastest; a field that is given keeps its "
        "value. minimind: MiniMind's settings",
    )
    epochs: Positive = Field(1, description="passes over the corpus; ignored if max_steps or max_tokens is set")
    max_steps: Positive | None = Field(None, description="total number of optimizer steps; null: from epochs")
    max_tokens: Positive | None = Field(
        None,
        description="instead of max_steps: the run ends at the first step with this number of trained tokens",
    )
    batch_size: Annotated[int, Field(ge=1, le=65536)] = Field(32, description="sequences per rank per micro-batch")
    accumulation_steps: Annotated[int, Field(ge=1, le=65536)] = Field(8, description="micro-batches per step")
    learning_rate: Annotated[float, Field(gt=0, le=100)] = Field(5e-4, description="peak learning rate")
    lr_scheduler: Literal["cosine", "linear", "constant", "wsd"] = "cosine"
    min_lr_ratio: Annotated[float, Field(ge=0, le=1)] = Field(
        0.1, description="final learning rate / peak learning rate"
    )
    warmup_steps: NonNegative = Field(0, description="steps of linear warm-up")
    decay_steps: Positive | None = Field(
        None, description="with lr_scheduler wsd: steps of the decay at the end; null: from decay_fraction"
    )
    decay_fraction: Annotated[float, Field(gt=0, le=1)] | None = Field(
        0.2, description="with lr_scheduler wsd: fraction of the steps that decay; null: from decay_steps, else 0.2"
    )
    decay_shape: Literal["linear", "sqrt", "cosine"] = Field(
        "sqrt", description="with lr_scheduler wsd: shape of the decay to min_lr_ratio; sqrt: 1 - sqrt(progress)"
    )
    continued_at: Annotated[list[tuple[Positive, Positive]], Field(max_length=100)] = Field(
        default_factory=list,
        description='set by resume with schedule "continue": pairs [step, planned steps before the resume]; after each '
        "of these steps the rate decays from its value there",
    )
    optimizer: Literal["adamw", "muon"] = Field(
        "adamw", description="muon: Muon for the matrices of the layers, AdamW for embeddings, head, router and norms"
    )
    weight_decay: Annotated[float, Field(ge=0, le=100)] = Field(0.01, description="decoupled weight decay")
    weight_decay_on: Literal["all", "matrices"] = Field(
        "all",
        description="all: every parameter, as in MiniMind; matrices: only matrices, including embeddings, but no norms",
    )
    cautious_weight_decay: bool = Field(
        False,
        description="with optimizer muon: a weight of a matrix of the layers decays only in steps whose update makes "
        "it smaller as well",
    )
    weight_decay_schedule: Literal["constant", "learning_rate"] = Field(
        "constant", description="learning_rate: the weight decay changes in proportion to the learning rate"
    )
    matrix_lr_multiplier: Multiplier = Field(
        1.0, description="learning rate of the matrices of attention, feed-forward layers and experts / learning_rate"
    )
    embedding_lr_multiplier: Multiplier = Field(
        1.0, description="learning rate of the embedding, and of the output matrix if it is the same / learning_rate"
    )
    head_lr_multiplier: Multiplier = Field(
        1.0, description="learning rate of an output matrix of its own / learning_rate"
    )
    norm_lr_multiplier: Multiplier = Field(1.0, description="learning rate of the norms / learning_rate")
    zero_init_projections: bool = Field(
        False,
        description="the output projections of attention, feed-forward layers and experts start at 0, so that each "
        "layer adds nothing at first",
    )
    betas: tuple[Beta, Beta] = Field((0.9, 0.999), description="betas of AdamW")
    grad_clip: Annotated[float, Field(ge=0, le=1e9)] = Field(1.0, description="maximum gradient norm; 0: no clipping")
    dtype: Literal["bfloat16", "float16", "float32"] = Field(
        "bfloat16", description="autocast dtype; weights stay float32"
    )
    seed: Annotated[int, Field(ge=0, le=2**32 - 1)] = 42
    deterministic: bool = Field(
        False, description="use only deterministic CUDA kernels; CPU runs are always deterministic"
    )
    use_compile: bool = Field(False, description="compile the model with torch.compile")
    compile_mode: Literal["default", "reduce-overhead", "max-autotune"] = Field(
        "default",
        description="mode of torch.compile; reduce-overhead replays CUDA graphs, which helps small models on a GPU; "
        "not used with parallelism fsdp",
    )
    allow_tf32: bool = Field(
        False, description="with dtype float32 on a GPU: compute matrix products in TF32, several times faster"
    )
    gradient_checkpointing: bool = Field(
        False,
        description="keep only the inputs of the layers, and compute each layer again in the backward pass: less "
        "memory, about a third more computation, the same gradients",
    )
    loss_normalization: Literal["global_tokens", "micro_batch_mean"] = Field(
        "global_tokens",
        description="global_tokens: mean over all tokens of a step; "
        "micro_batch_mean: mean of micro-batch means, as in MiniMind",
    )
    on_nonfinite: Literal["fail", "skip", "rollback"] = Field(
        "fail", description="what to do after a step with a non-finite loss or gradient"
    )
    verify_every: Positive | None = Field(
        None,
        description="steps between verified steps, whose forward and backward passes run twice and are compared bit "
        "by bit before the update; switches deterministic kernels on, which this needs",
    )
    from_weight: PathText | None = Field(
        None,
        description="initial weights: a .pth or .safetensors file, a Hugging Face directory of the same shape, "
        "or a name such as pretrain in save_dir, as in MiniMind",
    )

    @model_validator(mode="after")
    def _decay_has_one_length(self) -> Self:
        # The default fraction must not count as given beside decay_steps. Not mode="before": then strict JSON fields
        # such as tuples get Python values, which they reject.
        if self.decay_steps is not None and "decay_fraction" not in self.model_fields_set:
            object.__setattr__(self, "decay_fraction", None)
        return self

    @property
    def is_deterministic(self) -> bool:
        """Whether only deterministic kernels are used. Others give different bits if a pass is repeated."""
        return self.deterministic or self.verify_every is not None

    def run_steps(self, steps_per_epoch: int | None, tokens_per_step: float | None) -> int | None:
        """Return the steps of the whole run, or None if unknown. With ``max_tokens`` it is an estimate.

        ``tokens_per_step``: the mean number of predicted tokens of a step.
        """
        if self.max_steps is not None:
            return self.max_steps
        if self.max_tokens is not None:
            return math.ceil(self.max_tokens / tokens_per_step) if tokens_per_step else None
        return self.epochs * steps_per_epoch if steps_per_epoch else None

    def smaller_batch(self) -> tuple[int, int] | None:
        """Return a smaller batch_size, and the accumulation_steps that keep the step's sequences; None if it is 1."""
        if self.batch_size == 1:
            return None
        factor = next(n for n in range(2, self.batch_size + 1) if self.batch_size % n == 0)
        return self.batch_size // factor, self.accumulation_steps * factor


def replace_length(training: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``training`` (JSON) without max_steps if ``changes`` sets max_tokens, and vice versa."""
    replaced = {"max_steps": "max_tokens", "max_tokens": "max_steps"}
    gone = {other for name, other in replaced.items() if changes.get(name) is not None and other not in changes}
    return {name: None if name in gone else value for name, value in training.items()}


def epochs_ignored(training: TrainingSpec) -> str:
    """Return the warning that ``max_steps`` or ``max_tokens`` overrides ``epochs``."""
    name, length = "max_steps", f"{training.max_steps:,} steps" if training.max_steps is not None else ""
    if training.max_tokens is not None:
        name, length = "max_tokens", f"{training.max_tokens:,} tokens"
    return f"epochs {training.epochs:,} is ignored, because {name} is set: the run ends after {length}"


class CheckpointSpec(Group):
    """Checkpoints and saved weights."""

    save_dir: PathText | None = Field(
        None,
        description="directory for checkpoints and weights; each job uses its own subfolder; null: the run directory",
    )
    save_weight: FileStem = Field("pretrain", description="prefix of the name of the weights file")
    save_interval: Positive = Field(1000, description="steps between checkpoints")
    save_minutes: Annotated[float, Field(gt=0, le=1e6)] | None = Field(
        None, description="minutes after which a checkpoint is also saved"
    )
    keep_last: Annotated[int, Field(ge=1, le=100000)] = Field(
        3, description="number of newest checkpoints to keep; at least 2 valid ones are kept"
    )
    keep_every: Positive | None = Field(
        None, description="keep the weights of checkpoints at multiples of this step permanently"
    )
    from_resume: bool = Field(
        False, description="start from the newest compatible checkpoint of an earlier job in save_dir, if there is one"
    )


class LimitsSpec(Group):
    """Limits at which the run saves and ends as succeeded, with reason limit."""

    max_minutes: Annotated[float, Field(gt=0, le=1e7)] | None = Field(
        None,
        description="minutes of active training, of all attempts together; loading, compiling, evaluating and waiting "
        "for a save do not count",
    )
    target_loss: Annotated[float, Field(gt=0, le=1e3)] | None = Field(
        None, description="eval_loss, or without held-out data the smoothed loss, at which the run ends"
    )


TrackerName = Literal["tensorboard", "wandb", "swanlab", "trackio"]


class ReportingSpec(Group):
    """Logging, evaluation and samples."""

    log_interval: Positive | None = Field(
        None,
        description="steps between points of the curve; null: about 100 points per run, and at least one per minute",
    )
    eval_interval: Positive | None = Field(None, description="steps between evaluations; null: at each save")
    sample_prompts: Annotated[list[Prompt], Field(max_length=32)] = Field(
        default_factory=list, description="prompts that the model continues at each save"
    )
    trackers: Annotated[list[TrackerName], Field(max_length=8)] = Field(
        default_factory=list,
        description="where else the curve goes: `tensorboard`, `wandb`, `swanlab`, `trackio`, if installed",
    )
    tensorboard: bool = False
    use_wandb: bool = False
    wandb_project: Name = "trainyard"


class TaskSpec(Group):
    """A file of examples to score the model on, see `contract.task_files`."""

    name: TaskName = Field(description="name in results and charts; unique")
    path: PathText = Field(description="JSONL file with one example per line")
    kind: TaskKind = Field(
        description='choice: lines `{"context", "choices", "answer"}`; continuation: lines '
        '`{"context", "continuation"}`'
    )


MAX_TASKS = 32

TaskSpecs = Annotated[list[TaskSpec], Field(max_length=MAX_TASKS)]


class EvaluationSpec(Group):
    """Tasks that the model is scored on during the run."""

    tasks: TaskSpecs = Field(default_factory=list, description="tasks to score, see below")
    interval: Positive | None = Field(None, description="steps between scorings; null: at each save")


class Timeouts(Group):
    """Timeouts in seconds."""

    stop: Seconds = Field(120.0, description="from the stop request to SIGTERM")
    term: Seconds = Field(10.0, description="from SIGTERM to SIGKILL")
    progress: Seconds = Field(60.0, description="minimum time without a step before a run is considered hung")
    preparing: Seconds = Field(86400.0, description="maximum time for data preparation, compilation or a save")
    collective: Seconds = Field(600.0, description="maximum time that one rank waits for another")


class NodeRange(Group):
    """A range of nodes. The global batch is always that of ``max`` nodes."""

    min: Nodes
    max: Nodes


class SlurmSpec(Group):
    """Options for Slurm. null: the setting of the service."""

    partition: SlurmWord | None = Field(None, description="Slurm partition, or several separated by commas")
    prepare_partition: SlurmWord | None = Field(
        None, description="partition of the job without GPUs that tokenizes the corpus; null: that of the run"
    )
    account: SlurmWord | None = Field(None, description="Slurm account (--account)")
    qos: SlurmWord | None = Field(None, description="Slurm quality of service (--qos)")
    gpu_type: SlurmWord | None = Field(
        None, description="GPU type in the GRES request: gpu:TYPE:nproc_per_node on each node"
    )
    time_limit: Annotated[float, Field(ge=60, le=366 * 86400)] | None = Field(
        None, description="maximum seconds of one attempt; the next one continues from its checkpoint"
    )
    constraint: Annotated[str, Field(pattern=patterns.SLURM_CONSTRAINT)] | None = Field(
        None, description="required features of the nodes (--constraint)"
    )
    extra: Annotated[list[SlurmLine], Field(max_length=32)] = Field(
        default_factory=list, description="more options of sbatch, such as `--mem=64G`, if the service allows them"
    )


class ResourcesSpec(Group):
    """Devices, nodes and restarts."""

    device: Annotated[str, Field(pattern=patterns.DEVICE)] = Field(
        "auto", description="auto: CUDA if available, otherwise CPU with a warning"
    )
    nproc_per_node: Annotated[int, Field(ge=1, le=1024)] = Field(1, description="ranks per node; each uses one device")
    nnodes: Nodes | NodeRange = Field(
        1,
        description="number of nodes; more than 1 needs a cluster launcher; "
        '`{"min": 1, "max": 2}`: as many as are available',
    )
    parallelism: Parallelism = Field(
        "ddp",
        description="what each rank holds. ddp: everything; zero1: its share of the optimizer state; "
        "fsdp: its share of weights, gradients and optimizer state",
    )
    launcher: Literal["local", "slurm"] | None = Field(None, description="null: the default of the service")
    priority: Annotated[int, Field(ge=-1000, le=1000)] = Field(
        0, description="jobs with a higher priority start earlier"
    )
    max_restarts: Annotated[int, Field(ge=0, le=1000)] = Field(
        3, description="maximum number of automatic restarts after a crash"
    )
    preemptible: bool = Field(
        True,
        description="may be stopped for a job of higher priority, if the service preempts; it restarts automatically",
    )
    timeouts: Timeouts = Field(default_factory=Timeouts)
    slurm: SlurmSpec = Field(default_factory=SlurmSpec)

    @property
    def min_nodes(self) -> int:
        """Nodes without which it does not begin."""
        return self.nnodes.min if isinstance(self.nnodes, NodeRange) else self.nnodes

    @property
    def max_nodes(self) -> int:
        """Nodes it takes where they can be had."""
        return self.nnodes.max if isinstance(self.nnodes, NodeRange) else self.nnodes

    @property
    def ranks(self) -> int:
        """Ranks over all nodes, the most there may be."""
        return self.nproc_per_node * self.max_nodes


def next_memory_saving(training: TrainingSpec, resources: ResourcesSpec) -> dict[str, dict[str, Any]] | None:
    """Return the next setting with which a rank needs less memory, as {group: {field: value}}; None if all are set.

    First gradient checkpointing, which needs no communication; then zero1 and fsdp, if there are several ranks.
    """
    if not training.gradient_checkpointing:
        return {"training": {"gradient_checkpointing": True}}
    if resources.parallelism == "fsdp" or resources.ranks == 1:
        return None
    return {"resources": {"parallelism": "zero1" if resources.parallelism == "ddp" else "fsdp"}}


class JobSpec(Group):
    """One pretraining run. Every field has a default, except that ``data`` needs ``data_path`` or ``sources``."""

    name: Name = "pretrain"
    labels: Annotated[dict[Name, LabelValue], Field(max_length=64)] = Field(default_factory=dict)
    description: Description = ""
    group: Name | None = None
    version: Literal[1] = 1
    model: ModelConfig = Field(default_factory=ModelConfig)
    data: DataSpec
    training: TrainingSpec = Field(default_factory=TrainingSpec)
    checkpoint: CheckpointSpec = Field(default_factory=CheckpointSpec)
    reporting: ReportingSpec = Field(default_factory=ReportingSpec)
    limits: LimitsSpec = Field(default_factory=LimitsSpec)
    evaluation: EvaluationSpec = Field(default_factory=EvaluationSpec)
    resources: ResourcesSpec = Field(default_factory=ResourcesSpec)

    @property
    def rows_per_step(self) -> int:
        """Rows of one optimizer step over all ranks: the global batch."""
        return self.training.batch_size * self.training.accumulation_steps * self.resources.ranks


def gives_both_lengths(spec: JobSpec) -> bool:
    """Return whether a client gave ``epochs`` and another length, if the spec still shows it."""
    training = spec.training
    # A stored spec has every field: one epoch may be the default.
    complete = training.model_fields_set == set(TrainingSpec.model_fields)
    given = training.epochs != 1 or ("epochs" in training.model_fields_set and not complete)
    return (training.max_steps is not None or training.max_tokens is not None) and given
