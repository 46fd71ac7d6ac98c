"""The job spec: what a user asks for. Frozen, every field validated once, here.

`JobSpec` is the resolved form that is stored, returned and run. What a client sends goes through `contract.parsing`,
which also knows the aliases and reports every mistake at once.
"""

from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

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


def _path(text: str) -> str:
    if "\0" in text:
        raise ValueError("must not hold a NUL character")
    return _encodable(text)


LONG = 2**53 - 1
"""The largest integer that every JSON reader keeps exactly."""

Name = Annotated[str, Field(min_length=1, max_length=200), AfterValidator(_printable)]
LabelValue = Annotated[str, Field(max_length=200), AfterValidator(_printable)]
PathText = Annotated[str, Field(min_length=1, max_length=4096), AfterValidator(_path)]
FileStem = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,99}$")]
Prompt = Annotated[str, Field(max_length=4000), AfterValidator(_encodable)]
Positive = Annotated[int, Field(ge=1, le=LONG)]
NonNegative = Annotated[int, Field(ge=0, le=LONG)]
Beta = Annotated[float, Field(ge=0, lt=1)]
Seconds = Annotated[float, Field(gt=0, le=30 * 86400)]
Nodes = Annotated[int, Field(ge=1, le=4096)]
SlurmWord = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.][A-Za-z0-9_.,:+-]{0,99}$")]
SlurmLine = Annotated[str, Field(pattern=r"^--[a-z][a-z-]{1,40}(=[A-Za-z0-9_.,:%@/+*&|()\[\]-]{1,200})?$")]


