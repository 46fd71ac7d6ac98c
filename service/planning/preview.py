"""What a run would be, put together: the spec's arithmetic, a glance at the corpus, this host, earlier runs."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from trainyard.contract.spec import JobSpec
from trainyard.service.devices.inventory import Device, count
from trainyard.service.devices.memory import disk_free, limit_for
from trainyard.service.jobs.submission import known_at_submit
from trainyard.service.launch.slurm.launcher import SLURM
from trainyard.service.planning.corpus_sample import glance, other_form
from trainyard.service.planning.estimate import Size, size_of
from trainyard.service.planning.throughput import Pace
from trainyard.service.planning.token_count import counter
from trainyard.service.planning.warnings import Surroundings, warnings
from trainyard.service.schemas import Forecast, Queue


@dataclass(frozen=True)
class Line:
    """The queue as the job would find it: how many are before it, and how many devices are free."""

    ahead: int
    free: int


@dataclass(frozen=True)
class Looked:
    """What a bounded read of the corpus found. ``size`` None: no document; ``names``: see `Glance`."""

    size: Size | None
    names: tuple[str, ...] = ()


def look(spec: JobSpec) -> Looked:
    """Read a little of the corpus."""
    found = glance(Path(spec.data.data_path), spec.data.text_field)
    if found is None:
        return Looked(None)
    tokens = counter(spec.data.tokenizer_path, found.texts)
    size = size_of(spec, [tokens(text) for text in found.texts], found.bad_lines, found.scale)
    return Looked(size, found.names)


def forecast(
    spec: JobSpec, kind: str, looked: Looked, devices: Sequence[Device], pace: Pace | None, line: Line, home: Path
) -> Forecast:
    """The plan as the API shows it. ``kind``: what its device means where it will run; ``devices``: of this host."""
    facts = known_at_submit(spec, kind)
    here = replace(_surroundings(spec, facts, kind, devices, home), names=looked.names)
    size = looked.size
    return Forecast.model_validate(
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


def behind(plan: Forecast, start: int, base: int, steps: int | None) -> Forecast:
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


def _sizes(size: Size | None, facts: dict[str, Any], pace: Pace | None) -> dict[str, Any]:
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
) -> Surroundings:
    away = spec.resources.launcher == SLURM
    return Surroundings(
        kind=kind,
        memory_needed=sum(facts["memory_bytes"].values()),
        memory_limit=None if away else limit_for(kind, devices),
        checkpoint_bytes=facts["checkpoint_bytes"],
        disk_free=disk_free(Path(spec.checkpoint.save_dir or home)),
        snapshot=facts["snapshot_bytes"],
        other_form=other_form(Path(spec.data.data_path)),
    )


def _waiting_for(spec: JobSpec, kind: str, line: Line, devices: Sequence[Device]) -> str:
    ranks = spec.resources.nproc_per_node
    if spec.resources.launcher == SLURM:
        return "Slurm, once it is submitted"
    if line.free >= ranks:
        return "nothing: it would start at once"
    what = {"cpu": "CPU slots", "cuda": "GPUs"}.get(kind, kind)
    return f"{ranks} {what}; {line.free} of {count(devices, kind)} free"
