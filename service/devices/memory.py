"""Memory and disk space of this host."""

import shutil
from collections.abc import Sequence
from pathlib import Path

from trainyard.contract import cgroup
from trainyard.contract.cgroup import PROC
from trainyard.service.devices.inventory import Device


def host_memory(proc: Path = PROC) -> int | None:
    """Return the memory of this host in bytes, or the limit of its cgroup if that is less; None if unknown.

    A container has a cgroup, and so has a systemd unit.
    """
    sizes = [size for size in (_meminfo(proc, "MemTotal"), cgroup.memory_limit(proc)) if size is not None]
    return min(sizes, default=None)


def memory_limit(kind: str, devices: Sequence[Device]) -> int | None:
    """Return the memory available to a run in bytes: on a CPU for all its ranks, on a GPU for each. None if unknown."""
    if kind == "cpu":
        return host_memory()
    return min(
        (each.memory_bytes for each in devices if kind in (each.kind, each.id) and each.memory_bytes), default=None
    )


def free_memory(kind: str, devices: Sequence[Device], ranks: int = 1, proc: Path = PROC) -> int | None:
    """Return the bytes that are free now: of the host on a CPU, else of one GPU. None if unknown.

    With several ranks, it is the GPU with the least free memory among those that the run would use.
    """
    if kind == "cpu":
        sizes = [size for size in (_meminfo(proc, "MemAvailable"), host_memory(proc)) if size is not None]
        return min(sizes, default=None)
    free = sorted(
        (d.memory_bytes - (d.memory_used_bytes or 0) for d in devices if kind in (d.kind, d.id) and d.memory_bytes),
        reverse=True,
    )
    return free[min(ranks, len(free)) - 1] if free else None


def disk_free(path: Path) -> int | None:
    """Return the free bytes of the file system of ``path``, which need not exist; None if unknown."""
    for existing in (path, *path.parents):
        try:
            return shutil.disk_usage(existing).free
        except FileNotFoundError:
            continue
        except OSError:
            return None
    return None


def _meminfo(proc: Path, name: str) -> int | None:
    try:
        line = next(line for line in (proc / "meminfo").read_text().splitlines() if line.startswith(f"{name}:"))
        return int(line.split()[1]) * 1024
    except (OSError, StopIteration, ValueError, IndexError):
        return None
