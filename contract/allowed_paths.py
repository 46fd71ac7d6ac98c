"""Which paths of users a run may open. Checked at submit, and again by the worker: a link may have changed."""

import json
import os
from collections.abc import Iterable
from pathlib import Path


def format_roots(roots: Iterable[Path]) -> str:
    """Return directories as the value of an environment variable: a JSON list, because a path may have a colon."""
    return json.dumps([str(root) for root in roots])


def parse_roots(text: str) -> list[str]:
    """Return the directories of a JSON list, or those between colons, as people and release 0.1 write them."""
    try:
        listed = json.loads(text)
    except ValueError:
        listed = None
    if isinstance(listed, list) and all(isinstance(root, str) for root in listed):
        return [root for root in listed if root]
    return [root for root in text.split(":") if root]


def outside_reason(path: str | Path, roots: Iterable[Path], content: bool = True) -> str | None:
    """Return why ``path``, with links resolved, is not below one of ``roots``, or None if it is.

    ``content``: check the links directly in a directory too, because a file of a tokenizer or of weights may be a link.
    """
    allowed = tuple(roots)
    try:
        real = Path(path).resolve()
        if not _below(real, allowed):
            return "lies outside"
        links = _links(real) if content else []
        outside = [link for link in links if not _below(Path(link.path).resolve(), allowed)]
    except (OSError, RuntimeError, ValueError):
        return "cannot be resolved inside"
    return "holds a link that leads outside" if outside else None


def outside_files(files: Iterable[Path], roots: Iterable[Path]) -> Path | None:
    """Return the first of ``files`` that, with links resolved, is not below one of ``roots``, or None.

    Links are looked for in the files themselves; of their directories each is resolved once.
    """
    allowed = tuple(roots)
    directories: dict[Path, bool] = {}
    for file in files:
        if file.parent not in directories:
            directories[file.parent] = _below(file.parent.resolve(), allowed)
        if not directories[file.parent] or (file.is_symlink() and not _below(file.resolve(), allowed)):
            return file
    return None


def _below(real: Path, roots: tuple[Path, ...]) -> bool:
    return any(real.is_relative_to(root) for root in roots)


def _links(directory: Path) -> list[os.DirEntry[str]]:
    if not directory.is_dir():
        return []
    with os.scandir(directory) as entries:
        return [entry for entry in entries if entry.is_symlink()]
