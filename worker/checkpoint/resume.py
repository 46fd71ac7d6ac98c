"""Where an attempt starts: a requested checkpoint, the newest of its job, a parent's or earlier job's, or step 0."""

import contextlib
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from trainyard.contract.allowed_paths import directory_inside, new_directory
from trainyard.contract.events import CheckpointRemoved, Event, WarningEvent
from trainyard.contract.failpoints import failpoint, hit
from trainyard.contract.run_identity import RunIdentity
from trainyard.contract.rundir import (
    CHECKPOINT_FILES,
    MANIFEST_FILE,
    SAVING_PREFIX,
    SUPERSEDED_PREFIX,
    ArtifactDir,
    RunDir,
    publish_directory,
)
from trainyard.contract.spec import JobSpec
from trainyard.contract.status import Reason
from trainyard.worker.checkpoint import files
from trainyard.worker.checkpoint.files import CheckpointInfo, Damage, RunState, TensorShapes
from trainyard.worker.checkpoint.fork import fork_error, import_parent, read_fork
from trainyard.worker.checkpoint.retention import delete_leftovers, link_or_copy
from trainyard.worker.checkpoint.saver import report_damage
from trainyard.worker.errors import TrainingError
from trainyard.worker.paths import save_roots


@dataclass(frozen=True)
class ResumePoint:
    """A checkpoint to resume from. ``checkpoint``: this job's copy, which is loaded. ``source``: the original."""

    source: Path
    checkpoint: Path


def find_resume_point(
    spec: JobSpec,
    run: RunDir,
    artifacts: ArtifactDir,
    identity: RunIdentity,
    is_finished: Callable[[RunState], bool],
    emit: Callable[[Event], None],
    from_step: int | None = None,
    world: int = 1,
    shapes: TensorShapes | None = None,
) -> ResumePoint | None:
    """Return the checkpoint to resume from, every byte verified, or None to start at step 0. For rank 0 only.

    ``is_finished(state)``: whether nothing is left to train. ``from_step``: the step to go back to, if any. A fork
    without a checkpoint of its own starts with its parent's. If it restarts the data, the size of its steps is that for
    ``world`` ranks. ``shapes``: of the model. Raises TrainingError if the job's own checkpoints cannot be used: to
    start at step 0 silently would throw work away.
    """
    hit("resume.find")
    delete_leftovers(artifacts)
    fork = read_fork(run)
    if fork is not None and artifacts.origin.is_dir():
        import_parent(fork, artifacts, identity, spec, world, emit, shapes)
    if from_step is not None:
        own = rewind_to(artifacts, from_step, identity, emit, shapes)
        return ResumePoint(own, own)
    for _, path in artifacts.published()[:1]:
        _require_same_model(path, identity)
    newest = newest_own_checkpoint(artifacts, emit, shapes)
    if newest is not None:
        require_compatible(newest, identity)
        return ResumePoint(newest, newest)
    if fork is not None:
        raise fork_error(fork, "nothing is left of it, nor of any later one")
    if not spec.checkpoint.from_resume:
        return None
    return _resume_earlier_job(spec, run, artifacts, identity, is_finished, emit, shapes)


def saved_corpora(spec: JobSpec, run: RunDir, artifacts: ArtifactDir) -> Iterator[str]:
    """Yield the corpus fingerprint of each checkpoint that the run may start from, the first choice first."""
    paths: list[Path] = []
    for own in (artifacts, *map(run.artifacts, run.save_dirs())):  # an earlier save_dir is moved later
        paths += [*(path for _, path in own.published()), own.origin]
    if spec.checkpoint.from_resume:
        paths += _newest_first(_earlier_jobs(spec, run), artifacts)
    for path in paths:
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            yield files.read_state(path).identity.corpus


def _earlier_jobs(spec: JobSpec, run: RunDir) -> Path:
    return Path(spec.checkpoint.save_dir) if spec.checkpoint.save_dir else run.path.parent


def rewind_to(
    artifacts: ArtifactDir,
    step: int,
    identity: RunIdentity,
    emit: Callable[[Event], None],
    shapes: TensorShapes | None = None,
) -> Path:
    """Set all checkpoints after ``step`` aside, so that the one of ``step`` is the newest, and return it.

    Raises TrainingError if it cannot be resumed from; then nothing is changed.
    """
    path = artifacts.checkpoint(step)
    _require_same_model(path, identity)
    problem = files.verify(path, shapes=shapes) if path.is_dir() else "there is none"
    if problem is not None:
        steps = ", ".join(str(number) for number, _ in artifacts.published()[:10]) or "none"
        message = f"the checkpoint of step {step}, which was requested, cannot be used: {problem}"
        hint = f"There are, newest first: {steps}. Nothing was set aside; resume from another step, or from the newest."
        raise TrainingError(Reason.CHECKPOINT_INVALID, message, hint)
    require_compatible(path, identity)
    kinds: tuple[tuple[Literal["full", "weights"], list[tuple[int, Path]]], ...]
    kinds = ("full", artifacts.published()), ("weights", artifacts.milestones())
    for kind, checkpoints in kinds:
        for newer_step, newer in checkpoints:
            if newer_step > step:
                files.quarantine(newer, SUPERSEDED_PREFIX)
                emit(CheckpointRemoved(step=newer_step, path=str(newer), checkpoint_kind=kind, why="superseded"))
    return path


