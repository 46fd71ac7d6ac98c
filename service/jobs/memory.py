"""Memory of a run with each parallelism, with and without gradient checkpointing; and what makes a run fit. Pure."""

from collections.abc import Iterator
from dataclasses import asdict, replace
from typing import Any, get_args

from trainyard.contract.spec import JobSpec, Parallelism, next_memory_saving
from trainyard.model import costs


def per_rank(spec: JobSpec) -> costs.MemoryEstimate:
    """Return the memory of one rank, in bytes."""
    return costs.memory_bytes(
        spec.model,
        batch_size=spec.training.batch_size,
        seq_len=spec.data.max_seq_len,
        dtype=spec.training.dtype,
        optimizer=spec.training.optimizer,
        gradient_checkpointing=spec.training.gradient_checkpointing,
        parallelism=spec.resources.parallelism,
        world=spec.resources.ranks,
    )


def snapshot(spec: JobSpec) -> int:
    """Return the host memory of the copies that a save is written from, in bytes."""
    resources = spec.resources
    return costs.snapshot_bytes(spec.model, spec.training.optimizer, resources.parallelism, resources.nproc_per_node)


def needed(spec: JobSpec, kind: str) -> int:
    """Return the memory that is compared with `devices.memory.memory_limit`: of the host on a CPU, else of one GPU."""
    own = per_rank(spec).total
    # The copies of a GPU run are in the host's memory.
    return own * spec.resources.nproc_per_node + snapshot(spec) if kind == "cpu" else own


def state_bytes(spec: JobSpec, kind: str) -> int:
    """Return the part of `needed` that no batch size changes: weights, gradients and optimizer state."""
    own = per_rank(spec)
    state = own.weights + own.gradients + own.optimizer
    return state * spec.resources.nproc_per_node if kind == "cpu" else state


def options(spec: JobSpec, kind: str, limit: int | None) -> Iterator[dict[str, Any]]:
    """Yield each parallelism, with and without gradient checkpointing, with its memory and whether that fits."""
    for parallelism in get_args(Parallelism):
        for recomputes in (False, True):
            changed = with_settings(
                spec, {"training": {"gradient_checkpointing": recomputes}, "resources": {"parallelism": parallelism}}
            )
            yield {
                "parallelism": parallelism,
                "gradient_checkpointing": recomputes,
                "memory_bytes": asdict(per_rank(changed)),
                "fits": needed(changed, kind) <= limit if limit is not None else None,
            }


def settings_that_fit(spec: JobSpec, kind: str, limit: int | None) -> dict[str, dict[str, Any]] | None:
    """Return the changes with which a run fits that does not, as {group: {field: value}}; None if it fits or none do.

    They are added one after the other, see `next_memory_saving`.
    """
    if limit is None or needed(spec, kind) <= limit:
        return None
    changes: dict[str, dict[str, Any]] = {}
    while (saving := next_memory_saving(spec.training, spec.resources)) is not None:
        spec = with_settings(spec, saving)
        for group, fields in saving.items():
            changes.setdefault(group, {}).update(fields)
        if needed(spec, kind) <= limit:
            return changes
    return None


def with_settings(spec: JobSpec, changes: dict[str, dict[str, Any]]) -> JobSpec:
    """Return ``spec`` with other values, which must be valid."""
    groups: dict[str, Any] = {
        name: replace(spec.model, **fields) if name == "model" else getattr(spec, name).model_copy(update=fields)
        for name, fields in changes.items()
    }
    return spec.model_copy(update=groups)
