"""Which checkpoints are kept. The decision is pure; removal takes the name away first, then the files."""

import contextlib
import os
import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from trainyard.contract.failpoints import failpoint
from trainyard.contract.rundir import (
    MODEL_FILE,
    REMOVING_PREFIX,
    SAVING_PREFIX,
    STATE_FILE,
    SUPERSEDED_PREFIX,
    ArtifactDir,
    FileDigest,
    atomic_directory,
)
from trainyard.worker.checkpoint.files import (
    CheckpointInfo,
    checkpoint_info,
    read_manifest,
    saving_directory,
    verify,
    write_manifest,
)

SUPERSEDED_DIR = re.compile(re.escape(SUPERSEDED_PREFIX) + r"step-(\d{8,})(?:-weights)?(?:-\d+)?")

"""A checkpoint that was set aside because the run went back behind it."""

MIN_KEPT = 2

"""Sound checkpoints that are kept whatever ``keep_last`` says: one may turn out damaged."""


def checkpoints_to_delete(
    sound_steps: Iterable[int], keep_last: int, keep_every: int | None
) -> tuple[list[int], list[int]]:
    """(steps that go, steps of which the weights stay): older than the newest ``keep_last``, newest first.

    The weights of multiples of ``keep_every`` stay.
    """
    newest_first = sorted(sound_steps, reverse=True)
    old = newest_first[max(keep_last, MIN_KEPT) :]
    kept = [step for step in old if keep_every and step % keep_every == 0]
    return [step for step in old if step not in kept], kept


class Pruned(NamedTuple):
    """A full checkpoint that is gone, and what is left of it."""

    step: int
    path: Path
    weights: CheckpointInfo | None = None


def delete_old_checkpoints(products: ArtifactDir, keep_last: int, keep_every: int | None) -> list[Pruned]:
    """Remove what is surplus. One that looks damaged never counts as one that is kept.

    Where a milestone's weights cannot be put aside, its whole checkpoint stays until the next time.
    """
    published = dict(products.published())
    sound = [step for step, path in published.items() if verify(path, thorough=False) is None]
    going, staying = checkpoints_to_delete(sound, keep_last, keep_every)
    leaving = [Pruned(step, published[step]) for step in going]
    for step in staying:
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            leaving.append(Pruned(step, published[step], keep_weights(products, step, published[step])))
    _forget_superseded(products, sound)
    return [pruned for pruned in leaving if remove(pruned.path)]


def _forget_superseded(products: ArtifactDir, sound: list[int]) -> None:
    """Delete what the user went back behind, once the run has come as far again and has ``LEAST`` sound ones."""
    if len(sound) < MIN_KEPT:
        return
    for path in _entries(products.checkpoints):
        match = SUPERSEDED_DIR.fullmatch(path.name)
        if match is not None and int(match.group(1)) <= max(sound):
            shutil.rmtree(path, ignore_errors=True)


def remove(path: Path) -> bool:
    """Unpublish a checkpoint by one rename, then delete its files; False where it could not be unpublished."""
    leaving = path.with_name(f"{REMOVING_PREFIX}{path.name}")
    shutil.rmtree(leaving, ignore_errors=True)
    try:
        path.rename(leaving)
    except OSError:
        return False
    shutil.rmtree(leaving, ignore_errors=True)
    return True


def delete_leftovers(products: ArtifactDir) -> int:
    """Delete what earlier attempts were writing or removing when they were killed. Nothing of ours may be live then."""
    found = [p for p in _entries(products.checkpoints) if p.name.startswith((SAVING_PREFIX, REMOVING_PREFIX))]
    for directory in found:
        shutil.rmtree(directory, ignore_errors=True)
    torn = [p for p in _entries(products.out) if p.name.startswith(".") and p.is_file()]
    for file in torn:
        file.unlink(missing_ok=True)
    return len(found) + len(torn)


def _entries(directory: Path) -> list[Path]:
    return sorted(directory.iterdir()) if directory.is_dir() else []


MILESTONE_FILES = (MODEL_FILE, STATE_FILE)


def keep_weights(products: ArtifactDir, step: int, full: Path) -> CheckpointInfo:
    """Publish the weights of the full checkpoint ``full`` as a milestone. Raises OSError, ValueError or KeyError.

    The files are linked, not copied, where the file system can: nothing is written but the manifest.
    """
    manifest = {name: file for name, file in read_manifest(full).items() if name in MILESTONE_FILES}
    final = products.milestone(step)
    if _manifest(final) != manifest:
        shutil.rmtree(final, ignore_errors=True)
        with atomic_directory(final, saving_directory(final)) as unfinished:
            for name in manifest:
                link_or_copy(full / name, unfinished / name)
            write_manifest(unfinished, manifest)
    return checkpoint_info(step, final, MILESTONE_FILES)


def _manifest(milestone: Path) -> dict[str, FileDigest] | None:
    try:
        return read_manifest(milestone, MILESTONE_FILES)
    except (OSError, ValueError, KeyError, TypeError):
        return None


@failpoint("resume.link")
def link_or_copy(source: Path, target: Path) -> None:
    """Link ``source`` as ``target``, or copy it if the file system has no links. Raises OSError.

    `service.storage.share` has a stricter one: the service does not follow a symbolic link that a run may have left.
    """
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
        with target.open("rb") as file:
            os.fsync(file.fileno())