def newest_own_checkpoint(
    artifacts: ArtifactDir, emit: Callable[[Event], None], shapes: TensorShapes | None = None
) -> Path | None:
    """Return the newest valid checkpoint of this job, or None if it has none at all. ``shapes``: of the model.

    Raises TrainingError if all are damaged. Damaged ones are quarantined and reported.
    """
    damaged: list[Damage] = []
    newest = files.newest_valid(artifacts, damaged, shapes)
    report_damage(emit, damaged)
    if newest is None and damaged:
        message = f"no checkpoint of this run is valid: {'; '.join(map(str, damaged))}"
        where = f"They are set aside in {artifacts.checkpoints}."
        hint = f"{where} Resume once more to begin at step 0, or bring back a copy."
        raise TrainingError(Reason.CHECKPOINT_INVALID, message, hint)
    return newest


def _require_same_model(path: Path, identity: RunIdentity) -> None:
    """Raise TrainingError if the checkpoint is valid, but of another model.

    Checked before the shapes of its tensors: a model that was changed by mistake must not set good checkpoints aside.
    """
    try:
        model = files.read_state(path).identity.model
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return
    if model != identity.model and files.verify(path) is None:
        require_compatible(path, identity)


def require_compatible(path: Path, identity: RunIdentity) -> None:
    """Raise TrainingError with everything in which the checkpoint belongs to another run."""
    try:
        state = files.read_state(path)
    except (ValueError, KeyError, TypeError) as error:
        raise TrainingError(Reason.CHECKPOINT_INVALID, f"{path} cannot be read: {error}") from error
    differences = identity.differences(state.identity)
    if differences:
        message = f"{path} is of another run: {'; '.join(differences)}"
        raise TrainingError(Reason.CHECKPOINT_INVALID, message, "Undo the change, or start a new job.")


@failpoint("resume.earlier_job")
def _resume_earlier_job(
    spec: JobSpec,
    run: RunDir,
    artifacts: ArtifactDir,
    identity: RunIdentity,
    is_finished: Callable[[RunState], bool],
    emit: Callable[[Event], None],
    shapes: TensorShapes | None,
) -> ResumePoint | None:
    folder = _earlier_jobs(spec, run)
    rejected: list[str] = []
    for path in _newest_first(folder, artifacts):
        problem = _incompatibility(path, identity, is_finished)
        adopted = _adopt(path, artifacts, identity, is_finished, shapes) if problem is None else problem
        if isinstance(adopted, CheckpointInfo):
            emit(adopted.saved_event(loss=files.read_state(adopted.path).loss))
            return ResumePoint(path, adopted.path)
        rejected.append(f"{path}: {adopted}")
    reasons = f" ({'; '.join(rejected[:5])})" if rejected else ""
    message = f"from_resume: no earlier job below {folder} has a checkpoint that fits{reasons}; beginning at step 0"
    emit(WarningEvent(code="nothing_to_resume", message=message))
    return None


@failpoint("resume.newest_first")
def _newest_first(folder: Path, own: ArtifactDir) -> Iterator[Path]:
    """Yield the published checkpoints of other jobs, the last written first."""
    jobs = [ArtifactDir(path) for path in sorted(folder.iterdir())] if folder.is_dir() else []
    paths = [path for job in jobs if job.path.resolve() != own.path.resolve() for path in _published(job)]
    dated = [(written, path) for path in paths if (written := _written_at(path)) is not None]
    yield from (path for _, path in sorted(dated, key=lambda pair: pair[0], reverse=True))


def _published(job: ArtifactDir) -> list[Path]:
    """Return the published checkpoints of ``job``, or [] if its directory is closed to this user, as lost+found is."""
    try:
        return [path for _, path in job.published()]
    except PermissionError:
        return []


@failpoint("resume.written_at")
def _written_at(path: Path) -> float | None:
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return None  # its own job has removed it meanwhile


@failpoint("resume.take_over")
def _adopt(
    path: Path,
    artifacts: ArtifactDir,
    identity: RunIdentity,
    is_finished: Callable[[RunState], bool],
    shapes: TensorShapes | None,
) -> CheckpointInfo | str:
    """Make another job's checkpoint the first one of this job. Return it, or why that is not possible.

    An attempt that dies before its first save resumes from this copy again, whatever is newer by then.
    """
    name = f"{SAVING_PREFIX}{path.name}-of-{path.parent.parent.name}"
    try:
        with directory_inside(artifacts.checkpoints, save_roots(), create=True) as folder:
            shutil.rmtree(folder / name, ignore_errors=True)
            try:
                with new_directory(folder / name) as copy:
                    # The other job may be running and remove its checkpoint at any moment. So link the files first, and
                    # verify the links, which no process removes.
                    for file in (*CHECKPOINT_FILES, MANIFEST_FILE):
                        link_or_copy(path / file, copy / file)
                copy = artifacts.checkpoints / name
                problem = _incompatibility(copy, identity, is_finished) or files.verify(copy, shapes=shapes)
                if problem is None:
                    step = files.read_state(copy).step
                    publish_directory(folder / name, folder / artifacts.checkpoint(step).name)
                    return files.checkpoint_info(step, artifacts.checkpoint(step))
            finally:
                shutil.rmtree(folder / name, ignore_errors=True)
    except OSError as error:
        problem = f"cannot be linked or read: {error.strerror}"
    return problem


@failpoint("resume.check")
def _incompatibility(path: Path, identity: RunIdentity, is_finished: Callable[[RunState], bool]) -> str | None:
    """Return why another job's checkpoint cannot be used, without reading its tensors; None if it may be usable."""
    if files.verify(path, thorough=False) is not None:
        return "damaged"
    try:
        state = files.read_state(path)
    except (OSError, ValueError, KeyError, TypeError):
        return "unreadable"
    differences = identity.differences(state.identity)
    if differences:
        return ", ".join(differences)
    if is_finished(state):
        return f"already at step {state.step}, with nothing left to train"
    return None
