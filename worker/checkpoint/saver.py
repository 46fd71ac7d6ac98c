"""Asynchronous saves: rank 0 copies its state, and a background thread writes the copy while training continues.

At most one save runs at a time, and the next one waits for it. So the spec decides which steps are saved, never the
speed of the disk. Pause, cancel and the end of the run also wait for their own save.
"""

import contextlib
import errno
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from trainyard.contract.events import CheckpointRemoved, Event, WarningEvent
from trainyard.contract.run_identity import RunIdentity
from trainyard.contract.rundir import STATE_FILE, ArtifactDir
from trainyard.contract.spec import JobSpec
from trainyard.worker.checkpoint import files, retention
from trainyard.worker.checkpoint.files import CheckpointInfo, RunState, optimizer_tensors, shared_names
from trainyard.worker.checkpoint.parts import ModelParts, SavedTensor, gather_layout, gather_parts
from trainyard.worker.checkpoint.replicas import DigestSender, ReplicaCheck
from trainyard.worker.checkpoint.update_gate import UpdateGate
from trainyard.worker.checkpoint.weights import publish_weights
from trainyard.worker.distributed import DistributedContext
from trainyard.worker.errors import describe_error, save_error


class StateDicts(NamedTuple):
    """What a save writes: the model's state dict, and the optimizer's tensors named as by `optimizer_tensors`."""

    model: Mapping[str, Tensor]
    optimizer: Mapping[str, Tensor]

    @classmethod
    def live(cls, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> "StateDicts":
        """Return the live tensors, not a copy. Valid only while no step is running."""
        return cls(model.state_dict(), optimizer_tensors(model, optimizer))


class StagingBuffers:
    """Host buffers, allocated at the first save and reused by every later one.

    Weights and moments are copied during the forward and backward passes that follow, and the next update waits if the
    copy is not complete by then. On a CPU the writer thread copies. On CUDA the device copies into pinned memory, on a
    stream of its own, and the update waits on the device.
    """

    def __init__(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self._model = model
        self._optimizer = optimizer
        self._buffers: dict[str, Tensor] = {}
        self._pairs: list[tuple[Tensor, Tensor]] = []
        self._device = next(model.parameters()).device
        cuda: Any = torch.cuda  # its streams and events are unannotated
        self._stream: Any = cuda.Stream(self._device) if self._device.type == "cuda" else None
        self._copy_event: Any = None
        self.gate = UpdateGate(optimizer, self._device)

    def stage(self) -> StateDicts:
        """Start copying the current state. The copies are valid after `fill` has returned, until the next `stage`.

        `fill` must be called, or the next update waits forever. Raises MemoryError, or torch's RuntimeError, if there
        is not enough memory.
        """
        live = StateDicts.live(self._model, self._optimizer)
        self._pairs, weights = [], {}
        for names in shared_names(live.model):
            weights.update(dict.fromkeys(names, self._buffer(f"model.{names[0]}", live.model[names[0]])))
        moments = {name: self._buffer(f"optimizer.{name}", tensor) for name, tensor in live.optimizer.items()}
        self._start_copy()
        return StateDicts({name: weights[name] for name in live.model}, moments)

    def release(self) -> None:
        """Free the buffers and remove the hook from the optimizer."""
        self.gate.remove()
        self._buffers, self._pairs = {}, []
        self.gate.open()

    def _start_copy(self) -> None:
        if self._stream is None:
            self.gate.close()
            return
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            for buffer, tensor in self._pairs:
                buffer.copy_(tensor, non_blocking=True)
        self._copy_event = self._stream.record_event()
        self.gate.close_until(self._copy_event)

    def fill(self) -> None:
        """Complete the copies. Called by the writer thread."""
        try:
            if self._copy_event is not None:
                # The current device of a new thread is the first GPU. Without this line, CUDA would create a context on
                # it, although another rank trains there.
                with torch.cuda.device(self._device):
                    self._copy_event.synchronize()
            else:
                for buffer, tensor in self._pairs:
                    # numpy copies in one thread and releases the GIL; torch would take all cores away from training.
                    np.copyto(_bytes(buffer), _bytes(tensor))
        finally:
            self._pairs = []  # or moments that a rollback replaces would stay in memory
            self.gate.open()

    def _buffer(self, name: str, tensor: Tensor) -> Tensor:
        buffer = self._allocate(name, tensor.shape)
        self._pairs.append((buffer, tensor.detach()))
        return buffer

    def _allocate(self, name: str, shape: Sequence[int]) -> Tensor:
        if name not in self._buffers:
            # All that is saved is float32.
            self._buffers[name] = torch.empty(tuple(shape), dtype=torch.float32, pin_memory=self._stream is not None)
        return self._buffers[name]


class PartStagingBuffers(StagingBuffers):
    """The same for a model that is split over the ranks: all stage their parts, and `fill` sends them to rank 0.

    On rank 0 the buffers are whole tensors, which `stage` returns. On the other ranks it returns empty state dicts.
    """

    def __init__(
        self, model: torch.nn.Module, held: ModelParts, optimizer: torch.optim.Optimizer, ranks: DistributedContext
    ) -> None:
        super().__init__(model, optimizer)
        self._held = held
        self._ranks = ranks
        self._layout: Mapping[str, SavedTensor] = {}

    def stage(self) -> StateDicts:
        own, rank = self._held.contribution(self._optimizer), self._ranks.rank
        self._layout, self._pairs = gather_layout(own, self._ranks), []
        wholes = {name: self._allocate(name, saved.shape) for name, saved in self._layout.items() if rank == 0}
        for name, saved in self._layout.items():
            for extent in saved.extents:
                if extent.rank == rank:
                    tensor = own[name].tensor.detach()
                    buffer = wholes[name].view(-1)[extent.start : extent.stop] if rank == 0 else None
                    buffer = buffer.view(tensor.shape) if buffer is not None else self._allocate(name, tensor.shape)
                    self._pairs.append((buffer, tensor))
        self._start_copy()
        if rank != 0:
            return StateDicts({}, {})
        groups: dict[str, dict[str, Tensor]] = {"model": {}, "optimizer": {}}
        for name, whole in wholes.items():
            group, _, short = name.partition(".")
            groups[group][short] = whole
        return StateDicts(self._held.state_dict(groups["model"]), groups["optimizer"])

    def fill(self) -> None:
        super().fill()
        gather_parts(self._layout, self._buffers, self._ranks.rank, self._held.group)


def _bytes(tensor: Tensor) -> npt.NDArray[np.uint8]:
    # For a contiguous tensor this is its own memory, not a copy.
    memory: npt.NDArray[np.uint8] = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
    return memory


if TYPE_CHECKING:  # training is a layer above checkpoint, and passes these in
    from trainyard.worker.training.metrics import MetricsProcessor
    from trainyard.worker.training.resume_check import ResumeCheck
    from trainyard.worker.training.state import TrainProgress, TrainState


class BackgroundTask:
    """Runs one call at a time in a background thread. `wait` raises its error. Used by one thread."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def start(self, work: Callable[[], None]) -> None:
        """Start ``work`` and return at once. Call `wait` or `join` before the next `start`."""
        assert self._thread is None, f"{self._name} is busy"
        # A daemon thread: an interpreter that exits on an error must not wait for it. A normal exit joins it first.
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

    @property
    def failed(self) -> bool:
        """Whether the work has ended with an error that `wait` has not raised yet."""
        return self._error is not None

    def _run(self, work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:
            self._error = error


MAX_TRIES = 2
RETRY_SECONDS = 1.0
"""Delay before a failed save is retried: a full disk or a network mount may recover."""

GONE = "the directory of the run is gone; if it was moved, stop the run, and move it back or resume it in the new home"


@dataclass
class Checkpointer:
    """Saves one job. ``saved_at`` is on the monotonic clock. ``emit`` is called from the writer thread too.

    ``replicas``: compares the weights of all ranks at each save; None if there is nothing to compare.
    """

    spec: JobSpec
    artifacts: ArtifactDir
    identity: RunIdentity
    rows_per_step: int
    ranks: DistributedContext
    emit: Callable[[Event], None]
    saved_at: float = 0.0
    resume_check: "ResumeCheck | None" = None
    replicas: ReplicaCheck | None = None
    _writer: BackgroundTask = field(default_factory=lambda: BackgroundTask("save"))
    _comparison: BackgroundTask = field(default_factory=lambda: BackgroundTask("compare"))
    _staging: StagingBuffers | None = None
    _digests: DigestSender | None = None
    _had_directory: bool = False

    def __post_init__(self) -> None:
        if self.ranks.is_main_process:
            # If it cannot be created now, the first save reports it.
            with contextlib.suppress(OSError):
                self.artifacts.path.mkdir(parents=True, exist_ok=True)
            self._had_directory = self.artifacts.path.is_dir()

    def is_due_by_time(self, now: float) -> bool:
        """Return whether ``save_minutes`` have passed since the last save or the start."""
        minutes = self.spec.checkpoint.save_minutes
        return minutes is not None and now - self.saved_at >= minutes * 60

    def save(
        self, train_state: "TrainState", progress: "TrainProgress", metrics: "MetricsProcessor", *, required: bool
    ) -> None:
        """Save the step that was just done. All ranks call it together, in phase `saving`.

        If the save is ``required`` (the run ends with it, or may roll back to it), return after it is published. Else
        return before the copy is complete. If the save fails twice, emit a warning and continue; if it is required,
        every rank raises TrainingError.
        """
        self.wait()
        interval, interval_bytes = metrics.gather_windows()
        state = train_state.run_state(
            progress,
            self.identity,
            rows_per_step=self.rows_per_step,
            interval=interval,
            loss=metrics.last_loss,
            interval_bytes=interval_bytes,
        )
        self.saved_at = time.monotonic()
        if self.ranks.is_main_process or train_state.split is not None:
            scores = self.resume_check is not None and (self.ranks.is_main_process or train_state.gathers_weights)
            score = self.resume_check.score(train_state) if self.resume_check is not None and scores else {}
            line = metrics.unevaluated
            unevaluated = line.model_dump(mode="json", exclude={"kind", "seq"}) if line is not None else None
            smoothed = metrics.smoothed.sums if metrics.smoothed.weight else []
            state = replace(state, probe=score, unevaluated=unevaluated, smoothed=smoothed)
            self._start(train_state, state, required)
        elif (digests := self._read_digests(train_state)) is not None:
            self._writer.start(lambda: digests.send(digests.read()))
        if required:
            self.wait()

    def wait(self) -> None:
        """Wait for the current save, if any. All ranks call it together.

        Raises TrainingError if it was required and has failed, or if the weights of the ranks differ.
        """
        if not self.ranks.is_main_process:
            self._writer.wait()
        self.ranks.broadcast_from_rank0(self._writer.wait)

    @property
    def has_failed(self) -> bool:
        """Whether `wait` will raise an error on this rank."""
        return self._writer.failed

    def close(self) -> None:
        """Wait for the current save, if any, and ignore its error. For an exit, whatever its reason."""
        self._writer.join()

    def _start(self, train_state: "TrainState", state: RunState, required: bool) -> None:
        staging = self._staging = self._staging or self._new_staging(train_state)
        copies, error = None, None
        try:
            copies = staging.stage()
        except (MemoryError, RuntimeError) as caught:
            error = caught
        if self._lacks_memory(copies is None, train_state):
            staging.release()
            self._staging = None
            if train_state.split is not None:
                self._give_up(state, required)
            elif error is not None:
                self._save_in_place(train_state, state, required, error)
            return

        digests = self._read_digests(train_state)

        def work() -> None:
            # Digests first: the next update waits for them, and `fill` may wait for another rank.
            own = digests.read() if digests is not None else []
            staging.fill()
            if digests is not None:
                digests.send(own)
            if copies is not None and self.ranks.is_main_process:
                self._save(copies, state, required)

        self._writer.start(work)

    def _read_digests(self, train_state: "TrainState") -> DigestSender | None:
        """Start reading this rank's weights for rank 0, which has its copy; None if there is nothing to compare."""
        if self.replicas is None or self.ranks.is_main_process:
            return None
        self._digests = self._digests or DigestSender(self.ranks, train_state.model, train_state.optimizer)
        self._digests.start()
        return self._digests

    def _new_staging(self, train_state: "TrainState") -> StagingBuffers:
        model, optimizer, split = train_state.model, train_state.optimizer, train_state.split
        if split is None:
            return StagingBuffers(model, optimizer)
        return PartStagingBuffers(model, split.held, optimizer, self.ranks)

    def _lacks_memory(self, own: bool, train_state: "TrainState") -> bool:
        """Return whether this rank, or any that has a part of the model, has no memory for a copy."""
        return own if train_state.split is None else any(each for (each,) in self.ranks.gather([float(own)]))

    def _give_up(self, state: RunState, required: bool) -> None:
        # A rank has no memory for its copies. Saving in place is impossible: rank 0 does not have all parts.
        what = f"the checkpoint of step {state.step}"
        if required:
            raise save_error(MemoryError(), what)
        message = f"{what} was not saved: {describe_error(MemoryError())}; training continues"
        self.emit(WarningEvent(code="save_failed", message=message, step=state.step))

    def _save_in_place(self, train_state: "TrainState", state: RunState, required: bool, error: Exception) -> None:
        """Write the live tensors while training waits, because there is no memory for a copy."""
        message = f"no memory for a copy of step {state.step}, so training waits for its save: {str(error)[:200]}"
        self.emit(WarningEvent(code="save_blocks", message=message, step=state.step))
        live = StateDicts.live(train_state.model, train_state.optimizer)
        self._writer.start(lambda: self._save(live, state, required))
        self._writer.join()

    def _save(self, tensors: StateDicts, state: RunState, required: bool) -> None:
        try:
            if self.replicas is not None:
                # While the files are written. `_write` waits for it before it publishes them.
                self._comparison.start(lambda: self._compare(tensors.model, state.step))
            self._publish(tensors, state, required)
        finally:
            self._comparison.join()
        self._comparison.wait()  # a fault is also reported if the disk is full

    def _compare(self, weights: Mapping[str, Tensor], step: int) -> None:
        assert self.replicas is not None
        problem = self.replicas.compare(weights, step)
        if problem is not None:
            message = f"the weights of the ranks could not be compared at step {step}: {problem}"
            self.emit(WarningEvent(code="weights_not_compared", message=message, step=step))

    def _publish(self, tensors: StateDicts, state: RunState, required: bool) -> None:
        # Separately, so that a published checkpoint is reported even if the weights file cannot be written.
        if self._try(lambda: self._write(tensors, state), f"the checkpoint of step {state.step}", state.step, required):
            what = f"the weights file in {self.artifacts.out}"
            self._try(lambda: publish_weights(self.artifacts, self.spec, tensors.model), what, state.step, required)
            self._prune(state.step)

    def _try(self, write: Callable[[], None], what: str, step: int, required: bool) -> bool:
        """Call ``write``, twice if needed. Return whether it succeeded. Raises TrainingError if it is ``required``."""
        for retries_left in reversed(range(MAX_TRIES)):
            try:
                self._require_directory()
                write()
                return True
            except (OSError, MemoryError) as error:
                if retries_left:
                    time.sleep(RETRY_SECONDS)
                elif required:
                    raise save_error(error, what) from error
                else:
                    message = f"{what} was not saved: {describe_error(error)}; training continues"
                    self.emit(WarningEvent(code="save_failed", message=message, step=step))
        return False

    def _require_directory(self) -> None:
        # Otherwise a run whose home was moved would create it again at the old place, and lose its checkpoints.
        if self._had_directory and not self.artifacts.path.is_dir():
            raise FileNotFoundError(errno.ENOENT, GONE, str(self.artifacts.path))

    def _write(self, tensors: StateDicts, state: RunState) -> None:
        start = time.monotonic()
        saved = self._already_published(state.step) or files.write_checkpoint(
            self.artifacts, state, files.unique_tensors(tensors.model), tensors.optimizer, self._comparison.wait
        )
        self._comparison.wait()  # also if this step was published before
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

    def _prune(self, step: int) -> None:
        """Delete old checkpoints. Errors are only warnings, because the run itself is healthy."""
        policy = self.spec.checkpoint
        try:
            deleted = retention.delete_old_checkpoints(self.artifacts, policy.keep_last, policy.keep_every)
        except OSError as error:
            message = f"old checkpoints were not deleted: {describe_error(error)}; it is tried again at the next save"
            self.emit(WarningEvent(code="prune_failed", message=message, step=step))
            return
        for pruned in deleted:
            why = "retention"
            if pruned.weights is not None:
                why = "only its weights are kept"
                loss = self._loss_of(pruned.weights)
                self.emit(pruned.weights.saved_event(loss=loss, checkpoint_kind="weights"))
            self.emit(CheckpointRemoved(step=pruned.step, path=str(pruned.path), why=why))

    def _loss_of(self, milestone: CheckpointInfo) -> float | None:
        try:
            return files.read_state(milestone.path).loss
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            message = (
                f"{milestone.path / STATE_FILE} is damaged ({type(error).__name__}): the weights of step "
                f"{milestone.step} can be loaded and exported, but not forked"
            )
            self.emit(WarningEvent(code="checkpoint_invalid", message=message, step=milestone.step))
            return None


def report_damage(emit: Callable[[Event], None], damaged: list[files.Damage]) -> None:
    """Emit a warning and the removal of each damaged checkpoint, so that it is no longer listed."""
    for damage in damaged:
        path = str(damage.path)
        emit(WarningEvent(code="checkpoint_invalid", message=str(damage), step=damage.step, data={"path": path}))
        emit(CheckpointRemoved(step=damage.step, path=path, why="invalid"))
