"""Move a job's checkpoints and weights if its ``save_dir`` has changed since an earlier attempt."""

import contextlib
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from trainyard.contract.allowed_paths import directory_inside
from trainyard.contract.events import CheckpointRemoved, Event
from trainyard.contract.failpoints import hit
from trainyard.contract.rundir import (
    CHECKPOINT_FILES,
    REMOVING_PREFIX,
    SAVING_PREFIX,
    ArtifactDir,
    RunDir,
    atomic_directory,
)
from trainyard.contract.spec import JobSpec
from trainyard.worker.checkpoint.files import checkpoint_info, read_state, saving_directory
from trainyard.worker.checkpoint.retention import MILESTONE_FILES, link_or_copy, remove
from trainyard.worker.errors import save_error
from trainyard.worker.paths import check_allowed_paths, save_roots


def move_artifacts(spec: JobSpec, run: RunDir, artifacts: ArtifactDir, emit: Callable[[Event], None]) -> None:
    """Move what earlier attempts wrote below another ``save_dir`` to ``artifacts``. For rank 0 only.

    Files are linked if both are on one file system, else copied. Each checkpoint is published at its new place before
    it is removed from the old one, so an interrupted move loses nothing and is continued by the next attempt.
    Raises TrainingError.
    """
    for save_dir in run.save_dirs():
        old = run.artifacts(save_dir)
        if old.path.resolve() == artifacts.path.resolve() or not old.path.is_dir():
            continue
        checkpoint = spec.checkpoint.model_copy(update={"save_dir": save_dir})
        check_allowed_paths(spec.model_copy(update={"checkpoint": checkpoint}), run)
        try:
            _move(old, artifacts, emit)
        except OSError as error:
            raise save_error(error, f"the checkpoints of {old.path}, which are moved to the new save_dir,") from error


def _move(old: ArtifactDir, new: ArtifactDir, emit: Callable[[Event], None]) -> None:
    for step, path in old.published():
        _move_checkpoint(step, path, new.checkpoint(step), emit)
    for step, path in old.milestones():
        _move_checkpoint(step, path, new.milestone(step), emit)
    for folder in (old.checkpoints, old.out, old.exports, old.origin):
        target = new.path / folder.name
        if not folder.is_dir() or folder.is_symlink():
            continue
        if folder == old.origin:
            _move_entry(folder, target)
            continue
        for entry in sorted(folder.iterdir()):
            if not entry.name.startswith((SAVING_PREFIX, REMOVING_PREFIX)):
                _move_entry(entry, target / entry.name)
        _delete(folder)
    # The run directory itself has other files and stays.
    with contextlib.suppress(OSError):
        old.path.rmdir()


def _move_checkpoint(step: int, path: Path, final: Path, emit: Callable[[Event], None]) -> None:
    _copy(path, final)
    hit("relocate.copied")
    kind: Literal["full", "weights"] = "weights" if final.name.endswith("-weights") else "full"
    # A damaged one is moved as well; the resume finds the damage.
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        moved = checkpoint_info(step, final, MILESTONE_FILES if kind == "weights" else CHECKPOINT_FILES)
        emit(moved.saved_event(checkpoint_kind=kind, loss=_loss(final)))
    remove(path)
    emit(CheckpointRemoved(step=step, path=str(path), checkpoint_kind=kind, why=f"moved to {final}"))


def _loss(path: Path) -> float | None:
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        return read_state(path).loss
    return None


def _move_entry(path: Path, target: Path) -> None:
    if path.is_symlink():
        return
    _copy(path, target)
    _delete(path)


def _delete(path: Path) -> None:
    with contextlib.suppress(OSError), directory_inside(path.parent, save_roots()) as folder:
        if (folder / path.name).is_dir():
            shutil.rmtree(folder / path.name, ignore_errors=True)
        else:
            (folder / path.name).unlink(missing_ok=True)


def _copy(path: Path, target: Path) -> None:
    """Link or copy a file, or the regular files of a directory, unless ``target`` exists. Raises OSError."""
    if target.exists():
        return
    temporary = saving_directory(target)
    _delete(temporary)
    if not path.is_dir():
        with directory_inside(target.parent, save_roots(), create=True) as folder:
            link_or_copy(path, folder / temporary.name)
            (folder / temporary.name).rename(folder / target.name)
        return
    with atomic_directory(target, temporary, save_roots()) as unfinished:
        for file in path.iterdir():
            if file.is_file() and not file.is_symlink():
                link_or_copy(file, unfinished / file.name)
