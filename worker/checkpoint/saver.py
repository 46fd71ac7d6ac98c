"""When and how the loop saves: rank 0 copies the step, and writes the copy while training goes on.

At most one save is under way: the next one waits for it, so that what is saved depends on the spec and never on how
fast the disk is. Pause, cancel and the end wait for their own save as well.
"""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from trainyard.contract.events import (
    CheckpointRemoved,
    CheckpointSaved,
    Event,
    PhaseChanged,
    WarningEvent,
)
from trainyard.contract.run_identity import RunIdentity
from trainyard.contract.rundir import ArtifactDir
from trainyard.contract.spec import JobSpec
from trainyard.contract.status import Phase
from trainyard.worker.checkpoint import files, retention
from trainyard.worker.checkpoint.files import CheckpointInfo, RunState
from trainyard.worker.checkpoint.staging import StagingBuffers, StateDicts
from trainyard.worker.checkpoint.weights import weights_file, write_weights
from trainyard.worker.distributed import DistributedContext
from trainyard.worker.errors import describe, save_error

if TYPE_CHECKING:  # training is above checkpoint: these are what it passes in
    from trainyard.worker.training.metrics import MetricsProcessor
    from trainyard.worker.training.resume_check import ResumeCheck
    from trainyard.worker.training.state import TrainProgress, TrainState


