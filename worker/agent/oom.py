"""Did the kernel kill for want of memory? Asked of the cgroup, so that another tenant's kill is not taken for ours.

Other attempts of the same service share the cgroup. So a kill counts only where it came just before the end, and what
nobody counts is not guessed at. Standard library only.
"""

import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from trainyard.contract.processes import descendants

PROC = Path("/proc")
POLL_SECONDS = 1.0

OOM_WINDOW_SECONDS = 10.0
"""torchrun, and then the agent, notice within moments that a rank is gone; a host out of memory is a slow one."""


@dataclass(frozen=True)
class OomReport:
    """``kills`` of the kernel just before the end; ``peak``: bytes the attempt's processes had at most, all together.

    ``limit``: bytes the cgroup may have; None where it has no limit of its own.
    """

    kills: int = 0
    peak: int | None = None
    limit: int | None = None

    def __str__(self) -> str:
        if self.peak is None:
            return "its peak is not known"
        allowed = f" of {_gigabytes(self.limit)} allowed" if self.limit else ""
        return f"the run's processes had {_gigabytes(self.peak)} at most{allowed}"


@dataclass(frozen=True)
class Cgroup:
    """A memory cgroup: the file with its ``oom_kill`` count, and the one with its limit."""

    events: Path
    limit: Path

    def kills(self) -> int | None:
        """Out-of-memory kills in this cgroup since it was made; None where nobody counts them."""
        try:
            counts = dict(line.split() for line in self.events.read_text().splitlines())
            return int(counts["oom_kill"])
        except (OSError, ValueError, KeyError):
            return None

    def limit_bytes(self) -> int | None:
        """The limit, or None: version 2 says "max" then, version 1 the largest number of pages."""
        try:
            limit = int(self.limit.read_text())
        except (OSError, ValueError):
            return None
        return limit if limit < 2**60 else None


def own_cgroup(proc: Path = PROC) -> Cgroup | None:
    """The memory cgroup that this process and its children live in, version 2 or 1, where it counts kills."""
    return next((found for found in _cgroups(proc) if found.kills() is not None), None)


def _cgroups(proc: Path) -> Iterator[Cgroup]:
    try:
        mounts = [line.split() for line in (proc / "self/mountinfo").read_text().splitlines()]
        memberships = [line.split(":", 2) for line in (proc / "self/cgroup").read_text().splitlines()]
    except OSError:
        return
    for _, controllers, path in memberships:
        if controllers == "":
            for folder in _folders(mounts, path, lambda kind, _: kind == "cgroup2"):
                yield Cgroup(folder / "memory.events", folder / "memory.max")
        elif "memory" in controllers.split(","):
            for folder in _folders(mounts, path, lambda kind, options: kind == "cgroup" and "memory" in options):
                yield Cgroup(folder / "memory.oom_control", folder / "memory.limit_in_bytes")


def _folders(mounts: Iterable[list[str]], path: str, wanted: Callable[[str, list[str]], bool]) -> Iterator[Path]:
    """proc(5): ``36 35 98:0 /root /mount/point options [optional ...] - type source super,options``."""
    for fields in mounts:
        dash = fields.index("-")
        if wanted(fields[dash + 1], fields[dash + 3].split(",")):
            point = Path(fields[4])
            own = point / path.lstrip("/")
            # In a container the path may be the host's, while what is mounted is the container's own folder.
            yield own if own.is_dir() else point


class OomMonitor:
    """Looks about once a second, so that a kill has a time and the peak is known when the processes are gone."""

    def __init__(self, cgroup: Cgroup | None, resident: Callable[[], int]) -> None:
        self._cgroup = cgroup
        self._resident = resident
        self._kills = self._count()
        self._recent: list[tuple[float, int]] = []
        self._looked_at = float("-inf")
        self._peak = 0

    def poll(self, now: float) -> None:
        """``now`` is of the monotonic clock, in seconds."""
        if now - self._looked_at < POLL_SECONDS:
            return
        self._looked_at = now
        self._peak = max(self._peak, self._resident())
        self._note_kills(now)

    def report(self, now: float) -> OomReport:
        """What is known at the end of the attempt."""
        self._note_kills(now)
        kills = sum(count for at, count in self._recent if now - at <= OOM_WINDOW_SECONDS)
        limit = self._cgroup.limit_bytes() if self._cgroup is not None else None
        return OomReport(kills, self._peak or None, limit)

    def _note_kills(self, now: float) -> None:
        count = self._count()
        if count > self._kills:
            self._recent.append((now, count - self._kills))
        self._kills = count

    def _count(self) -> int:
        return (self._cgroup.kills() or 0) if self._cgroup is not None else 0


def resident_bytes_of_descendants(ancestor: int, proc: Path = PROC) -> int:
    """Bytes that the living processes below ``ancestor`` have had at most, each, together."""
    return sum(_high_water(proc / str(process.pid) / "status") for process in descendants(ancestor))


def _high_water(status: Path) -> int:
    try:
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    except (OSError, ValueError, StopIteration, IndexError):
        return 0


def of_this_agent() -> OomMonitor:
    """Watches this process's cgroup and the processes below it."""
    return OomMonitor(own_cgroup(), lambda: resident_bytes_of_descendants(os.getpid()))


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:.1f} GB"
