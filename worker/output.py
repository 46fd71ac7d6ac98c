"""Redirection of a process's output to a log file. Standard library only, because the agent imports it."""

import os
import sys
from pathlib import Path


def redirect_output(log: Path) -> None:
    """Append everything that this process and its libraries print to ``log``. Raises OSError."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    sys.stdout.flush()
    sys.stderr.flush()
    # By descriptor, because libraries written in C do not use sys.stdout.
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)
