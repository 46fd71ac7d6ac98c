"""Where an attempt begins: at the named checkpoint, its job's newest sound one, an earlier job's, or at step 0."""

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from trainyard.contract.events import (
    CheckpointRemoved,
    CheckpointSaved,
    Event,
    WarningEvent,
)
from trainyard.contract.failpoints import failpoint
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
from trainyard.worker.checkpoint.files import CheckpointInfo, Damage, RunState
from trainyard.worker.checkpoint.fork import fork_error, import_parent, read_fork
from trainyard.worker.checkpoint.retention import delete_leftovers, link_or_copy
from trainyard.worker.checkpoint.saver import report_damage
from trainyard.worker.errors import TrainingError


@dataclass(frozen=True)
class ResumePoint:
    """A checkpoint to go on from. ``place``: this job's own, which is loaded. ``path``: what it was, of which job."""

    path: Path
    place: Path


def find_resume_point(
    spec: JobSpec,
    run: RunDir,
    products: ArtifactDir,
    identity: RunIdentity,
    steps_of: Callable[[int], int],
    say: Callable[[Event], None],
    from_step: int | None = None,
    world: int = 1,
) -> ResumePoint | None:
    """The checkpoint to go on from, verified byte for byte; None: begin at step 0. Only rank 0 calls it.

    ``steps_of(rows_per_step)``: the length of the whole run. ``from_step``: the one the user wants to go back to.
    A fork without a checkpoint of its own begins with its parent's, on ``world`` ranks. Raises Failure where the job's
    own checkpoints cannot be used: beginning anew without a word would throw work away.
    """
    delete_leftovers(products)
    fork = read_fork(run)
    if fork is not None and products.origin.is_dir():
        import_parent(fork, products, identity, spec, world, say)
    if from_step is not None:
        own = rewind_to(products, from_step, identity, say)
        return ResumePoint(own, own)
    newest = newest_valid(products, say)
    if newest is not None:
        require_compatible(newest, identity)
        return ResumePoint(newest, newest)
    if fork is not None:
        raise fork_error(fork, "nothing is left of it, nor of any later one")
    if not spec.checkpoint.from_resume:
        return None
    return _of_earlier_job(spec, run, products, identity, steps_of, say)


def rewind_to(products: ArtifactDir, step: int, identity: RunIdentity, say: Callable[[Event], None]) -> Path:
    """The checkpoint of ``step``, once all newer ones are set aside: from now on it is the newest of this run.

    Nothing is touched, and Failure raised, where that checkpoint cannot be gone on from.
    """
    path = products.checkpoint(step)
    damage = files.verify(path) if path.is_dir() else "there is none"
    if damage is not None:
        there = ", ".join(str(number) for number, _ in products.published()[:10]) or "none"
        message = f"the checkpoint of step {step}, which was asked for, cannot be used: {damage}"
        hint = f"There are, newest first: {there}. Nothing was set aside; resume from another step, or from the newest."
        raise TrainingError(Reason.CHECKPOINT_INVALID, message, hint)
    require_compatible(path, identity)
    kinds: tuple[tuple[Literal["full", "weights"], list[tuple[int, Path]]], ...]
    kinds = ("full", products.published()), ("weights", products.milestones())
    for kind, there_are in kinds:
        for newer, its_path in there_are:
            if newer > step:
                files.quarantine(its_path, SUPERSEDED_PREFIX)
                say(CheckpointRemoved(step=newer, path=str(its_path), checkpoint_kind=kind, why="superseded"))
    return path


def newest_valid(products: ArtifactDir, say: Callable[[Event], None]) -> Path | None:
    """The newest sound checkpoint of this job; None where it has none at all, Failure where all are damaged."""
    damaged: list[Damage] = []
    found = files.newest_valid(products, damaged)
    report_damage(say, damaged)
    if found is None and damaged:
        message = f"no checkpoint of this run is sound: {'; '.join(map(str, damaged))}"
        hint = f"They stand aside in {products.checkpoints}. Resume once more to begin at step 0, or bring back a copy."
        raise TrainingError(Reason.CHECKPOINT_INVALID, message, hint)
    return found


