"""Retention: which checkpoints are kept (a pure decision), and how the others are removed or reduced to weights."""

import contextlib
import os
import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from trainyard.contract.allowed_paths import directory_inside, link_descriptor
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
    open_saved,
    read_manifest,
    saving_directory,
    verify,
    write_manifest,
)
from trainyard.worker.paths import save_roots

SUPERSEDED_DIR = re.compile(re.escape(SUPERSEDED_PREFIX) + r"step-(\d{8,})(?:-weights)?(?:-\d+)?")
"""A checkpoint that was set aside because the run went back to an earlier step."""

MIN_KEPT = 2
"""Valid checkpoints that are kept whatever ``keep_last`` is: one may turn out to be damaged."""

MILESTONE_FILES = (MODEL_FILE, STATE_FILE)


def checkpoints_to_delete(
    valid_steps: Iterable[int], keep_last: int, keep_every: int | None
) -> tuple[list[int], list[int]]:
    """Return (steps to delete, steps to reduce to their weights): all but the newest ``keep_last``, newest first.

    The weights of multiples of ``keep_every`` are kept. Step 0 is not kept, because its weights are untrained.
    """
    newest_first = sorted(valid_steps, reverse=True)
    old = newest_first[max(keep_last, MIN_KEPT) :]
    milestones = [step for step in old if step and keep_every and step % keep_every == 0]
    return [step for step in old if step not in milestones], milestones


class Pruned(NamedTuple):
    """A full checkpoint that was removed, and the milestone that is left of it, if any."""

    step: int
    path: Path
    weights: CheckpointInfo | None = None


def delete_old_checkpoints(artifacts: ArtifactDir, keep_last: int, keep_every: int | None) -> list[Pruned]:
    """Remove the checkpoints that are no longer kept, and return them.

    One that looks damaged never counts as kept. If the weights of a milestone cannot be published, its full checkpoint
    stays until the next time.
    """
    published = dict(artifacts.published())
    valid = [step for step, path in published.items() if verify(path, thorough=False) is None]
    to_delete, milestones = checkpoints_to_delete(valid, keep_last, keep_every)
    pruned = [Pruned(step, published[step]) for step in to_delete]
    for step in milestones:
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            pruned.append(Pruned(step, published[step], keep_weights(artifacts, step, published[step])))
    _delete_superseded(artifacts, valid)
    return [each for each in pruned if remove(each.path)]


def _delete_superseded(artifacts: ArtifactDir, valid_steps: list[int]) -> None:
    """Delete superseded checkpoints once the run has reached their step again and has MIN_KEPT valid ones."""
    if len(valid_steps) < MIN_KEPT:
        return
    with directory_inside(artifacts.checkpoints, save_roots()) as checkpoints:
        for path in _entries(checkpoints):
            match = SUPERSEDED_DIR.fullmatch(path.name)
            if match is not None and int(match.group(1)) <= max(valid_steps):
                shutil.rmtree(path, ignore_errors=True)


def remove(path: Path) -> bool:
    """Unpublish a checkpoint by one rename, then delete its files. Return False if it could not be unpublished."""
    try:
        with directory_inside(path.parent, save_roots()) as folder:
            unpublished = folder / f"{REMOVING_PREFIX}{path.name}"
            shutil.rmtree(unpublished, ignore_errors=True)
            (folder / path.name).rename(unpublished)
            shutil.rmtree(unpublished, ignore_errors=True)
    except OSError:
        return False
    return True


def delete_leftovers(artifacts: ArtifactDir) -> int:
    """Delete what killed attempts were writing or removing, and return how many. No save of this job may be running."""
    deleted = 0
    for parent in (artifacts.checkpoints, artifacts.out):
        if not parent.is_dir():
            continue
        with directory_inside(parent, save_roots()) as folder:
            for path in _entries(folder):
                if parent == artifacts.checkpoints and path.name.startswith((SAVING_PREFIX, REMOVING_PREFIX)):
                    shutil.rmtree(path, ignore_errors=True)
                    deleted += 1
                elif parent == artifacts.out and path.name.startswith(".") and path.is_file():
                    path.unlink(missing_ok=True)
                    deleted += 1
    return deleted


def _entries(directory: Path) -> list[Path]:
    return sorted(directory.iterdir()) if directory.is_dir() else []


def keep_weights(artifacts: ArtifactDir, step: int, full: Path) -> CheckpointInfo:
    """Publish the weights of the checkpoint ``full`` as a milestone. Raises OSError, ValueError, KeyError or TypeError.

    The files are linked if the file system can; then only the manifest is written.
    """
    manifest = {name: file for name, file in read_manifest(full).items() if name in MILESTONE_FILES}
    final = artifacts.milestone(step)
    if _milestone_manifest(final) != manifest:
        with directory_inside(final.parent, save_roots()) as folder:
            shutil.rmtree(folder / final.name, ignore_errors=True)
        with atomic_directory(final, saving_directory(final), save_roots()) as unfinished:
            for name in manifest:
                link_or_copy(full / name, unfinished / name)
            write_manifest(unfinished, manifest)
    return checkpoint_info(step, final, MILESTONE_FILES)


def _milestone_manifest(milestone: Path) -> dict[str, FileDigest] | None:
    try:
        return read_manifest(milestone, MILESTONE_FILES)
    except (OSError, ValueError, KeyError, TypeError):
        return None


@failpoint("resume.link")
def link_or_copy(source: Path, target: Path) -> None:
    """Link ``source`` as ``target``, or copy it if the file system has no links. Raises OSError.

    ``source`` is a file of a checkpoint. ``target``: below a directory that `contract.allowed_paths.directory_inside`
    or `new_directory` gave.
    """
    with open_saved(source) as file:
        try:
            link_descriptor(file.fileno(), target)
            return
        except OSError:
            pass  # no links there, or not allowed
        with target.open("xb") as copy:
            shutil.copyfileobj(file, copy, 1 << 20)
            copy.flush()
            os.fsync(copy.fileno())
