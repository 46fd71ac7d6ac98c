"""The plan preview: computed from the spec, the corpus, this host's devices and earlier runs.

If a part of the corpus is tokenized, its report has exact numbers. Of other parts a sample is read.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from trainyard.contract.cache import CorpusCache
from trainyard.contract.corpus_files import CorpusFilesInvalid, expand
from trainyard.contract.corpus_report import SourceReport
from trainyard.contract.lr_schedule import LRSchedule
from trainyard.contract.prepared import corpus_parts, shards_key
from trainyard.contract.spec import EvalSourceSpec, JobSpec, SourceSpec
from trainyard.contract.tokenizer_info import TokenizerInvalid, TokenNames, special_pattern
from trainyard.model import costs
from trainyard.service.devices.inventory import Device, count_by_kind
from trainyard.service.devices.memory import disk_free, free_memory, memory_limit
from trainyard.service.jobs import memory
from trainyard.service.jobs.submission import initial_plan
from trainyard.service.launch.slurm.launcher import SLURM
from trainyard.service.planning.corpus_sample import SAMPLE_BYTES, other_format, sample_files, sampled_paths
from trainyard.service.planning.estimate import (
    PlannedEvalSet,
    PlannedSource,
    RunSize,
    estimate_size,
    join_sizes,
    plan_eval_set,
    plan_sources,
    plan_split,
    size_from_report,
)
from trainyard.service.planning.matrix_speed import MatrixEstimate
from trainyard.service.planning.throughput import Throughput
from trainyard.service.planning.token_count import token_counter
from trainyard.service.planning.warnings import HostCapacity, advice, limit_warnings, source_warnings, warnings
from trainyard.service.schemas import PlanPreview, Queue
from trainyard.service.settings import Settings

MIN_SAMPLE_BYTES = 1 << 16
"""Bytes of a held-out set that are read at least: fewer may have no complete line."""


@dataclass(frozen=True)
class QueuePosition:
    """Jobs ahead of the job, and free devices of its kind."""

    ahead: int
    free: int


@dataclass(frozen=True)
class CorpusSample:
    """Result of a bounded read. ``size`` is None without a document. ``names``: see `SampledLines`.

    ``other_format``: the format of a source that is not JSONL. ``tokens``: those of the tokenizer.
    """

    size: RunSize | None
    names: tuple[str, ...] = ()
    other_format: str | None = None
    sources: tuple[PlannedSource, ...] = ()
    tokens: TokenNames | None = None
    eval_sets: tuple[PlannedEvalSet, ...] = ()


Reports = Mapping[tuple[str, bool], SourceReport]
"""(name, whether it is held out) -> the report of a part of the corpus that is tokenized."""


def sample_corpus(spec: JobSpec, roots: Sequence[Path] = (), cache: Path | None = None) -> CorpusSample:
    """Estimate the run's size, by the reports of the parts that are in ``cache`` and a bounded sample of the others."""
    try:
        files = [[file.path for file in expand(source.path)] for source in spec.data.training_sources]
    except CorpusFilesInvalid:
        return CorpusSample(None, tokens=_token_names(spec.data.tokenizer_path, roots))
    reports = _reports(spec, cache) if cache is not None else {}
    samples = [
        _sample_source(spec, source, paths, roots, reports.get((source.name, False)))
        for source, paths in zip(spec.data.training_sources, files, strict=True)
    ]
    sizes = [sample.size for sample in samples]
    names = next((sample.names for sample in samples if sample.names), ())
    size = join_sizes(spec, sizes)
    packed = _other_format(files, roots) if size is None else None
    counts = [len(paths) for paths in files]
    planned = plan_sources(spec, counts, sizes, size)
    eval_sets = [*_splits(spec, counts, sizes), *_eval_sets(spec, roots, reports)]
    tokens = _token_names(spec.data.tokenizer_path, roots)
    return CorpusSample(size, names, packed, tuple(planned), tokens, tuple(eval_sets))


def _reports(spec: JobSpec, cache: Path) -> Reports:
    try:
        parts = corpus_parts(spec.data)
    except (OSError, CorpusFilesInvalid, TokenizerInvalid):
        return {}
    keys = {(part.name, part.held_out): shards_key(cache, part.key) for part in parts}
    found = {
        part: SourceReport.read(CorpusCache(cache).directory(key)) for part, key in keys.items() if key is not None
    }
    return {part: report for part, report in found.items() if report is not None}


