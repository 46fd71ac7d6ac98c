"""How a fork begins: its parent's checkpoint, which the service has left in ``origin/``, becomes the fork's own.

The files are linked under the fork's own name before ``origin/`` goes, so that a crash at any point loses nothing.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from trainyard.contract.events import CheckpointSaved, Event, WarningEvent
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
from trainyard.worker.checkpoint import files as checkpoint
from trainyard.worker.checkpoint.files import RunState
from trainyard.worker.checkpoint.retention import MILESTONE_FILES, link_or_copy, remove
from trainyard.worker.checkpoint.safetensors_writer import sha256_of, write_tensors
from trainyard.worker.errors import TrainingError


def read_fork(run: RunDir) -> Fork | None:
    """What the job is a fork of; None where it is none. Raises Failure where that cannot be read."""
    if not run.fork.exists():
        return None
    fork = read_message(Fork, run.fork)
    if fork is None:
        raise TrainingError(Reason.CHECKPOINT_INVALID, f"{run.fork} cannot be read", "Fork the parent again.")
    return fork


def import_parent(
    fork: Fork, products: ArtifactDir, identity: RunIdentity, spec: JobSpec, world: int, say: Callable[[Event], None]
) -> None:
    """Make the parent's checkpoint the first one of this job, and tell of it. Raises Failure where it is not sound."""
    origin = products.origin
    files = _require_valid(origin, fork)
    state = checkpoint.read_state(origin)
    if fork.data == "restart":
        state = _restart_data(state, identity, spec, world)
    _require_compatible(origin, state, identity)
    fresh = OPTIMIZER_FILE not in files or checkpoint.optimizer_kind(origin) not in (None, spec.training.optimizer)
    if fresh and fork.data == "keep":
        raise fork_error(fork, f"its optimizer is not {spec.training.optimizer}")
    if checkpoint.verify(products.checkpoint(fork.step)) is not None:
        _publish(products, origin, files, state, fresh)
    saved = checkpoint.checkpoint_info(fork.step, products.checkpoint(fork.step))
    said = {"step": saved.step, "path": str(saved.path), "bytes": saved.bytes, "sha256": saved.sha256}
    say(CheckpointSaved(**said, loss=state.loss))
    if fresh:
        message = f"the fork has the parent's weights of step {fork.step} alone: its optimizer begins anew"
        say(WarningEvent(code="optimizer_anew", message=message, step=fork.step))
    remove(origin)


def _require_valid(origin: Path, fork: Fork) -> Mapping[str, FileDigest]:
    """What the manifest says, once every byte is as it says."""
    needed = MILESTONE_FILES if fork.data == "restart" else CHECKPOINT_FILES
    try:
        files = checkpoint.read_manifest(origin, needed)
        damaged = [name for name, said in files.items() if sha256_of(origin / name) != said.sha256]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise fork_error(fork, f"{type(error).__name__}: {error}") from error
    if damaged:
        raise fork_error(fork, f"{damaged[0]} sha256")
    return files


def fork_error(fork: Fork, why: str) -> TrainingError:
    """The end of a fork that has nothing to begin with: step 0 would be another run."""
    message = f"the checkpoint of step {fork.step} of {fork.job_id}, where this fork begins, cannot be used: {why}"
    return TrainingError(Reason.CHECKPOINT_INVALID, message, "Fork the parent again, perhaps at another step.")


def _restart_data(state: RunState, identity: RunIdentity, spec: JobSpec, world: int) -> RunState:
    """The state at the beginning of new data: step and tokens stay, the order of rows begins with the next step.

    The probe stays where its rows are the same ones.
    """
    same_rows = replace(identity, model=state.identity.model) == state.identity
    return replace(
        state,
        identity=replace(identity, model=_model(identity, state.identity)),
        rows_per_step=spec.training.batch_size * spec.training.accumulation_steps * world,
        data_offset=-state.step,
        base_step=state.step,
        interval=[],
        trouble={},
        probe=state.probe if same_rows and identity.model == state.identity.model else {},
    )


def _model(mine: RunIdentity, theirs: RunIdentity) -> dict[str, Any]:
    return {**theirs.model, **{name: mine.model[name] for name in CHANGEABLE_FIELDS if name in mine.model}}


def _require_compatible(origin: Path, state: RunState, identity: RunIdentity) -> None:
    stated = checkpoint.read_state(origin).identity
    # The tokens of another tokenizer would mean something else to the same weights.
    differences = identity.differences(replace(state.identity, tokenizer=stated.tokenizer))
    if differences:
        message = f"the fork cannot go on from its parent: {'; '.join(differences)}"
        raise TrainingError(
            Reason.CHECKPOINT_INVALID, message, 'Undo the change; data "restart" allows another corpus.'
        )


def _publish(
    products: ArtifactDir, origin: Path, files: Mapping[str, FileDigest], state: RunState, fresh: bool
) -> None:
    final = products.checkpoint(state.step)
    with atomic_directory(final, checkpoint.saving_directory(final)) as unfinished:
        link_or_copy(origin / MODEL_FILE, unfinished / MODEL_FILE)
        if fresh:
            optimizer = write_tensors(unfinished / OPTIMIZER_FILE, {})
        else:
            link_or_copy(origin / OPTIMIZER_FILE, unfinished / OPTIMIZER_FILE)
            optimizer = files[OPTIMIZER_FILE]
        written = {MODEL_FILE: files[MODEL_FILE], OPTIMIZER_FILE: optimizer}
        checkpoint.write_manifest(unfinished, {**written, STATE_FILE: checkpoint.write_state(unfinished, state)})
