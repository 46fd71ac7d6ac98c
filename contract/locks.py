"""Kernel locks on files: they end with their holders, however those end. Standard library only."""

import fcntl
import os
import time
from pathlib import Path
from typing import Self


class LockBusy(Exception):
    """Somebody else holds the lock; the message names the file."""


class FileLock:
    """A `flock` on ``path``, held until `release` or the end of every process that has its descriptor."""

    def __init__(self, path: Path) -> None:
        self.path = path
        # The file is never removed: a lock on a name that another process has replaced would protect nothing.
        self.descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)

    def take(self, *, shared: bool = False, seconds: float = 0.0) -> Self:
        """Take the lock, or change it, within ``seconds``. Raises LockBusy, and then holds what it held before."""
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
        """Close this descriptor; a child that inherited it goes on holding the lock."""
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


def is_held(path: Path) -> bool:
    """Whether anybody holds the lock on ``path``, shared or not."""
    if not path.exists():
        return False
    with FileLock(path) as lock:
        try:
            lock.take()
        except LockBusy:
            return True
    return False
