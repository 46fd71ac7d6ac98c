"""Asynchronous saves: rank 0 copies the step, and a background thread writes the copy while training continues.

At most one save runs at a time, and the next one waits for it. So the spec decides which steps are saved, never the
speed of the disk. Pause, cancel and the end of the run also wait for their own save.
"""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from trainyard.contract.events import CheckpointRemoved, Event, PhaseChanged, WarningEvent
from trainyard.contract.run_identity import RunIdentity
from trainyard.contract.rundir import ArtifactDir
from trainyard.contract.spec import JobSpec
from trainyard.contract.status import Phase
from trainyard.worker.checkpoint import files, retention
from trainyard.worker.checkpoint.files import CheckpointInfo, RunState
from trainyard.worker.checkpoint.staging import StagingBuffers, StateDicts
from trainyard.worker.checkpoint.weights import weights_file, write_weights
from trainyard.worker.distributed import DistributedContext
from trainyard.worker.errors import describe_error, save_error

if TYPE_CHECKING:  # training is a layer above checkpoint, and passes these in
    from trainyard.worker.training.metrics import MetricsProcessor
    from trainyard.worker.training.resume_check import ResumeCheck
    from trainyard.worker.training.state import TrainProgress, TrainState


class BackgroundTask:
    """Runs one call at a time in a background thread. `wait` raises its error. Only the training thread uses this."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    @property
    def is_running(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def start(self, work: Callable[[], None]) -> None:
        """Start ``work`` and return at once. Call `wait` or `join` first if work was started before."""
        assert self._thread is None, f"{self._name} is busy"
        # A daemon, so that an interpreter that exits on an error does not hang here. An orderly exit joins it first.
        self._thread = threading.Thread(target=self._run, args=(work,), name=self._name, daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Wait for the work, and raise its error, if any."""
        self.join()
        error, self._error = self._error, None
        if error is not None:
            raise error

    def join(self) -> None:
        """Wait for the work, but keep its error for `wait`."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _run(self, work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:
            self._error = error


MAX_TRIES = 2
RETRY_SECONDS = 1.0
"""Delay before a failed save is retried: a full disk or a network mount may recover."""


@dataclass
class Checkpointer:
    """Saves one job. ``saved_at`` is on the monotonic clock. ``emit`` is called from the writer thread too."""

    spec: JobSpec
    artifacts: ArtifactDir
    identity: RunIdentity
    rows_per_step: int
    ranks: DistributedContext
    emit: Callable[[Event], None]
    saved_at: float = 0.0
    resume_check: "ResumeCheck | None" = None
    _writer: BackgroundTask = field(default_factory=lambda: BackgroundTask("save"))
    _staging: StagingBuffers | None = None

    def is_due_by_time(self, now: float) -> bool:
        """Return whether ``save_minutes`` have passed since the last save or the start."""
        minutes = self.spec.checkpoint.save_minutes
        return minutes is not None and now - self.saved_at >= minutes * 60

    def save(
        self, train_state: "TrainState", progress: "TrainProgress", metrics: "MetricsProcessor", *, required: bool
    ) -> None:
        """Save the step that was just done. All ranks call it together.

        If the save is ``required`` (the run ends with it, or may roll back to it), return after it is published. Else
        return before the copy is complete. If the save fails twice, emit a warning and continue; if it is required,
        every rank raises TrainingError.
        """
        self.wait()
        state = train_state.run_state(
            progress,
            self.identity,
            rows_per_step=self.rows_per_step,
            interval=self.ranks.gather(metrics.window.to_row()),
            loss=metrics.last_loss,
        )
        self.saved_at = time.monotonic()
        if self.ranks.is_main_process:
            score = self.resume_check.score(train_state) if self.resume_check is not None else {}
            self._start(train_state, replace(state, probe=score), required)
        if required:
            self.wait()

    def wait(self) -> None:
        """Wait for the current save, if any. All ranks call it together. Raises TrainingError if it was required."""
        self.ranks.broadcast_from_rank0(self._wait_for_writer)

    def close(self) -> None:
        """Wait for the current save, if any, and ignore its error. For an exit, whatever its reason."""
        self._writer.join()

    def _wait_for_writer(self) -> None:
        if self._writer.is_running:
            self.emit(PhaseChanged(phase=Phase.SAVING))
            self._writer.wait()
            self.emit(PhaseChanged(phase=Phase.TRAINING))
        self._writer.wait()

    def _start(self, train_state: "TrainState", state: RunState, required: bool) -> None:
        staging = self._staging = self._staging or StagingBuffers(train_state.model, train_state.optimizer)
        try:
            copies = staging.stage()
        except (MemoryError, RuntimeError) as error:
            staging.release()
            self._save_in_place(train_state, state, required, error)
            return

        def work() -> None:
            staging.fill()
            self._save(copies, state, required)

        self._writer.start(work)

    def _save_in_place(self, train_state: "TrainState", state: RunState, required: bool, error: Exception) -> None:
        """Write the live tensors while training waits, because there is no memory for a copy."""
        self._staging = None
        message = f"no memory for a copy of step {state.step}, so training waits for its save: {str(error)[:200]}"
        self.emit(WarningEvent(code="save_blocks", message=message, step=state.step))
        live = StateDicts.live(train_state.model, train_state.optimizer)
        self._writer.start(lambda: self._save(live, state, required))
        self._writer.join()

    def _save(self, tensors: StateDicts, state: RunState, required: bool) -> None:
        for retries_left in reversed(range(MAX_TRIES)):
            try:
                self._write(tensors, state)
                self._prune()
                return
            except (OSError, MemoryError) as error:
                if retries_left:
                    time.sleep(RETRY_SECONDS)
                elif required:
                    raise save_error(error, f"the checkpoint of step {state.step}") from error
                else:
                    message = f"checkpoint {state.step} was not saved: {describe_error(error)}; training continues"
                    self.emit(WarningEvent(code="save_failed", message=message, step=state.step))

    def _write(self, tensors: StateDicts, state: RunState) -> None:
        start = time.monotonic()
        saved = self._already_published(state.step) or files.write_checkpoint(
            self.artifacts, state, files.unique_tensors(tensors.model), tensors.optimizer
        )
        write_weights(weights_file(self.artifacts, self.spec), tensors.model)
        self.emit(saved.saved_event(loss=state.loss, seconds=time.monotonic() - start))

    def _already_published(self, step: int) -> CheckpointInfo | None:
        """Return this step's checkpoint if it was published before, such as by a regular save just before a stop."""
        path = self.artifacts.checkpoint(step)
        if not path.exists():
            return None
        problem = files.verify(path)
        if problem is None:
            return files.checkpoint_info(step, path)
        report_damage(self.emit, [files.Damage(step, path, problem)])
        files.quarantine(path)
        return None

    def _prune(self) -> None:
        policy = self.spec.checkpoint
        for pruned in retention.delete_old_checkpoints(self.artifacts, policy.keep_last, policy.keep_every):
            why = "retention"
            if pruned.weights is not None:
                why = "only its weights are kept"
                loss = files.read_state(pruned.weights.path).loss
                self.emit(pruned.weights.saved_event(loss=loss, checkpoint_kind="weights"))
            self.emit(CheckpointRemoved(step=pruned.step, path=str(pruned.path), why=why))


def report_damage(emit: Callable[[Event], None], damaged: list[files.Damage]) -> None:
    """Emit a warning and the removal of each damaged checkpoint, so that it is no longer listed."""
    for damage in damaged:
        path = str(damage.path)
        emit(WarningEvent(code="checkpoint_invalid", message=str(damage), step=damage.step, data={"path": path}))
        emit(CheckpointRemoved(step=damage.step, path=path, why="invalid"))
