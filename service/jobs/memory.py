"""Memory of a run with each parallelism and gradient checkpointing, and the settings that make it fit. Pure."""

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
    """Return the bytes of host memory for the copies from which a save is written."""
    resources = spec.resources
    return costs.snapshot_bytes(spec.model, spec.training.optimizer, resources.parallelism, resources.nproc_per_node)


def needed(spec: JobSpec, kind: str) -> int:
    """Return the memory that is compared with `devices.memory.memory_limit`: of the host on a CPU, else of one GPU."""
    own = per_rank(spec).total
    # The copies of a GPU run are in the host's memory.
    return own * spec.resources.nproc_per_node + snapshot(spec) if kind == "cpu" else own


def state_bytes(spec: JobSpec, kind: str) -> int:
    """Return the bytes of float32 weights, gradients and optimizer state, on a CPU of all ranks, on a GPU of one."""
    own = per_rank(with_settings(spec, {"training": {"dtype": "float32"}}))
    is_gathered = spec.resources.parallelism == "fsdp" and spec.resources.ranks > 1
    gathered = costs.gathered_bytes(spec.model, "float32") if is_gathered else 0
    state = own.weights - gathered + own.gradients + own.optimizer
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


MAX_BATCH_SIZE = 65536
MEMORY_SHARE = 0.9
"""Part of the free memory that a suggested batch size may use: temporary buffers are not part of the estimate."""


def suggested_batch_size(spec: JobSpec, kind: str, free: int | None) -> int | None:
    """Return the largest batch_size that fits into ``free`` bytes; None if unknown, or if no size fits."""

    def fits(size: int) -> bool:
        return needed(with_settings(spec, {"training": {"batch_size": size}}), kind) <= MEMORY_SHARE * (free or 0)

    if free is None or not fits(1):
        return None
    low, high = 1, MAX_BATCH_SIZE + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def settings_that_fit(spec: JobSpec, kind: str, limit: int | None) -> dict[str, dict[str, Any]] | None:
    """Return the changes that make the run fit, as {group: {field: value}}; None if it fits or if none help.

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
