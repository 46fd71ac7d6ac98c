"""What a run would be, put together: the spec's arithmetic, a glance at the corpus, this host, earlier runs."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from trainyard.contract.spec import JobSpec
from trainyard.service.devices.inventory import Device, count_by_kind
from trainyard.service.devices.memory import disk_free, memory_limit
from trainyard.service.jobs.submission import initial_plan
from trainyard.service.launch.slurm.launcher import SLURM
from trainyard.service.planning.corpus_sample import other_format, sample_lines
from trainyard.service.planning.estimate import RunSize, estimate_size
from trainyard.service.planning.throughput import Throughput
from trainyard.service.planning.token_count import token_counter
from trainyard.service.planning.warnings import HostCapacity, warnings
from trainyard.service.schemas import PlanPreview, Queue


@dataclass(frozen=True)
class QueuePosition:
    """The queue as the job would find it: how many are before it, and how many devices are free."""

    ahead: int
    free: int


@dataclass(frozen=True)
class CorpusSample:
    """What a bounded read of the corpus found. ``size`` None: no document; ``names``: see `Glance`."""

    size: RunSize | None
    names: tuple[str, ...] = ()


def sample_corpus(spec: JobSpec) -> CorpusSample:
    """Read a little of the corpus."""
    found = sample_lines(Path(spec.data.data_path), spec.data.text_field)
    if found is None:
        return CorpusSample(None)
    tokens = token_counter(spec.data.tokenizer_path, found.texts)
    size = estimate_size(spec, [tokens(text) for text in found.texts], found.bad_lines, found.scale)
    return CorpusSample(size, found.names)


def preview(
    spec: JobSpec,
    kind: str,
    looked: CorpusSample,
    devices: Sequence[Device],
    pace: Throughput | None,
    line: QueuePosition,
    home: Path,
) -> PlanPreview:
    """The plan as the API shows it. ``kind``: what its device means where it will run; ``devices``: of this host."""
    facts = initial_plan(spec, kind)
    here = replace(_surroundings(spec, facts, kind, devices, home), names=looked.names)
    size = looked.size
    return PlanPreview.model_validate(
        {
            **facts,
            **_sizes(size, facts, pace),
            "memory_limit_bytes": here.memory_limit,
            "disk_free_bytes": here.disk_free,
            "device_name": next((d.model for d in devices if kind in (d.kind, d.id)), None),
            "queue": Queue(position=line.ahead + 1, waiting_for=_waiting_for(spec, kind, line, devices)),
            "warnings": warnings(spec, size, here),
        }
    )


def queue_position(plan: PlanPreview, start: int, base: int, steps: int | None) -> PlanPreview:
    """The plan of a run that begins at step ``start`` of a curve: what lies before it takes no time any more.

    ``base``: steps before its own schedule. ``steps``: of the whole curve, where that is known.
    """
    begins = {"start_step": start, "base_step": base}
    if plan.steps is None:
        return plan.model_copy(update={**begins, "steps": steps})
    whole = steps if steps is not None else base + plan.steps
    share = max(0, whole - start) / plan.steps
    left = {name: value * share for name in ("flops", "eta_seconds") if (value := getattr(plan, name)) is not None}
    return plan.model_copy(update={**begins, **left, "steps": whole})


def _sizes(size: RunSize | None, facts: dict[str, Any], pace: Throughput | None) -> dict[str, Any]:
    if size is None:
        return {"estimated": True}
    return {
        "estimated": True,
        "tokens": size.tokens,
        "samples": size.samples,
        "documents": size.documents,
        "bad_lines": size.bad_lines,
        "steps": size.steps,
        "steps_per_epoch": size.steps_per_epoch,
        "tokens_per_step": size.tokens_per_step,
        "flops": facts["flops_per_token"] * size.trained_tokens,
        "eta_seconds": size.trained_tokens / pace.tokens_per_second if pace else None,
        "eta_basis": str(pace) if pace else None,
    }


def _surroundings(
    spec: JobSpec, facts: dict[str, Any], kind: str, devices: Sequence[Device], home: Path
) -> HostCapacity:
    away = spec.resources.launcher == SLURM
    return HostCapacity(
        kind=kind,
        memory_needed=sum(facts["memory_bytes"].values()),
        memory_limit=None if away else memory_limit(kind, devices),
        checkpoint_bytes=facts["checkpoint_bytes"],
        disk_free=disk_free(Path(spec.checkpoint.save_dir or home)),
        snapshot=facts["snapshot_bytes"],
        other_form=other_format(Path(spec.data.data_path)),
    )


def _waiting_for(spec: JobSpec, kind: str, line: QueuePosition, devices: Sequence[Device]) -> str:
    ranks = spec.resources.nproc_per_node
    if spec.resources.launcher == SLURM:
        return "Slurm, once it is submitted"
    if line.free >= ranks:
        return "nothing: it would start at once"
    what = {"cpu": "CPU slots", "cuda": "GPUs"}.get(kind, kind)
    return f"{ranks} {what}; {line.free} of {count_by_kind(devices, kind)} free"
