"""Start of a fork: the parent's checkpoint, which the service has put into ``origin/``, becomes the fork's own.

Its files are linked into the fork's checkpoint before ``origin/`` is removed, so that a crash never loses anything.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

from trainyard.contract.events import Event, WarningEvent
from trainyard.contract.messages import Fork, read_message
from trainyard.contract.run_identity import CHANGEABLE_FIELDS, RunIdentity
from trainyard.contract.rundir import (
    CHECKPOINT_FILES,
    MODEL_FILE,
    OPTIMIZER_FILE,
    STATE_FILE,
    ArtifactDir,
    FileDigest,
    RunDir,
    atomic_directory,
)
from trainyard.contract.spec import JobSpec
from trainyard.contract.status import Reason
from trainyard.worker.checkpoint import files
from trainyard.worker.checkpoint.files import RunState, TensorShapes, sha256_of, write_tensors
from trainyard.worker.checkpoint.retention import MILESTONE_FILES, link_or_copy, remove
from trainyard.worker.errors import TrainingError
from trainyard.worker.paths import save_roots


def read_fork(run: RunDir) -> Fork | None:
    """Return what the job is a fork of, or None if it is no fork. Raises TrainingError if fork.json is unreadable."""
    if not run.fork.exists():
        return None
    fork = read_message(Fork, run.fork)
    if fork is None:
        raise TrainingError(Reason.CHECKPOINT_INVALID, f"{run.fork} cannot be read", "Fork the parent again.")
    return fork


def import_parent(
    fork: Fork,
    artifacts: ArtifactDir,
    identity: RunIdentity,
    spec: JobSpec,
    world: int,
    emit: Callable[[Event], None],
    shapes: TensorShapes | None = None,
) -> None:
    """Make the parent's checkpoint the first one of this job. Raises TrainingError if it is damaged or does not fit."""
    origin = artifacts.origin
    manifest = _verified_manifest(origin, fork, shapes)
    # The metric line of that step belongs to the parent.
    parent_state = replace(files.read_state(origin), unevaluated=None)
    state = _restart_data(parent_state, identity, spec, world) if fork.data == "restart" else parent_state
    # The tokenizer must be the parent's even with new data: other tokens would mean something else to the weights.
    differences = identity.differences(replace(state.identity, tokenizer=parent_state.identity.tokenizer))
    if differences:
        message = f"the fork cannot continue from its parent: {'; '.join(differences)}"
        hint = 'Undo the change; data "restart" allows another corpus.'
        raise TrainingError(Reason.CHECKPOINT_INVALID, message, hint)
    new_optimizer = OPTIMIZER_FILE not in manifest or (
        files.optimizer_kind(origin) not in (None, spec.training.optimizer)
    )
    if new_optimizer and fork.data == "keep":
        raise fork_error(fork, f"its optimizer is not {spec.training.optimizer}")
    if files.verify(artifacts.checkpoint(fork.step)) is not None:
        _publish(artifacts, origin, manifest, state, new_optimizer)
    emit(files.checkpoint_info(fork.step, artifacts.checkpoint(fork.step)).saved_event(loss=state.loss))
    if new_optimizer:
        message = f"the fork has the parent's weights of step {fork.step} alone: its optimizer starts from scratch"
        emit(WarningEvent(code="optimizer_anew", message=message, step=fork.step))
    remove(origin)


def _verified_manifest(origin: Path, fork: Fork, shapes: TensorShapes | None) -> Mapping[str, FileDigest]:
    """Return the manifest after every byte is verified. Raises TrainingError."""
    needed = MILESTONE_FILES if fork.data == "restart" else CHECKPOINT_FILES
    try:
        manifest = files.read_manifest(origin, needed)
        damaged = [name for name, expected in manifest.items() if sha256_of(origin / name) != expected.sha256]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise fork_error(fork, f"{type(error).__name__}: {error}") from error
    if damaged:
        raise fork_error(fork, f"{damaged[0]} sha256")
    problem = files.content_problem(origin, shapes, [*needed]) if shapes is not None else None
    if problem is not None:
        raise fork_error(fork, problem)
    return manifest


def fork_error(fork: Fork, why: str) -> TrainingError:
    """Return the error of a fork whose parent checkpoint is unusable. To start at step 0 would be another run."""
    message = f"the checkpoint of step {fork.step} of {fork.job_id}, where this fork begins, cannot be used: {why}"
    return TrainingError(Reason.CHECKPOINT_INVALID, message, "Fork the parent again, perhaps at another step.")


def _restart_data(state: RunState, identity: RunIdentity, spec: JobSpec, world: int) -> RunState:
    """Return the state at the start of new data: step and tokens continue, the data order starts with the next step."""
    changed = {name: identity.model[name] for name in CHANGEABLE_FIELDS if name in identity.model}
    # The saved score holds only if the same model scores the same rows.
    is_comparable = identity == state.identity
    return replace(
        state,
        identity=replace(identity, model={**state.identity.model, **changed}),
        rows_per_step=spec.training.batch_size * spec.training.accumulation_steps * world,
        data_offset=-state.step,
        base_step=state.step,
        base_tokens=state.tokens,
        interval=[],
        interval_bytes=[],
        smoothed=[],  # `limits.target_loss` is compared with losses on the new data only
        trouble={},
        probe=state.probe if is_comparable else {},
    )


def _publish(
    artifacts: ArtifactDir, origin: Path, manifest: Mapping[str, FileDigest], state: RunState, new_optimizer: bool
) -> None:
    final = artifacts.checkpoint(state.step)
    with atomic_directory(final, files.saving_directory(final), save_roots()) as unfinished:
        link_or_copy(origin / MODEL_FILE, unfinished / MODEL_FILE)
        if new_optimizer:
            optimizer = write_tensors(unfinished / OPTIMIZER_FILE, {})
        else:
            link_or_copy(origin / OPTIMIZER_FILE, unfinished / OPTIMIZER_FILE)
            optimizer = manifest[OPTIMIZER_FILE]
        written = {MODEL_FILE: manifest[MODEL_FILE], OPTIMIZER_FILE: optimizer}
        files.write_manifest(unfinished, {**written, STATE_FILE: files.write_state(unfinished, state)})