def _splits(spec: JobSpec, files: Sequence[int], sizes: Sequence[RunSize | None]) -> Iterator[PlannedEvalSet]:
    if spec.data.eval_fraction > 0:
        for source, count, size in zip(spec.data.training_sources, files, sizes, strict=True):
            yield plan_split(source.name, count, size, spec.data.eval_fraction)


def _eval_sets(spec: JobSpec, roots: Sequence[Path], reports: Reports) -> Iterator[PlannedEvalSet]:
    wanted = spec.data.held_out_sources
    # All sets together take about as long as one source.
    limit = max(MIN_SAMPLE_BYTES, SAMPLE_BYTES // max(1, len(wanted)))
    for source in wanted:
        try:
            paths = [file.path for file in expand(source.path)]
        except CorpusFilesInvalid:
            continue
        size = _sample_source(spec, source, paths, roots, reports.get((source.name, True)), limit).size
        yield plan_eval_set(source.name, len(paths), size, source.max_tokens)


def _other_format(sources: Sequence[Sequence[Path]], roots: Sequence[Path]) -> str | None:
    """Return the format of the files that cannot be sampled, as text for the warning."""
    for paths in sources:
        for path in sampled_paths(paths):
            if (found := other_format(path, roots)) is not None:
                return found if len(sources) == len(paths) == 1 else f"partly {found}"
    return None


def _sample_source(
    spec: JobSpec,
    source: SourceSpec | EvalSourceSpec,
    paths: Sequence[Path],
    roots: Sequence[Path],
    report: SourceReport | None,
    limit: int = SAMPLE_BYTES,
) -> CorpusSample:
    if report is not None:
        return CorpusSample(size_from_report(spec, report))
    sampled = sample_files(paths, source.text_field or spec.data.text_field, roots, limit)
    if sampled is None:
        return CorpusSample(None)
    tokens_of = _token_names(spec.data.tokenizer_path, roots)
    special = special_pattern(tokens_of.special) if tokens_of is not None else None
    marks = [len(special.findall(text)) if special is not None else 0 for text in sampled.texts]
    as_tokens = spec.data.special_tokens == "tokens" and special is not None
    texts = [special.sub("", text) for text in sampled.texts] if as_tokens and special is not None else sampled.texts
    tokens = token_counter(spec.data.tokenizer_path, texts, roots)
    lengths = [tokens(text) + (found if as_tokens else 0) for text, found in zip(texts, marks, strict=True)]
    size = estimate_size(spec, Counter(lengths), sampled.bad_lines, sampled.scale)
    if size is not None:
        size = replace(
            size,
            special_tokens=round(sampled.scale * sum(marks)),
            special_texts=round(sampled.scale * sum(map(bool, marks))),
        )
    return CorpusSample(size, sampled.names)


def _token_names(tokenizer_path: str, roots: Sequence[Path]) -> TokenNames | None:
    try:
        return TokenNames.read(tokenizer_path, roots)
    except (TokenizerInvalid, OSError):
        return None


def preview(
    spec: JobSpec,
    kind: str,
    sample: CorpusSample,
    devices: Sequence[Device],
    throughput: Throughput | MatrixEstimate | None,
    queue: QueuePosition,
    settings: Settings,
    bfloat16_on_cpu: tuple[float, float] | None = None,
) -> PlanPreview:
    """Return the plan of the API.

    ``kind``: the kind or id of the device on which the job will run. ``devices``: those of this host.
    ``bfloat16_on_cpu``: see `MatrixSpeed.bfloat16_on_cpu`.
    """
    facts = initial_plan(spec, kind)
    host = replace(
        _host_capacity(spec, facts, kind, devices, settings),
        names=sample.names,
        other_format=sample.other_format,
        bfloat16_on_cpu=bfloat16_on_cpu,
    )
    size = sample.size
    return PlanPreview.model_validate(
        {
            **facts,
            "bos_token": sample.tokens.bos if sample.tokens is not None else None,
            "eos_token": sample.tokens.eos if sample.tokens is not None else None,
            **_sizes(spec, size, throughput),
            "memory_limit_bytes": host.memory_limit,
            "memory_options": list(memory.options(spec, kind, host.memory_limit)),
            "settings_that_fit": host.settings_that_fit,
            "suggested_batch_size": largest_batch_size(spec, kind, devices),
            "disk_free_bytes": host.disk_free,
            "device_name": next((d.model for d in devices if kind in (d.kind, d.id)), None),
            "queue": Queue(position=queue.ahead + 1, waiting_for=_waiting_for(spec, kind, queue, devices)),
            "sources": list(sample.sources),
            "eval_sets": list(sample.eval_sets),
            "warnings": [
                *warnings(spec, size, host),
                *source_warnings(sample.sources),
                *limit_warnings(spec, size, throughput.tokens_per_second if throughput else None),
            ],
            "advice": list(advice(spec, host)),
        }
    )


def largest_batch_size(spec: JobSpec, kind: str, devices: Sequence[Device]) -> int | None:
    """Return the largest batch_size that fits into the free memory of this host, or None if that is unknown."""
    if spec.resources.launcher == SLURM:
        return None
    free = free_memory(kind, devices, spec.resources.nproc_per_node)
    return memory.suggested_batch_size(spec, kind, free)


def preview_from_step(plan: PlanPreview, start: int, base: int, steps: int | None) -> PlanPreview:
    """Adapt a plan to a run that starts at step ``start`` of a curve: the steps before it take no time.

    ``base``: steps before the run's own schedule. ``steps``: steps of the whole curve, if known.
    """
    start_fields = {"start_step": start, "base_step": base}
    if plan.steps is None:
        return plan.model_copy(update={**start_fields, "steps": steps})
    total_steps = steps if steps is not None else base + plan.steps
    share = max(0, total_steps - start) / plan.steps
    remaining = {name: value * share for name in ("flops", "eta_seconds") if (value := getattr(plan, name)) is not None}
    return plan.model_copy(update={**start_fields, **remaining, "steps": total_steps})


def with_learning_rate(plan: PlanPreview, spec: JobSpec) -> PlanPreview:
    """Return the plan with the curve of the learning rate, from the first step that is trained."""
    if plan.steps is None:
        return plan
    schedule = LRSchedule.from_spec(spec.training, plan.steps, plan.base_step)
    return plan.model_copy(update={"learning_rate": schedule.curve(plan.start_step + 1)})


def _sizes(spec: JobSpec, size: RunSize | None, throughput: Throughput | MatrixEstimate | None) -> dict[str, Any]:
    if size is None:
        return {"estimated": True}
    flops_per_token = costs.flops_per_token(spec.model, size.attention_length)
    seconds, minutes = (
        size.trained_tokens / throughput.tokens_per_second if throughput else None,
        spec.limits.max_minutes,
    )
    if seconds is not None and minutes is not None:
        seconds = min(seconds, 60 * minutes)
    return {
        "estimated": True,
        "tokens": size.tokens,
        "samples": size.samples,
        "documents": size.documents,
        "bad_lines": size.bad_lines,
        "special_tokens": size.special_tokens,
        "special_texts": size.special_texts,
        "steps": size.steps,
        "steps_per_epoch": size.steps_per_epoch,
        "tokens_per_step": size.tokens_per_step,
        "flops_per_token": flops_per_token,
        "flops": flops_per_token * size.trained_tokens,
        "eta_seconds": seconds,
        "eta_basis": str(throughput) if throughput else None,
    }


def _host_capacity(
    spec: JobSpec, facts: dict[str, Any], kind: str, devices: Sequence[Device], settings: Settings
) -> HostCapacity:
    limit = None if spec.resources.launcher == SLURM else memory_limit(kind, devices)
    one_row = memory.with_settings(spec, {"training": {"batch_size": 1, "gradient_checkpointing": True}})
    return HostCapacity(
        kind=kind,
        memory_needed=memory.needed(spec, kind),
        memory_limit=limit,
        settings_that_fit=memory.settings_that_fit(spec, kind, limit),
        fits_one_row=limit is None or memory.needed(one_row, kind) <= limit,
        checkpoint_bytes=facts["checkpoint_bytes"],
        disk_free=disk_free(Path(spec.checkpoint.save_dir or settings.home)),
    )


def _waiting_for(spec: JobSpec, kind: str, queue: QueuePosition, devices: Sequence[Device]) -> str:
    ranks = spec.resources.nproc_per_node
    if spec.resources.launcher == SLURM:
        return "Slurm, once it is submitted"
    if queue.free >= ranks:
        return "nothing: it would start immediately"
    singular = {"cpu": "CPU slot", "cuda": "GPU"}
    name = singular[kind] + ("" if ranks == 1 else "s") if kind in singular else kind
    return f"{ranks} {name}; {queue.free} of {count_by_kind(devices, kind)} free"
