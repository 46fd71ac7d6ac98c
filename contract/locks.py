"""Kernel locks on files. They are released when the process that holds them ends. Standard library only."""

import fcntl
import os
import time
from pathlib import Path
from typing import Self


class LockBusy(Exception):
    """Another process holds the lock. The message names the file."""


class FileLock:
    """A `flock` on ``path``, held until `release`, or until all processes that have its descriptor have ended."""

    def __init__(self, path: Path) -> None:
        self.path = path
        # The file is never deleted: a lock on a file that another process has replaced would protect nothing.
        self.descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)

    @classmethod
    def acquire(cls, path: Path, *, seconds: float = 0.0) -> Self:
        """Return the exclusive lock on ``path``. Raises LockBusy after ``seconds``; the file is then closed."""
        lock = cls(path)
        try:
            return lock.take(seconds=seconds)
        except LockBusy:
            lock.release()
            raise

    def take(self, *, shared: bool = False, seconds: float = 0.0) -> Self:
        """Acquire the lock, or change it between shared and exclusive, within ``seconds``.

        Raises LockBusy, and keeps the lock that it had before.
        """
        operation = (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB
        deadline = time.monotonic() + seconds
        while True:
            try:
                fcntl.flock(self.descriptor, operation)
                return self
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    raise LockBusy(f"{self.path} is held by another process") from None
                time.sleep(0.02)

    def release(self) -> None:
        """Close the descriptor. A child process that has inherited it keeps the lock."""
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


def is_held(path: Path) -> bool:
    """Return whether a process holds the lock on ``path``, shared or exclusive."""
    if not path.exists():
        return False
    with FileLock(path) as lock:
        try:
            lock.take()
        except LockBusy:
            return True
    return False
