"""The disks that the service and its runs write to: how full they are, and when that is worth a word.

A disk becomes low where less is free than both limits allow, and has room again a little above them: one that is at the
limit is not told of again and again.
"""

import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from trainyard.service.settings import Settings

FULL_BYTES = 64 << 20
"""With less than this the service's own database cannot be relied on to grow."""

RECOVERY_FACTOR = 1.1
"""How many times the limit has to be free before a low disk counts as having room again."""

STALE_SECONDS = 60.0
"""Looks that are older say nothing: a disk that does not answer keeps whoever looks."""


class DiskState(StrEnum):
    """How a disk is."""

    OK = "ok"
    LOW = "low"
    FULL = "full"
    UNREADABLE = "unreadable"


@dataclass(frozen=True)
class Usage:
    """What the file system says, in bytes and files; ``files`` is 0 where it does not count them."""

    total: int
    free: int
    files: int = 0
    files_free: int = 0
    device: int = 0
    read_only: bool = False


@dataclass(frozen=True)
class Limits:
    """Less free than this is low; 0: does not count. With both a disk is low below the smaller of the two."""

    size: int
    percent: int

    def of(self, total: int) -> int:
        """In bytes, for a disk of ``total``; 0: never low."""
        limits = [limit for limit in (self.size, total * self.percent // 100) if limit > 0]
        return min(limits, default=0)


@dataclass(frozen=True)
class Disk:
    """One file system. ``holds`` says what of ours is on it: home, save_root, corpus_cache."""

    paths: tuple[Path, ...]
    holds: tuple[str, ...]
    usage: Usage
    limit: int
    state: DiskState

    @property
    def name(self) -> str:
        """Short, and the same on every host: what it holds."""
        return "+".join(self.holds)


def disk_state(usage: Usage, limits: Limits, before: DiskState | None) -> DiskState:
    """How a disk is, if it was ``before``."""
    if usage.read_only or usage.free < FULL_BYTES or (usage.files and not usage.files_free):
        return DiskState.FULL
    relief = RECOVERY_FACTOR if before in (DiskState.LOW, DiskState.FULL) else 1.0
    scarce = usage.files and usage.files_free * 100 < usage.files * limits.percent * relief
    return DiskState.LOW if usage.free < limits.of(usage.total) * relief or scarce else DiskState.OK


def usage_of(path: Path) -> Usage:
    """Ask the file system. Raises OSError."""
    found = os.statvfs(path)
    return Usage(
        total=found.f_blocks * found.f_frsize,
        free=found.f_bavail * found.f_frsize,
        files=found.f_files,
        files_free=found.f_favail,
        device=path.stat().st_dev,
        read_only=bool(found.f_flag & os.ST_RDONLY),
    )


class DiskMonitor:
    """The newest look at every disk. One that hangs keeps `look` waiting; it never keeps `seen`, but for the first."""

    def __init__(
        self,
        roots: Mapping[str, Sequence[Path]],
        limits: Limits,
        ask: Callable[[Path], Usage] = usage_of,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._roots = [(name, path) for name, paths in roots.items() for path in paths]
        self._limits = limits
        self._ask = ask
        self._monotonic = monotonic
        self._lock = threading.Lock()
        self._seen: tuple[Disk, ...] | None = None
        self._seen_at = 0.0

    @classmethod
    def of(cls, settings: Settings) -> "DiskMonitor":
        """Of the folders that a service with these settings writes to."""
        roots = {"home": [settings.home], "save_root": settings.save_roots, "corpus_cache": [settings.corpus_cache]}
        return cls(roots, Limits(settings.disk_bytes, settings.disk_percent))

    def poll(self) -> tuple[Disk, ...]:
        """Ask every file system now."""
        asked = [(name, path, self._usage(path)) for name, path in self._roots]
        with self._lock:
            before = {disk.usage.device: disk.state for disk in self._seen or ()}
            self._seen, self._seen_at = tuple(self._disks(asked, before)), self._monotonic()
            return self._seen

    def _usage(self, path: Path) -> Usage | None:
        """None: it cannot be asked. What is not there yet will be made where its parent is."""
        for place in (path, *path.parents):
            try:
                return self._ask(place)
            except FileNotFoundError:
                continue
            except OSError:
                break
        return None

    def _disks(self, asked: Sequence[tuple[str, Path, Usage | None]], before: Mapping[int, DiskState]) -> "list[Disk]":
        found: dict[object, list[tuple[str, Path, Usage | None]]] = {}
        for name, path, usage in asked:
            found.setdefault(usage.device if usage is not None else path, []).append((name, path, usage))
        return [self._disk(same, before) for same in found.values()]

    def _disk(self, same: Sequence[tuple[str, Path, Usage | None]], before: Mapping[int, DiskState]) -> Disk:
        usage = same[0][2]
        paths, holds = tuple(path for _, path, _ in same), tuple(dict.fromkeys(name for name, _, _ in same))
        if usage is None:
            return Disk(paths, holds, Usage(0, 0), 0, DiskState.UNREADABLE)
        state = disk_state(usage, self._limits, before.get(usage.device))
        return Disk(paths, holds, usage, self._limits.of(usage.total), state)

    def readings(self) -> tuple[Disk, ...]:
        """The newest look."""
        return self._seen if self._seen is not None else self.poll()

    @property
    def stale(self) -> bool:
        """Whether somebody looks and has got no answer for long."""
        return self._seen is not None and self._monotonic() - self._seen_at > STALE_SECONDS
