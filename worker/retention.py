"""Which checkpoints are kept. The decision is pure; removal takes the name away first, then the files."""

import shutil
from collections.abc import Iterable
from pathlib import Path

from contract.rundir import ProductDir
from worker.checkpoint import REMOVING, SAVING, find_damage

LEAST = 2
"""Sound checkpoints that are kept whatever ``keep_last`` says: one may turn out damaged."""


def surplus(sound_steps: Iterable[int], keep_last: int, keep_every: int | None) -> list[int]:
    """The steps that need not be kept: older than the newest ``keep_last``, and no multiple of ``keep_every``."""
    newest_first = sorted(sound_steps, reverse=True)
    old = newest_first[max(keep_last, LEAST) :]
    return [step for step in old if not (keep_every and step % keep_every == 0)]


def prune(products: ProductDir, keep_last: int, keep_every: int | None) -> list[tuple[int, Path]]:
    """Remove what is surplus and return it as (step, path). One that looks damaged never counts as one that is kept."""
    published = dict(products.published())
    sound = [step for step, path in published.items() if find_damage(path, thorough=False) is None]
    leaving = [(step, published[step]) for step in surplus(sound, keep_last, keep_every)]
    return [(step, path) for step, path in leaving if remove(path)]


def remove(path: Path) -> bool:
    """Unpublish a checkpoint by one rename, then delete its files; False where it could not be unpublished."""
    leaving = path.with_name(f"{REMOVING}{path.name}")
    shutil.rmtree(leaving, ignore_errors=True)
    try:
        path.rename(leaving)
    except OSError:
        return False
    shutil.rmtree(leaving, ignore_errors=True)
    return True


def collect_leftovers(products: ProductDir) -> int:
    """Delete what earlier attempts were writing or removing when they were killed. Nothing of ours may be live then."""
    found = [p for p in _entries(products.checkpoints) if p.name.startswith((SAVING, REMOVING))]
    for directory in found:
        shutil.rmtree(directory, ignore_errors=True)
    torn = [p for p in _entries(products.out) if p.name.startswith(".") and p.is_file()]
    for file in torn:
        file.unlink(missing_ok=True)
    return len(found) + len(torn)


def _entries(directory: Path) -> list[Path]:
    return sorted(directory.iterdir()) if directory.is_dir() else []
