"""Warnings about a planned run, and advice on its speed, one sentence each. Pure."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from trainyard.contract.spec import JobSpec, epochs_ignored, gives_both_lengths
from trainyard.contract.tokenizer_info import BYTE, BYTE_VOCABULARY, special_tokens_warning
from trainyard.contract.units import counted
from trainyard.service.planning.estimate import PlannedSource, RunSize

GB = 1e9
FEW_TOKENS = 8192  # with fewer tokens per micro-batch, a GPU waits for kernel launches more than it computes
MAX_PASSES = 4  # beyond it, repeated data teaches little (Muennighoff et al., 2023)
MIN_KEPT = 2  # checkpoints that are kept even if ``keep_last`` is smaller


@dataclass(frozen=True)
class HostCapacity:
    """Resources of the host, and what the run needs of them, in bytes. None: unknown. ``kind``: such as ``cuda``.

    ``memory_needed``, ``settings_that_fit``: see `jobs.memory`. ``fits_one_row``: whether the run with batch_size 1
    would fit. ``other_format``: the corpus's, if it is not JSONL.
    ``names``: keys with texts in the first line that is no document. ``bfloat16_on_cpu``: FLOP/s of a product in
    bfloat16 and in float32, if the run is in bfloat16 on a CPU and they are known.
    """

    kind: str
    memory_needed: int
    memory_limit: int | None
    checkpoint_bytes: int
    disk_free: int | None
    settings_that_fit: Mapping[str, Mapping[str, Any]] | None = None
    fits_one_row: bool = True
    other_format: str | None = None
    names: tuple[str, ...] = ()
    bfloat16_on_cpu: tuple[float, float] | None = None


def warnings(spec: JobSpec, size: RunSize | None, host: HostCapacity) -> list[str]:
    """Return the warnings, the most serious first."""
    sentences = [*_memory(host), *_disk(spec, host), *_no_gpu(spec, host), *_unnamed(spec), *_epochs(spec)]
    sentences += _without_effect(spec)
    if size is None and host.other_format is not None:
        return [*sentences, f"the corpus is {host.other_format}: tokens, steps and time are known once it is tokenized"]
    if size is None:
        return [*sentences, _no_document(spec.data.text_field, host.names)]
    return [*sentences, *_corpus(spec, size), *_intervals(spec, size)]


def advice(spec: JobSpec, host: HostCapacity) -> Iterator[str]:
    """Yield changes with which the run would be faster. Unlike a warning, advice does not stop a submission."""
    if host.bfloat16_on_cpu is not None and host.bfloat16_on_cpu[0] < host.bfloat16_on_cpu[1]:
        bfloat16, float32 = host.bfloat16_on_cpu
        yield (
            f"this CPU computes a bfloat16 product at {bfloat16 / 1e9:,.0f} GFLOP/s and one in float32 at "
            f'{float32 / 1e9:,.0f}: with training.dtype "float32" the run is faster, and more exact'
        )
    batch_tokens = spec.training.batch_size * spec.data.max_seq_len
    if host.kind.startswith("cuda") and batch_tokens < FEW_TOKENS:
        yield f"batch_size {spec.training.batch_size} gives a GPU {batch_tokens:,} tokens at once: it could take more"


def source_warnings(sources: Sequence[PlannedSource]) -> list[str]:
    """Return a warning for each source that is read too often."""
    often = [source for source in sources if source.passes is not None and source.passes > MAX_PASSES]
    return [
        f"{'the corpus' if len(sources) == 1 else f'source {source.name}'} is read {source.passes:.1f} times: "
        f"more than {MAX_PASSES} passes teach little"
        for source in often
    ]


def limit_warnings(spec: JobSpec, size: RunSize | None, tokens_per_second: float | None) -> Iterator[str]:
    """Yield a warning if ``limits.max_minutes`` ends the run before the end of its learning rate schedule."""
    minutes = spec.limits.max_minutes
    if minutes is None or size is None or tokens_per_second is None:
        return
    steps = int(60 * minutes * tokens_per_second / size.tokens_per_step)
    if steps < 0.9 * size.steps and spec.training.lr_scheduler != "constant":
        yield (
            f"max_minutes {minutes:g} is enough for about {max(1, steps):,} of {size.steps:,} steps, so the learning "
            'rate does not decay to its end: lower max_steps or max_tokens, or set lr_scheduler to "constant"'
        )


def _no_document(text_field: str, names: tuple[str, ...]) -> str:
    known = f"lines have texts under {', '.join(map(repr, names))}: set text_field"
    needed = f'it needs one JSON object a line, such as {{"{text_field}": "..."}}'
    return f"no document was found in the sampled part of the corpus: {known if names else needed}"


def _memory(host: HostCapacity) -> Iterator[str]:
    if host.memory_limit is None:
        return
    needed, owner = host.memory_needed, "this host" if host.kind == "cpu" else "the device"
    if needed > host.memory_limit:
        changes = host.settings_that_fit or {}
        settings = " and ".join(
            f"{leaf} {str(value).lower()}" for fields in changes.values() for leaf, value in fields.items()
        )
        if settings:
            advice = f"it fits with {settings}"
        elif host.fits_one_row:
            advice = "lower batch_size or max_seq_len, or take a smaller model"
        else:
            advice = "it does not fit with batch_size 1 either: take a smaller model"
        yield f"it needs about {_gb(needed)} of memory and {owner} has {_gb(host.memory_limit)}: {advice}"
    elif needed > 0.9 * host.memory_limit:
        yield f"it needs about {_gb(needed)} of the {_gb(host.memory_limit)} of memory that {owner} has: it may not fit"


def _disk(spec: JobSpec, host: HostCapacity) -> Iterator[str]:
    kept = max(MIN_KEPT, spec.checkpoint.keep_last) + 1
    needed = kept * host.checkpoint_bytes
    if host.disk_free is not None and needed > host.disk_free:
        yield (
            f"{kept} checkpoints (keep_last and the one being written) take {_gb(needed)} and "
            f"{_gb(host.disk_free)} are free on the disk"
        )


def _no_gpu(spec: JobSpec, host: HostCapacity) -> Iterator[str]:
    if host.kind == "cpu" and spec.resources.device == "auto":
        yield "there is no GPU on this host: this run will use the CPU"


def _unnamed(spec: JobSpec) -> Iterator[str]:
    if spec.data.tokenizer_path == BYTE and "tokenizer_path" not in spec.data.model_fields_set:
        yield (
            f"tokenizer_path was not given: the built-in byte tokenizer has {BYTE_VOCABULARY} entries, and no other "
            'program loads its weights. Name a tokenizer such as MiniMind\'s model folder, or "byte" if you mean it'
        )


def _epochs(spec: JobSpec) -> Iterator[str]:
    if gives_both_lengths(spec):
        yield epochs_ignored(spec.training)


def _without_effect(spec: JobSpec) -> Iterator[str]:
    parallelism, mode = spec.resources.parallelism, spec.training.compile_mode
    if parallelism != "ddp" and spec.resources.ranks == 1:
        yield f"parallelism {parallelism} has no effect, because the run has one rank"
    if mode != "default" and not spec.training.use_compile:
        yield f"compile_mode {mode} has no effect without use_compile"
    elif mode != "default" and parallelism == "fsdp" and spec.resources.ranks > 1:
        yield f"compile_mode {mode} has no effect with parallelism fsdp, whose layers are compiled in the default mode"
    if spec.training.zero_init_projections and spec.training.from_weight is not None:
        yield "zero_init_projections has no effect with from_weight"


def _corpus(spec: JobSpec, size: RunSize) -> Iterator[str]:
    lines = size.bad_lines + size.documents
    share = size.bad_lines / lines
    if share > spec.data.max_bad_lines:
        yield (
            f"{100 * share:.1f} % of the lines cannot be read and max_bad_lines allows "
            f"{100 * spec.data.max_bad_lines:.1f} %: the run will be refused"
        )
    if spec.data.special_tokens == "text":
        warning = special_tokens_warning(size.special_texts, size.documents, size.special_tokens)
        if warning is not None:
            yield warning
    if size.samples < spec.rows_per_step:
        yield f"one step takes {spec.rows_per_step:,} rows and the corpus has about {size.samples:,}"


def _intervals(spec: JobSpec, size: RunSize) -> Iterator[str]:
    warmup, steps = spec.training.warmup_steps, size.steps
    if warmup >= steps:
        run = counted(steps, "step")
        yield f"warmup_steps {warmup:,} is not shorter than the run ({run}): the full rate is never reached"
    if spec.checkpoint.save_interval > steps and spec.checkpoint.save_minutes is None:
        yield (
            f"save_interval {spec.checkpoint.save_interval:,} is longer than the run ({counted(steps, 'step')}): "
            "the only checkpoint is that of the end"
        )
    verify_every = spec.training.verify_every
    if verify_every is not None and verify_every > steps:
        yield f"verify_every {verify_every:,} is longer than the run ({steps:,} steps): no step is verified"
    log_interval = spec.reporting.log_interval
    if log_interval is not None and log_interval > steps:
        yield f"log_interval {log_interval:,} is longer than the run ({counted(steps, 'step')})"


def _gb(value: int) -> str:
    return f"{value / GB:,.1f} GB" if value >= 0.1 * GB else f"{value / 1e6:,.1f} MB"