class BackgroundTask:
    """At most one piece of work. All methods are called by one thread, the training thread."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._thread: threading.Thread | None = None
        self._raised: BaseException | None = None

    @property
    def is_running(self) -> bool:
        """Whether waiting would take time."""
        return self._thread is not None and self._thread.is_alive()

    def start(self, work: Callable[[], None]) -> None:
        """Start ``work`` and return at once. What was begun before must have been waited for."""
        assert self._thread is None, f"{self._name} is busy"
        # A daemon: an interpreter that ends in spite of us does not hang here. Whoever ends in order waits first.
        self._thread = threading.Thread(target=self._run, args=(work,), name=self._name, daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Return once nothing is running; raises what the work raised."""
        self.join()
        raised, self._raised = self._raised, None
        if raised is not None:
            raise raised

    def join(self) -> None:
        """Return once nothing is running, whatever came of it."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _run(self, work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:
            self._raised = error


MAX_ATTEMPTS = 2

RETRY_SECONDS = 1.0

"""Before a save is tried again: a disk that was full for a moment, a mount that blinked."""


@dataclass
class Checkpointer:
    """Saves one job. ``saved_at`` is on the monotonic clock. ``say`` is called from the writing thread too."""

    spec: JobSpec
    products: ArtifactDir
    identity: RunIdentity
    rows_per_step: int
    ranks: DistributedContext
    emit: Callable[[Event], None]
    saved_at: float = 0.0
    probe: "ResumeCheck | None" = None
    _writer: BackgroundTask = field(default_factory=lambda: BackgroundTask("save"))
    _snapshot: StagingBuffers | None = None

    def is_due_by_time(self, now: float) -> bool:
        """Whether ``save_minutes`` have passed since the last save or the start."""
        minutes = self.spec.checkpoint.save_minutes
        return minutes is not None and now - self.saved_at >= minutes * 60

    def save(self, trainee: "TrainState", progress: "TrainProgress", meters: "MetricsProcessor", *, must: bool) -> None:
        """Save the step that was just done. All ranks call it together.

        Returns at once, while the copy is being made; where the save ``must`` succeed, because the run ends with it,
        once it is published. A save that fails twice is a warning, and the run goes on; one that must succeed is a
        Failure on every rank.
        """
        self.wait()
        state = trainee.state(
            progress,
            self.identity,
            rows_per_step=self.rows_per_step,
            interval=self.ranks.gather(meters.interval.row()),
            loss=meters.last_loss,
        )
        self.saved_at = time.monotonic()
        if self.ranks.is_main_process:
            scored = self.probe.score(trainee) if self.probe is not None else {}
            self._begin(trainee, replace(state, probe=scored), must)
        if must:
            self.wait()

    def wait(self) -> None:
        """Return once no save is under way. All ranks call it together; raises the Failure of a save that must not."""
        self.ranks.broadcast_from_rank0(self._finish)

    def close(self) -> None:
        """Let a save that is under way come to its end, when this rank leaves for whatever reason."""
        self._writer.join()

    def _finish(self) -> None:
        if self._writer.is_running:
            self.emit(PhaseChanged(phase=Phase.SAVING))
            self._writer.wait()
            self.emit(PhaseChanged(phase=Phase.TRAINING))
        self._writer.wait()

    def _begin(self, trainee: "TrainState", state: RunState, must: bool) -> None:
        snapshot = self._snapshot = self._snapshot or StagingBuffers(trainee.model, trainee.optimizer)
        try:
            copies = snapshot.stage()
        except (MemoryError, RuntimeError) as error:
            snapshot.release()
            self._save_in_place(trainee, state, must, error)
            return

        def work() -> None:
            snapshot.fill()
            self._save(copies, state, must)

        self._writer.start(work)

    def _save_in_place(self, trainee: "TrainState", state: RunState, must: bool, error: Exception) -> None:
        """There is no memory for a copy: write what training works on, while it waits."""
        self._snapshot = None
        message = f"no memory for a copy of step {state.step}, so training waits for its save: {str(error)[:200]}"
        self.emit(WarningEvent(code="save_blocks", message=message, step=state.step))
        copies = StateDicts.live(trainee.model, trainee.optimizer)
        self._writer.start(lambda: self._save(copies, state, must))
        self._writer.join()

    def _save(self, copies: StateDicts, state: RunState, must: bool) -> None:
        for left in reversed(range(MAX_ATTEMPTS)):
            try:
                self._write(copies, state)
                self._prune()
                return
            except (OSError, MemoryError) as error:
                if left:
                    time.sleep(RETRY_SECONDS)
                elif must:
                    raise save_error(error, f"the checkpoint of step {state.step}") from error
                else:
                    message = f"checkpoint {state.step} was not saved: {describe(error)}; training goes on"
                    self.emit(WarningEvent(code="save_failed", message=message, step=state.step))

    def _write(self, copies: StateDicts, state: RunState) -> None:
        began = time.monotonic()
        saved = self._published_before(state.step) or files.write_checkpoint(
            self.products, state, files.unique_tensors(copies.model), copies.optimizer
        )
        write_weights(weights_file(self.products, self.spec), copies.model)
        self.emit(
            CheckpointSaved(
                step=saved.step,
                path=str(saved.path),
                bytes=saved.bytes,
                sha256=saved.sha256,
                loss=state.loss,
                seconds=time.monotonic() - began,
            )
        )

    def _published_before(self, step: int) -> CheckpointInfo | None:
        """The checkpoint of this very step, where an attempt was stopped right after a save and again at once."""
        path = self.products.checkpoint(step)
        if not path.exists():
            return None
        damage = files.verify(path)
        if damage is None:
            return files.checkpoint_info(step, path)
        report_damage(self.emit, [files.Damage(step, path, damage)])
        files.quarantine(path)
        return None

    def _prune(self) -> None:
        keeping = self.spec.checkpoint
        for pruned in retention.delete_old_checkpoints(self.products, keeping.keep_last, keeping.keep_every):
            if pruned.weights is not None:
                self._emit_milestone(pruned.weights)
            why = "retention" if pruned.weights is None else "only its weights are kept"
            self.emit(CheckpointRemoved(step=pruned.step, path=str(pruned.path), why=why))

    def _emit_milestone(self, kept: CheckpointInfo) -> None:
        loss = files.read_state(kept.path).loss
        said = {"step": kept.step, "path": str(kept.path), "bytes": kept.bytes, "sha256": kept.sha256, "loss": loss}
        self.emit(CheckpointSaved(**said, checkpoint_kind="weights"))


def report_damage(say: Callable[[Event], None], damaged: list[files.Damage]) -> None:
    """Tell of checkpoints that were found damaged, so that nobody lists them any more."""
    for damage in damaged:
        said = WarningEvent(
            code="checkpoint_invalid", message=str(damage), step=damage.step, data={"path": str(damage.path)}
        )
        say(said)
        say(CheckpointRemoved(step=damage.step, path=str(damage.path), why="invalid"))