def require_compatible(path: Path, identity: RunIdentity) -> None:
    """Raise Failure naming everything in which the checkpoint is another run's."""
    differences = identity.differences(_state(path).identity)
    if differences:
        message = f"{path} is of another run: {'; '.join(differences)}"
        raise TrainingError(Reason.CHECKPOINT_INVALID, message, "Undo the change, or start a new job.")


def _state(path: Path) -> RunState:
    try:
        return files.read_state(path)
    except (ValueError, KeyError, TypeError) as error:
        raise TrainingError(Reason.CHECKPOINT_INVALID, f"{path} cannot be read: {error}") from error


@failpoint("resume.earlier_job")
def _of_earlier_job(
    spec: JobSpec,
    run: RunDir,
    products: ArtifactDir,
    identity: RunIdentity,
    steps_of: Callable[[int], int],
    say: Callable[[Event], None],
) -> ResumePoint | None:
    folder = Path(spec.checkpoint.save_dir) if spec.checkpoint.save_dir else run.path.parent
    passed_over: list[str] = []
    for path in _newest_first(folder, products):
        objection = _incompatibility(path, identity, steps_of)
        found = _adopt(path, products, identity, steps_of) if objection is None else objection
        if isinstance(found, CheckpointInfo):
            say(CheckpointSaved(step=found.step, path=str(found.path), bytes=found.bytes, sha256=found.sha256))
            return ResumePoint(path, found.path)
        passed_over.append(f"{path}: {found}")
    looked = f" ({'; '.join(passed_over[:5])})" if passed_over else ""
    message = f"from_resume: no earlier job below {folder} has a checkpoint that fits{looked}; beginning at step 0"
    say(WarningEvent(code="nothing_to_resume", message=message))
    return None


@failpoint("resume.newest_first")
def _newest_first(folder: Path, own: ArtifactDir) -> Iterator[Path]:
    """Other jobs' published checkpoints, the last written first."""
    jobs = [ArtifactDir(path) for path in sorted(folder.iterdir())] if folder.is_dir() else []
    found = [path for job in jobs if job.path.resolve() != own.path.resolve() for _, path in job.published()]
    dated = [(written, path) for path in found if (written := _written_at(path)) is not None]
    yield from (path for _, path in sorted(dated, key=lambda pair: pair[0], reverse=True))


@failpoint("resume.written_at")
def _written_at(path: Path) -> float | None:
    """None where its own job has removed it meanwhile."""
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return None


@failpoint("resume.take_over")
def _adopt(
    path: Path, products: ArtifactDir, identity: RunIdentity, steps_of: Callable[[int], int]
) -> CheckpointInfo | str:
    """Make another job's checkpoint the first one of this job; why not, where that cannot be.

    Its job may live, and remove it at any moment: the files are linked first, and looked at where nobody takes them
    away. And an attempt that dies before its first save goes on from the same one again, whatever is newer by then.
    """
    place = products.checkpoints / f"{SAVING_PREFIX}{path.name}-of-{path.parent.parent.name}"
    try:
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir(parents=True)
        for name in (*CHECKPOINT_FILES, MANIFEST_FILE):
            link_or_copy(path / name, place / name)
        objection = _incompatibility(place, identity, steps_of) or files.verify(place)
        if objection is None:
            step = files.read_state(place).step
            publish_directory(place, products.checkpoint(step))
            return files.checkpoint_info(step, products.checkpoint(step))
    except OSError as error:
        objection = f"cannot be had: {error.strerror}"
    shutil.rmtree(place, ignore_errors=True)
    return objection


@failpoint("resume.check")
def _incompatibility(path: Path, identity: RunIdentity, steps_of: Callable[[int], int]) -> str | None:
    """Why a foreign checkpoint will not do, as far as can be seen without reading all of it."""
    if files.verify(path, thorough=False) is not None:
        return "damaged"
    try:
        state = files.read_state(path)
    except (OSError, ValueError, KeyError, TypeError):
        return "unreadable"
    differences = identity.differences(state.identity)
    if differences:
        return ", ".join(differences)
    if state.step - state.base_step >= steps_of(state.rows_per_step):
        return f"already at step {state.step}, with nothing left to train"
    return None
