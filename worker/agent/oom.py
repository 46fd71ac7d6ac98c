"""Detects kills by the kernel's out-of-memory killer from the cgroup's counters. Standard library only.

The cgroup keeps out the kills of other tenants, but attempts of the same service share it. So a kill counts only if it
happened just before the end. Without a counter no kill is assumed.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from trainyard.contract.cgroup import PROC, Cgroup, own_cgroup
from trainyard.contract.processes import descendants

POLL_SECONDS = 1.0

OOM_WINDOW_SECONDS = 10.0
"""Kills count if they are at most this old at the end. A host without memory is slow to report a killed rank."""


@dataclass(frozen=True)
class OomReport:
    """``kills``: out-of-memory kills just before the end; ``peak``: peak bytes of all the attempt's processes together.

    ``limit``: the cgroup's limit in bytes, or None.
    """

    kills: int = 0
    peak: int | None = None
    limit: int | None = None

    def __str__(self) -> str:
        if self.peak is None:
            return "its peak is not known"
        allowed = f" of {_gigabytes(self.limit)} allowed" if self.limit else ""
        return f"the run's processes had {_gigabytes(self.peak)} at most{allowed}"


class OomMonitor:
    """Polls once a second, to know the time of each kill, and the peak before the processes are gone."""

    def __init__(self, cgroup: Cgroup | None, resident_bytes: Callable[[], int]) -> None:
        self._cgroup = cgroup
        self._resident_bytes = resident_bytes
        self._kills = self._count_kills()
        self._new_kills: list[tuple[float, int]] = []
        self._polled_at = float("-inf")
        self._peak = 0

    def poll(self, now: float) -> None:
        """Read the counters; ``now`` is of the monotonic clock, in seconds."""
        if now - self._polled_at < POLL_SECONDS:
            return
        self._polled_at = now
        self._peak = max(self._peak, self._resident_bytes())
        self._record_kills(now)

    def report(self, now: float) -> OomReport:
        self._record_kills(now)
        kills = sum(count for at, count in self._new_kills if now - at <= OOM_WINDOW_SECONDS)
        limit = self._cgroup.limit_bytes() if self._cgroup is not None else None
        return OomReport(kills, self._peak or None, limit)

    def _record_kills(self, now: float) -> None:
        count = self._count_kills()
        if count > self._kills:
            self._new_kills.append((now, count - self._kills))
        self._kills = count

    def _count_kills(self) -> int:
        return (self._cgroup.kills() or 0) if self._cgroup is not None else 0


def resident_bytes_of_descendants(ancestor: int, proc: Path = PROC) -> int:
    """Return the sum of the peak resident bytes of the living processes below ``ancestor``."""
    return sum(_peak_resident_bytes(proc / str(process.pid) / "status") for process in descendants(ancestor))


def _peak_resident_bytes(status: Path) -> int:
    try:
        line = next(line for line in status.read_text(errors="replace").splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    except (OSError, ValueError, StopIteration, IndexError):
        return 0


def monitor_own_processes() -> OomMonitor:
    """Return a monitor of this process's cgroup and of the processes below it."""
    return OomMonitor(own_cgroup(), lambda: resident_bytes_of_descendants(os.getpid()))


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:.1f} GB"
