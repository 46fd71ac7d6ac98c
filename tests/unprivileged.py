"""Tests of missing permissions, also if they run as root, who may read and write everything."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

NOBODY = 65534


@contextmanager
def drop_root() -> Iterator[None]:
    """Run the block as the unprivileged user 65534 if the tests run as root, and as they are otherwise."""
    root = os.geteuid() == 0
    if root:
        os.seteuid(NOBODY)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)


@contextmanager
def public_tmp_dir() -> Iterator[Path]:
    """Make a folder that every user can list: pytest's own folders are readable by their owner alone."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    try:
        yield folder
    finally:
        shutil.rmtree(folder)
