"""What `curl` would have done: each step of the demo as a command that can be copied."""

import shlex
from pathlib import Path


def curl(method: str, url: str, body_file: Path | None = None) -> str:
    """One line for a shell."""
    words = ["curl", "-sS"]
    if method != "GET":
        words += ["-X", method]
    if body_file is not None:
        words += ["-H", "Content-Type: application/json", "-d", f"@{body_file}"]
    return shlex.join([*words, url])
