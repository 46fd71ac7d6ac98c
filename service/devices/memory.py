"""Memory and disk space of this host."""

import shutil
from collections.abc import Sequence
from pathlib import Path

from trainyard.service.devices.inventory import Device

MEMINFO = Path("/proc/meminfo")
CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")


def host_memory(meminfo: Path = MEMINFO, cgroup: Path = CGROUP_LIMIT) -> int | None:
    """Return the memory of this host in bytes, or the limit of its container if that is less; None if unknown."""
    sizes = [size for size in (_memory_total(meminfo), _cgroup_limit(cgroup)) if size is not None]
    return min(sizes, default=None)


def memory_limit(kind: str, devices: Sequence[Device]) -> int | None:
    """Return the memory available to a run in bytes: on a CPU for all its ranks, on a GPU for each. None if unknown."""
    if kind == "cpu":
        return host_memory()
    return min(
        (each.memory_bytes for each in devices if kind in (each.kind, each.id) and each.memory_bytes), default=None
    )


def free_memory(kind: str, devices: Sequence[Device], ranks: int = 1, meminfo: Path = MEMINFO) -> int | None:
    """Return the bytes that are free now: of the host on a CPU, else of one GPU. None if unknown.

    With several ranks, it is the GPU with the least free memory among those that the run would use.
    """
    if kind == "cpu":
        sizes = [size for size in (_meminfo(meminfo, "MemAvailable"), host_memory(meminfo)) if size is not None]
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


def _memory_total(meminfo: Path) -> int | None:
    return _meminfo(meminfo, "MemTotal")


def _meminfo(meminfo: Path, name: str) -> int | None:
    try:
        line = next(line for line in meminfo.read_text().splitlines() if line.startswith(f"{name}:"))
        return int(line.split()[1]) * 1024
    except (OSError, StopIteration, ValueError, IndexError):
        return None


def _cgroup_limit(file: Path) -> int | None:
    try:
        return int(file.read_text())
    except (OSError, ValueError):
        return None
