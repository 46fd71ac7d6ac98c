"""The memory cgroup of this process: its limit, and its count of out-of-memory kills. Standard library only."""

import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

PROC = Path("/proc")

UNLIMITED = 2**60
"""Version 1 has the largest number of whole pages for no limit."""


@dataclass(frozen=True)
class Cgroup:
    """The files of a memory cgroup: ``events`` has its ``oom_kill`` count, ``limits`` its limit and those above it."""

    events: Path
    limits: tuple[Path, ...]

    def kills(self) -> int | None:
        """Return the out-of-memory kills since the cgroup was created; None if they are not counted."""
        try:
            counts = dict(line.split() for line in self.events.read_text().splitlines())
            return int(counts["oom_kill"])
        except (OSError, ValueError, KeyError):
            return None

    def limit_bytes(self) -> int | None:
        """Return the lowest limit in bytes, or None if there is none: a cgroup shares the limits of those above it."""
        limits = (_limit_bytes(file) for file in self.limits)
        return min((limit for limit in limits if limit is not None), default=None)


def own_cgroup(proc: Path = PROC) -> Cgroup | None:
    """Return the memory cgroup (version 2 or 1) of this process and its children, or None if none counts kills."""
    return next((cgroup for cgroup in _cgroups(proc) if cgroup.kills() is not None), None)


def memory_limit(proc: Path = PROC) -> int | None:
    """Return the memory in bytes that this process and its children may use, or None if no cgroup limits it."""
    limits = (cgroup.limit_bytes() for cgroup in _cgroups(proc))
    return min((limit for limit in limits if limit is not None), default=None)


def _cgroups(proc: Path) -> Iterator[Cgroup]:
    try:
        mounts = [line.split(" ") for line in _lines(proc / "self/mountinfo")]
        memberships = [line.split(":", 2) for line in _lines(proc / "self/cgroup")]
    except OSError:
        return
    for _, controllers, path in memberships:
        if controllers == "":
            for folders in _folders(mounts, path, lambda kind, _: kind == "cgroup2"):
                yield Cgroup(folders[0] / "memory.events", tuple(folder / "memory.max" for folder in folders))
        elif "memory" in controllers.split(","):
            for folders in _folders(mounts, path, lambda kind, options: kind == "cgroup" and "memory" in options):
                limits = tuple(folder / "memory.limit_in_bytes" for folder in folders)
                yield Cgroup(folders[0] / "memory.oom_control", limits)


def _lines(file: Path) -> list[str]:
    # Names are bytes, in any encoding. Only "\n" ends a line: `splitlines` would cut a name at a form feed or U+2028.
    return [line for line in os.fsdecode(file.read_bytes()).split("\n") if line]


def _folders(
    mounts: Iterable[list[str]], path: str, matches: Callable[[str, list[str]], bool]
) -> Iterator[tuple[Path, ...]]:
    """Yield the cgroup's folder in each matching mount, and the folders above it, up to the mount point.

    proc(5): ``36 35 98:0 /root /mount/point options [optional ...] - type source super,options``.
    """
    for fields in mounts:
        dash = fields.index("-")
        if matches(fields[dash + 1], fields[dash + 3].split(",")):
            mount_point = Path(fields[4])
            folder = mount_point / path.lstrip("/")
            # In a container the path may be the host's, while the container's own folder is mounted.
            own = folder if folder.is_dir() else mount_point
            yield (own, *(above for above in own.parents if above.is_relative_to(mount_point)))


def _limit_bytes(file: Path) -> int | None:
    try:
        limit = int(file.read_text())
    except (OSError, ValueError):
        return None
    return limit if limit < UNLIMITED else None
