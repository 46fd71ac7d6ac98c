"""The corpus cache: its file names, its locks, and how entries are removed. Standard library only.

    KEY/                  a tokenized corpus: token shards and packed sequences
    .KEY.building/        a corpus that is being built, or whose build was interrupted
    KEY.lock              held by the process that builds the corpus, or packs sequences
    KEY.used              held shared by each process that has the corpus open; its mtime is the time of the last use
    content-NAME.json     the digest of a file that was read completely; content-NN.lock for the names that begin so

Lock files are never deleted: a lock on a file that another process has replaced would protect nothing.
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
    """A corpus in the cache, or the files of an unfinished build. ``used_at``: seconds since 1970."""

    key: str
    path: Path
    bytes: int
    used_at: float
    in_use: bool

    @property
    def is_complete(self) -> bool:
        """Whether it is a corpus and not a build."""
        return self.path.name == self.key


@dataclass(frozen=True)
class CorpusCache:
    """The directory of all token shards of a host."""

    path: Path

    def directory(self, key: str) -> Path:
        """Return the directory of a corpus that is built."""
        return self.path / key

    def lock(self, key: str) -> Path:
        return self.path / f"{key}.lock"

    def used(self, key: str) -> Path:
        return self.path / f"{key}.used"

    def use(self, key: str, waiting: Callable[[], None]) -> FileLock:
        """Return a lock that keeps a corpus, built or not, from being removed. ``waiting`` is called each second."""
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
        """Return all entries, the least recently used first."""
        entries = [self._entry(path) for path in self._directories()]
        return sorted((entry for entry in entries if entry is not None), key=lambda entry: entry.used_at)

    def _directories(self) -> list[Path]:
        return [path for path in self.path.iterdir() if path.is_dir()] if self.path.is_dir() else []

    def _entry(self, path: Path) -> CacheEntry | None:
        key = path.name.removeprefix(".").removesuffix(f".{BUILDING}")
        if KEY.fullmatch(key) is None:
            return None
        try:
            size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
            in_use = is_held(self.used(key)) or is_held(self.lock(key))
            return CacheEntry(key, path, size, self._used_at(key, path), in_use)
        except FileNotFoundError:
            return None  # it is being removed or published

    def _used_at(self, key: str, path: Path) -> float:
        # For a build, or a corpus of a version that did not write KEY.used: the time of the newest file.
        times = [file.stat().st_mtime for file in (path, *path.iterdir())]
        if path == self.directory(key) and self.used(key).exists():
            times = [self.used(key).stat().st_mtime]
        return max(times)

    def remove(self, entry: CacheEntry) -> bool:
        """Delete an entry. Return False if it is in use, or was used since ``entry`` was read."""
        removing = entry.path.with_name(f".{entry.key}.{REMOVING}-{os.getpid()}-{time.monotonic_ns()}")
        has_use_time = self.used(entry.key).exists()  # before FileLock creates the file, with the present time
        with FileLock(self.lock(entry.key)) as building, FileLock(self.used(entry.key)) as used:
            try:
                building.take()
                used.take()
                if has_use_time and self._used_at(entry.key, entry.path) > entry.used_at:
                    return False
                entry.path.rename(removing)
            except (LockBusy, FileNotFoundError):
                return False
        # Outside the locks: a job that needs the corpus now builds it again while this is being deleted.
        shutil.rmtree(removing, ignore_errors=True)
        return True

    def delete_leftovers(self) -> None:
        """Delete entries whose removal was interrupted."""
        for path in self._directories():
            if path.name.startswith(".") and f".{REMOVING}-" in path.name:
                shutil.rmtree(path, ignore_errors=True)

    def digests(self) -> Iterator[Path]:
        """Return the files that hold digests."""
        return self.path.glob("content-*.json")

    def forget_digests(self, before: float) -> int:
        """Delete digests that are older than the time ``before``. Return their number."""
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
    """Return where ``directory`` is built before it is published."""
    return directory.with_name(f".{directory.name}.{BUILDING}")
