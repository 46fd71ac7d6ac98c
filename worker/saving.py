"""When and how the loop saves: all ranks meet, rank 0 writes, and what goes wrong is told and survived."""

import time
from collections.abc import Callable
from dataclasses import dataclass

from contract.events import CheckpointRemoved, CheckpointSaved, Event, PhaseChanged, Warned
from contract.rundir import ProductDir
from contract.spec import JobSpec
from contract.status import Phase
from worker import checkpoint, retention
from worker.checkpoint import Identity, RunState, Saved
from worker.distributed import Ranks
from worker.failure import describe, not_saved
from worker.meters import Meters
from worker.trainee import Progress, Trainee
from worker.weights import weights_file, write_weights

TRIES = 2


@dataclass
class Saver:
    """Saves one job. ``saved_at`` is on the monotonic clock."""

    spec: JobSpec
    products: ProductDir
    identity: Identity
    rows_per_step: int
    ranks: Ranks
    say: Callable[[Event], None]
    saved_at: float = 0.0

    def is_due_by_time(self, now: float) -> bool:
        """Whether ``save_minutes`` have passed since the last save or the start."""
        minutes = self.spec.checkpoint.save_minutes
        return minutes is not None and now - self.saved_at >= minutes * 60

    def save(self, trainee: Trainee, progress: Progress, meters: Meters, *, must: bool) -> None:
        """Publish a checkpoint and the weights. All ranks call it together.

        A save that fails twice is a warning, and the run goes on; where it ``must`` succeed, because the run ends with
        it, it is a Failure on every rank.
        """
        state = trainee.state(
            progress,
            self.identity,
            rows_per_step=self.rows_per_step,
            interval=self.ranks.gather(meters.interval.row()),
            loss=meters.last_loss,
        )
        self.ranks.from_leader(lambda: self._save(trainee, state, must))
        self.saved_at = time.monotonic()

    def _save(self, trainee: Trainee, state: RunState, must: bool) -> None:
        self.say(PhaseChanged(phase=Phase.SAVING))
        for left in reversed(range(TRIES)):
            try:
                self._write(trainee, state)
                self._prune()
                return
            except OSError as error:
                if left == 0 and must:
                    raise not_saved(error, f"the checkpoint of step {state.step}") from error
                if left == 0:
                    message = f"checkpoint {state.step} was not saved: {describe(error)}; training goes on"
                    self.say(Warned(code="save_failed", message=message, step=state.step))

    def _write(self, trainee: Trainee, state: RunState) -> None:
        began = time.monotonic()
        saved = self._published_before(state.step) or checkpoint.publish(
            self.products,
            state,
            checkpoint.unique_tensors(trainee.model),
            checkpoint.optimizer_tensors(trainee.model, trainee.optimizer),
        )
        write_weights(weights_file(self.products, self.spec), trainee.model)
        self.say(
            CheckpointSaved(
                step=saved.step,
                path=str(saved.path),
                bytes=saved.bytes,
                sha256=saved.sha256,
                loss=state.loss,
                seconds=time.monotonic() - began,
            )
        )

    def _published_before(self, step: int) -> Saved | None:
        """The checkpoint of this very step, where an attempt was stopped right after a save and again at once."""
        path = self.products.checkpoint(step)
        if not path.exists():
            return None
        damage = checkpoint.find_damage(path)
        if damage is None:
            return checkpoint.saved_at(step, path)
        report_damage(self.say, [checkpoint.Damage(step, path, damage)])
        checkpoint.set_aside(path)
        return None

    def _prune(self) -> None:
        keeping = self.spec.checkpoint
        for step, path in retention.prune(self.products, keeping.keep_last, keeping.keep_every):
            self.say(CheckpointRemoved(step=step, path=str(path)))


def report_damage(say: Callable[[Event], None], damaged: list[checkpoint.Damage]) -> None:
    """Tell of checkpoints that were found damaged, so that nobody lists them any more."""
    for damage in damaged:
        said = Warned(code="checkpoint_invalid", message=str(damage), step=damage.step, data={"path": str(damage.path)})
        say(said)
        say(CheckpointRemoved(step=damage.step, path=str(damage.path), why="invalid"))