class Group(BaseModel):
    """A group of the spec: frozen, strict, unknown keys refused by name, non-finite numbers refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class DataSpec(Group):
    """What is read."""

    data_path: PathText = Field(
        description="the corpus: JSONL, one document a line; plain text; either packed; parquet"
    )
    tokenizer_path: PathText = Field("byte", description='directory with a tokenizer.json, or "byte"')
    text_field: Name = Field("text", description="key of the text in each line, or its column")
    max_seq_len: Annotated[int, Field(ge=2, le=2**20)] = Field(340, description="tokens in a row")
    packing: Literal["document", "none"] = Field(
        "document",
        description="document: rows are filled with whole documents that do not see each other; none: one a row",
    )
    max_bad_lines: Annotated[float, Field(ge=0, le=1)] = Field(
        0.01, description="share of unreadable lines above which the run is refused"
    )
    eval_data_path: PathText | None = Field(None, description="held-out file, of the same forms")
    eval_fraction: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.0, description="share of the documents that is held out where there is no eval_data_path"
    )
    num_workers: Annotated[int, Field(ge=0, le=256)] | None = Field(
        None, description="threads that tokenize the corpus, 0 being one; null: one a core"
    )


class TrainingSpec(Group):
    """How it is trained. A step is an optimizer step."""

    epochs: Positive = Field(1, description="passes over the corpus; max_steps, where given, decides alone")
    max_steps: Positive | None = Field(None, description="optimizer steps")
    batch_size: Annotated[int, Field(ge=1, le=65536)] = Field(32, description="rows one rank runs at once")
    accumulation_steps: Annotated[int, Field(ge=1, le=65536)] = Field(8, description="micro-batches in a step")
    learning_rate: Annotated[float, Field(gt=0, le=100)] = Field(5e-4, description="at its highest")
    lr_scheduler: Literal["cosine", "linear", "constant"] = "cosine"
    min_lr_ratio: Annotated[float, Field(ge=0, le=1)] = Field(0.1, description="last rate / highest rate")
    warmup_steps: NonNegative = Field(0, description="steps of linear warm-up")
    optimizer: Literal["adamw", "muon"] = Field(
        "adamw", description="muon: for the matrices of the layers; embeddings, head, router and norms stay with AdamW"
    )
    weight_decay: Annotated[float, Field(ge=0, le=100)] = Field(0.01, description="decoupled")
    weight_decay_on: Literal["all", "matrices"] = Field(
        "all", description="all: every parameter, as MiniMind does; matrices: embeddings among them, but not the norms"
    )
    betas: tuple[Beta, Beta] = Field((0.9, 0.999), description="AdamW's")
    grad_clip: Annotated[float, Field(ge=0, le=1e9)] = Field(1.0, description="largest gradient norm; 0: no clipping")
    dtype: Literal["bfloat16", "float16", "float32"] = Field("bfloat16", description="autocast; weights stay float32")
    seed: Annotated[int, Field(ge=0, le=2**32 - 1)] = 42
    deterministic: bool = Field(False, description="only deterministic CUDA kernels; on a CPU every run is")
    use_compile: bool = Field(False, description="torch.compile the model")
    loss_normalization: Literal["global_tokens", "micro_batch_mean"] = Field(
        "global_tokens",
        description="mean over all tokens of a step; or MiniMind's mean of micro-batch means",
    )
    on_nonfinite: Literal["fail", "skip", "rollback"] = Field(
        "fail", description="what a step with a non-finite loss or gradient does"
    )
    from_weight: PathText | None = Field(
        None,
        description="weights to start from: a .pth or .safetensors file, a Hugging Face directory of the same shape, "
        "or a name in save_dir as MiniMind has it",
    )

    def smaller_batch(self) -> tuple[int, int] | None:
        """(batch_size, accumulation_steps) with fewer rows at once and as many in a step; None where there is one."""
        if self.batch_size == 1:
            return None
        factor = next(n for n in range(2, self.batch_size + 1) if self.batch_size % n == 0)
        return self.batch_size // factor, self.accumulation_steps * factor


class CheckpointSpec(Group):
    """What is kept."""

    save_dir: PathText | None = Field(
        None, description="directory for checkpoints and weights, in a folder of the job's own; null: the run directory"
    )
    save_weight: FileStem = Field("pretrain", description="first part of the weights file's name")
    save_interval: Positive = Field(1000, description="steps between checkpoints")
    save_minutes: Annotated[float, Field(gt=0, le=1e6)] | None = Field(None, description="also save this often")
    keep_last: Annotated[int, Field(ge=1, le=100000)] = Field(3, description="newest ones kept; never under 2 valid")
    keep_every: Positive | None = Field(
        None, description="keep the weights of checkpoints at multiples of this step for good"
    )
    from_resume: bool = Field(
        False, description="go on from the newest fitting checkpoint of an earlier job below save_dir, if there is one"
    )


class ReportingSpec(Group):
    """What is told."""

    log_interval: Positive = Field(100, description="steps between metric lines")
    eval_interval: Positive | None = Field(None, description="steps between evaluations; null: at each save")
    sample_prompts: Annotated[list[Prompt], Field(max_length=32)] = Field(
        default_factory=list, description="texts to be continued at each save"
    )
    tensorboard: bool = False
    use_wandb: bool = False
    wandb_project: Name = "trainyard"


class Timeouts(Group):
    """Seconds to wait before something is taken for stuck."""

    stop: Seconds = Field(120.0, description="from the wish to stop until SIGTERM")
    term: Seconds = Field(10.0, description="from SIGTERM until SIGKILL")
    progress: Seconds = Field(60.0, description="least time without a step before a run counts as hung")
    preparing: Seconds = Field(86400.0, description="longest preparation of data, compilation or save")
    collective: Seconds = Field(600.0, description="longest wait of one rank for another")


class NodeRange(Group):
    """Any number of nodes between the two; a step is always that of ``max`` nodes."""

    min: Nodes
    max: Nodes


class SlurmSpec(Group):
    """What Slurm is asked for; null: as the service is set up."""

    partition: SlurmWord | None = Field(None, description="one, or several separated by commas")
    account: SlurmWord | None = Field(None, description="who pays")
    qos: SlurmWord | None = Field(None, description="quality of service")
    gpu_type: SlurmWord | None = Field(None, description="type of the GRES: gpu:TYPE:nproc_per_node on each node")
    time_limit: Annotated[float, Field(ge=60, le=366 * 86400)] | None = Field(
        None, description="seconds Slurm lets one attempt run; the next goes on from its checkpoint"
    )
    constraint: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.,:&|*()\[\]-]{1,200}$")] | None = Field(
        None, description="features of the nodes"
    )
    extra: Annotated[list[SlurmLine], Field(max_length=32)] = Field(
        default_factory=list, description="further options of sbatch, such as `--mem=64G`, as far as the service allows"
    )


class ResourcesSpec(Group):
    """What it runs on."""

    device: Annotated[str, Field(pattern=r"^(auto|cpu|cuda(:\d{1,3})?)$")] = Field(
        "auto", description="auto: CUDA where there is some, else CPU with a warning"
    )
    nproc_per_node: Annotated[int, Field(ge=1, le=1024)] = Field(1, description="ranks, one device each")
    nnodes: Nodes | NodeRange = Field(
        1, description='more than one needs a cluster\'s launcher; `{"min": 1, "max": 2}`: as many as can be had'
    )
    launcher: Literal["local", "slurm"] | None = Field(None, description="null: the service's own choice")
    priority: Annotated[int, Field(ge=-1000, le=1000)] = Field(0, description="higher starts earlier")
    max_restarts: Annotated[int, Field(ge=0, le=1000)] = Field(3, description="new attempts after a crash")
    preemptible: bool = Field(
        True, description="may be paused for a job of higher priority, where the service preempts; it goes on by itself"
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


class JobSpec(Group):
    """One pretraining run as it is asked for. Every field but ``data.data_path`` has a default."""

    name: Name = "pretrain"
    labels: Annotated[dict[Name, LabelValue], Field(max_length=64)] = Field(default_factory=dict)
    version: Literal[1] = 1
    model: ModelConfig = Field(default_factory=ModelConfig)
    data: DataSpec
    training: TrainingSpec = Field(default_factory=TrainingSpec)
    checkpoint: CheckpointSpec = Field(default_factory=CheckpointSpec)
    reporting: ReportingSpec = Field(default_factory=ReportingSpec)
    resources: ResourcesSpec = Field(default_factory=ResourcesSpec)

    @property
    def rows_per_step(self) -> int:
        """Rows of one optimizer step over all ranks: the global batch."""
        return self.training.batch_size * self.training.accumulation_steps * self.resources.ranks
