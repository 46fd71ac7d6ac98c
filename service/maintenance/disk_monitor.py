"""Free space of the disks that the service and its runs write to.

A disk is low if less is free than both limits allow, and recovers only a little above them, so that a disk at its limit
does not alert again and again.
"""

import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from trainyard.service.settings import Settings

FULL_BYTES = 64 << 20  # with less free than this, the service's own database may not be able to grow
RECOVERY_FACTOR = 1.1  # A low disk recovers when this many times the limit is free
STALE_SECONDS = 60.0  # readings older than this are ignored: a hung mount blocks `statvfs`


class DiskState(StrEnum):
    """State of a disk."""

    OK = "ok"
    LOW = "low"
    FULL = "full"
    UNREADABLE = "unreadable"


@dataclass(frozen=True)
class DiskReading:
    """A file system's usage in bytes and inodes. ``files`` is 0 if it does not count inodes."""

    total: int
    free: int
    files: int = 0
    files_free: int = 0
    device: int = 0
    read_only: bool = False


@dataclass(frozen=True)
class DiskLimits:
    """A disk with less free than this is low. 0 switches a limit off. With both, the smaller one counts."""

    size: int
    percent: int

    def of(self, total: int) -> int:
        """Return the limit in bytes for a disk of ``total`` bytes; 0: never low."""
        limits = [limit for limit in (self.size, total * self.percent // 100) if limit > 0]
        return min(limits, default=0)


@dataclass(frozen=True)
class Disk:
    """One file system. ``holds``: which of home, save_root and corpus_cache are on it."""

    paths: tuple[Path, ...]
    holds: tuple[str, ...]
    usage: DiskReading
    limit: int
    state: DiskState

    @property
    def name(self) -> str:
        """Short name, the same on every host: what the disk holds."""
        return "+".join(self.holds)


def disk_state(usage: DiskReading, limits: DiskLimits, before: DiskState | None) -> DiskState:
    """Return the state of a disk whose last state was ``before``."""
    if usage.read_only or usage.free < FULL_BYTES or (usage.files and not usage.files_free):
        return DiskState.FULL
    factor = RECOVERY_FACTOR if before in (DiskState.LOW, DiskState.FULL) else 1.0
    few_inodes = usage.files and usage.files_free * 100 < usage.files * limits.percent * factor
    return DiskState.LOW if usage.free < limits.of(usage.total) * factor or few_inodes else DiskState.OK


def usage_of(path: Path) -> DiskReading:
    """Return the usage of the file system that ``path`` is on. Raises OSError."""
    stat = os.statvfs(path)
    return DiskReading(
        total=stat.f_blocks * stat.f_frsize,
        free=stat.f_bavail * stat.f_frsize,
        files=stat.f_files,
        files_free=stat.f_favail,
        device=path.stat().st_dev,
        read_only=bool(stat.f_flag & os.ST_RDONLY),
    )


class DiskMonitor:
    """Polls every disk. A disk that hangs blocks `poll`, and `readings` only if there are none yet."""

    def __init__(
        self,
        roots: Mapping[str, Sequence[Path]],
        limits: DiskLimits,
        read_usage: Callable[[Path], DiskReading] = usage_of,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._roots = [(name, path) for name, paths in roots.items() for path in paths]
        self._limits = limits
        self._read_usage = read_usage
        self._monotonic = monotonic
        self._lock = threading.Lock()
        self._latest: tuple[Disk, ...] | None = None
        self._polled_at = 0.0

    @classmethod
    def of(cls, settings: Settings) -> "DiskMonitor":
        roots = {"home": [settings.home], "save_root": settings.save_roots, "corpus_cache": [settings.corpus_cache]}
        return cls(roots, DiskLimits(settings.disk_bytes, settings.disk_percent))

    def poll(self) -> tuple[Disk, ...]:
        """Query every file system now."""
        usages = [(name, path, self._usage(path)) for name, path in self._roots]
        with self._lock:
            before = {disk.usage.device: disk.state for disk in self._latest or ()}
            self._latest, self._polled_at = tuple(self._group_by_device(usages, before)), self._monotonic()
            return self._latest

    def _usage(self, path: Path) -> DiskReading | None:
        # A folder that does not exist yet will be created on its parent's file system. None: it does not answer.
        for place in (path, *path.parents):
            try:
                return self._read_usage(place)
            except FileNotFoundError:
                continue
            except OSError:
                break
        return None

    def _group_by_device(
        self, usages: Sequence[tuple[str, Path, DiskReading | None]], before: Mapping[int, DiskState]
    ) -> "list[Disk]":
        groups: dict[object, list[tuple[str, Path, DiskReading | None]]] = {}
        for name, path, usage in usages:
            groups.setdefault(usage.device if usage is not None else path, []).append((name, path, usage))
        return [self._to_disk(mounts, before) for mounts in groups.values()]

    def _to_disk(self, mounts: Sequence[tuple[str, Path, DiskReading | None]], before: Mapping[int, DiskState]) -> Disk:
        usage = mounts[0][2]
        paths, holds = tuple(path for _, path, _ in mounts), tuple(dict.fromkeys(name for name, _, _ in mounts))
        if usage is None:
            return Disk(paths, holds, DiskReading(0, 0), 0, DiskState.UNREADABLE)
        state = disk_state(usage, self._limits, before.get(usage.device))
        return Disk(paths, holds, usage, self._limits.of(usage.total), state)

    def readings(self) -> tuple[Disk, ...]:
        """Return the latest readings."""
        return self._latest if self._latest is not None else self.poll()

    @property
    def stale(self) -> bool:
        """Whether a poll has been waiting for a disk for long."""
        return self._latest is not None and self._monotonic() - self._polled_at > STALE_SECONDS
