"""What a user should know before a device is taken. Pure: each finding is one sentence."""

from collections.abc import Iterator
from dataclasses import dataclass

from trainyard.contract.spec import JobSpec
from trainyard.service.planning.estimate import RunSize

GB = 1e9
FEW_TOKENS = 8192
"""A GPU that gets fewer tokens at once waits for its launches more than it computes."""

MIN_KEPT = 2
"""Checkpoints that are kept whatever ``keep_last`` says."""


@dataclass(frozen=True)
class HostCapacity:
    """What the run would meet here. Bytes; None: not known. ``kind`` is that of the device, e.g. ``cuda``.

    ``snapshot``: host memory of the copy that saves are written from. ``other_form``: of a corpus that is no JSONL.
    ``names``: under which the first line of it that is no document has texts.
    """

    kind: str
    memory_needed: int
    memory_limit: int | None
    checkpoint_bytes: int
    disk_free: int | None
    snapshot: int = 0
    other_form: str | None = None
    names: tuple[str, ...] = ()


def warnings(spec: JobSpec, size: RunSize | None, here: HostCapacity) -> list[str]:
    """The sentences, the gravest first."""
    found = [*_memory(spec, here), *_disk(spec, here), *_device(spec, here)]
    if size is None and here.other_form is not None:
        return [*found, f"the corpus is {here.other_form}: tokens, steps and time are known once it is tokenized"]
    if size is None:
        return [*found, _no_document(spec.data.text_field, here.names)]
    return [*found, *_corpus(spec, size), *_intervals(spec, size)]


def _no_document(text_field: str, names: tuple[str, ...]) -> str:
    has = f"lines have texts under {', '.join(map(repr, names))}: set text_field"
    needed = f'it needs one JSON object a line, such as {{"{text_field}": "..."}}'
    return f"no document was found in what was looked at of the corpus: {has if names else needed}"


def _memory(spec: JobSpec, here: HostCapacity) -> Iterator[str]:
    if here.memory_limit is None:
        return
    cpu = here.kind == "cpu"
    ranks = spec.resources.nproc_per_node if cpu else 1
    # Only rank 0 saves, and on a GPU the copy is in the host's memory.
    snapshot = here.snapshot if cpu else 0
    needed, whose = here.memory_needed * ranks + snapshot, "this host" if cpu else "the device"
    if needed > here.memory_limit:
        yield (
            f"it needs about {_gb(needed)} of memory and {whose} has {_gb(here.memory_limit)}: "
            "lower batch_size or max_seq_len, or take a smaller model"
        )
    elif needed > 0.9 * here.memory_limit:
        yield f"it needs about {_gb(needed)} of the {_gb(here.memory_limit)} of memory that {whose} has: it may not fit"


def _disk(spec: JobSpec, here: HostCapacity) -> Iterator[str]:
    kept = max(MIN_KEPT, spec.checkpoint.keep_last) + 1
    needed = kept * here.checkpoint_bytes
    if here.disk_free is not None and needed > here.disk_free:
        yield (
            f"{kept} checkpoints (keep_last and the one being written) take {_gb(needed)} and "
            f"{_gb(here.disk_free)} are free on the disk"
        )


def _device(spec: JobSpec, here: HostCapacity) -> Iterator[str]:
    if here.kind == "cpu" and spec.resources.device == "auto":
        yield "there is no GPU on this host: this run will use the CPU"
    at_once = spec.training.batch_size * spec.data.max_seq_len
    if here.kind.startswith("cuda") and at_once < FEW_TOKENS:
        yield f"batch_size {spec.training.batch_size} gives a GPU {at_once:,} tokens at once: it could take more"


def _corpus(spec: JobSpec, size: RunSize) -> Iterator[str]:
    lines = size.bad_lines + size.documents
    share = size.bad_lines / lines
    if share > spec.data.max_bad_lines:
        yield (
            f"{100 * share:.1f} % of the lines cannot be read and max_bad_lines allows "
            f"{100 * spec.data.max_bad_lines:.1f} %: the run will be refused"
        )
    if size.samples < spec.rows_per_step:
        yield f"one step takes {spec.rows_per_step:,} rows and the corpus has about {size.samples:,}"


def _intervals(spec: JobSpec, size: RunSize) -> Iterator[str]:
    warmup, steps = spec.training.warmup_steps, size.steps
    if warmup >= steps:
        yield f"warmup_steps {warmup:,} is not shorter than the run ({steps:,} steps): the full rate is never reached"
    if spec.checkpoint.save_interval > steps and spec.checkpoint.save_minutes is None:
        yield (
            f"save_interval {spec.checkpoint.save_interval:,} is longer than the run ({steps:,} steps): "
            "the only checkpoint is that of the end"
        )
    if spec.reporting.log_interval > steps:
        yield f"log_interval {spec.reporting.log_interval:,} is longer than the run ({steps:,} steps)"


def _gb(value: int) -> str:
    return f"{value / GB:,.1f} GB" if value >= 0.1 * GB else f"{value / 1e6:,.1f} MB"
