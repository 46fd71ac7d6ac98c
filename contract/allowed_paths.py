"""Which paths of others a run may touch. The service asks at submit, the worker again: a link may have been changed."""

import os
from collections.abc import Iterable
from pathlib import Path


def outside_reason(path: str | Path, roots: Iterable[Path], content: bool = True) -> str | None:
    """Why ``path`` is not below one of ``roots``, links followed to their end; None where it is.

    ``content``: of a directory, what lies directly in it counts too: a file of a tokenizer or of weights may be a link
    by itself.
    """
    allowed = tuple(roots)
    try:
        real = Path(path).resolve()
        if not _below(real, allowed):
            return "lies outside"
        links = _links(real) if content else []
        strays = [link for link in links if not _below(Path(link.path).resolve(), allowed)]
    except (OSError, RuntimeError, ValueError):
        return "cannot be resolved inside"
    return "holds a link that leads outside" if strays else None


def _below(real: Path, roots: tuple[Path, ...]) -> bool:
    return any(real.is_relative_to(root) for root in roots)


def _links(directory: Path) -> list[os.DirEntry[str]]:
    if not directory.is_dir():
        return []
    with os.scandir(directory) as entries:
        return [entry for entry in entries if entry.is_symlink()]
