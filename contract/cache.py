"""The corpus cache: the names in it, who uses what, and how something leaves it. Standard library only.

    KEY/                  a corpus that is built; its rows beside its shards
    .KEY.building/        one that is being built, or whose build was interrupted
    KEY.lock              held by whoever builds, or adds rows
    KEY.used              held shared by every process that has the corpus open; its time is that of the last use
    content-NAME.json     the digest of a file that was read whole; content-NN.lock for those that begin so

Lock files stay: a lock on a name that another process has made anew would protect nothing.
"""

import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from trainyard.contract.locks import FileLock, LockBusy, is_held

KEY = re.compile(r"[0-9a-f]{32}")
BUILDING, REMOVING = "building", "removing"


@dataclass(frozen=True)
class CacheEntry:
    """Something in the cache: a corpus, or what is left of an interrupted build. ``used_at``: seconds since 1970."""

    key: str
    path: Path
    bytes: int
    used_at: float
    in_use: bool

    @property
    def is_complete(self) -> bool:
        """Whether it is a corpus."""
        return self.path.name == self.key


@dataclass(frozen=True)
class CorpusCache:
    """The directory of all token shards of a host."""

    path: Path

    def directory(self, key: str) -> Path:
        """Where a corpus is, once it is built."""
        return self.path / key

    def lock(self, key: str) -> Path:
        """See above."""
        return self.path / f"{key}.lock"

    def used(self, key: str) -> Path:
        """See above."""
        return self.path / f"{key}.used"

    def use(self, key: str, waiting: Callable[[], None]) -> FileLock:
        """Keep a corpus, built or not, from being removed while the lock lives. ``waiting`` is called now and then."""
        lock = FileLock(self.used(key))
        try:
            while True:
                try:
                    lock.take(shared=True, seconds=1.0)
                    break
                except LockBusy:
                    waiting()
            os.utime(lock.path)
        except BaseException:
            lock.release()
            raise
        return lock

    def entries(self) -> list[CacheEntry]:
        """All that takes space, the least lately used first."""
        found = [self._kept(path) for path in self._directories()]
        return sorted((each for each in found if each is not None), key=lambda each: each.used_at)

    def _directories(self) -> list[Path]:
        return [path for path in self.path.iterdir() if path.is_dir()] if self.path.is_dir() else []

    def _kept(self, path: Path) -> CacheEntry | None:
        key = path.name.removeprefix(".").removesuffix(f".{BUILDING}")
        if KEY.fullmatch(key) is None:
            return None
        try:
            size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
            in_use = is_held(self.used(key)) or is_held(self.lock(key))
            return CacheEntry(key, path, size, self._used_at(key, path), in_use)
        except FileNotFoundError:
            return None  # it leaves, or is published, just now

    def _used_at(self, key: str, path: Path) -> float:
        """Of a corpus that nobody used since its uses are noted, and of a build: its newest file."""
        times = [file.stat().st_mtime for file in (path, *path.iterdir())]
        if path == self.directory(key) and self.used(key).exists():
            times = [self.used(key).stat().st_mtime]
        return max(times)

    def remove(self, kept: CacheEntry) -> bool:
        """Take it away; False where it is in use, or was used since it was looked at."""
        leaving = kept.path.with_name(f".{kept.key}.{REMOVING}-{os.getpid()}-{time.monotonic_ns()}")
        noted = self.used(kept.key).exists()  # a lock's file is made where there is none, and is of now
        with FileLock(self.lock(kept.key)) as building, FileLock(self.used(kept.key)) as used:
            try:
                building.take()
                used.take()
                if noted and self._used_at(kept.key, kept.path) > kept.used_at:
                    return False
                kept.path.rename(leaving)
            except (LockBusy, FileNotFoundError):
                return False
        # Whoever wants the corpus now builds it anew, beside what is still being deleted.
        shutil.rmtree(leaving, ignore_errors=True)
        return True

    def collect(self) -> None:
        """Delete what was leaving when its remover was killed."""
        for path in self._directories():
            if path.name.startswith(".") and f".{REMOVING}-" in path.name:
                shutil.rmtree(path, ignore_errors=True)

    def digests(self) -> Iterator[Path]:
        """The files that remember digests."""
        return self.path.glob("content-*.json")

    def forget_digests(self, before: float) -> int:
        """Forget digests that were noted before that time: a file that is still there is read once more."""
        old = [path for path in self.digests() if _older(path, before)]
        return sum(self._forget(path) for path in old)

    def _forget(self, path: Path) -> bool:
        with FileLock(self.path / f"{path.stem[:10]}.lock") as lock:
            try:
                lock.take()
                path.unlink()
            except (LockBusy, FileNotFoundError):
                return False
        return True


def _older(path: Path, before: float) -> bool:
    try:
        return path.stat().st_mtime < before
    except FileNotFoundError:
        return False


def building_of(directory: Path) -> Path:
    """Where ``directory`` is built until it is published."""
    return directory.with_name(f".{directory.name}.{BUILDING}")
