"""TensorBoard and Weights & Biases. A tracker that is missing or fails is a warning and never ends a run."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from trainyard.contract.events import Event, MetricEvent, TaskScored, WarningEvent
from trainyard.contract.spec import JobSpec

LOGGED_FIELDS = (
    "loss",
    "bpb",
    "aux_loss",
    "learning_rate",
    "grad_norm",
    "tokens",
    "tokens_per_second",
    "mfu",
    "step_seconds",
    "step_seconds_spread",
    "data_seconds",
    "memory_bytes",
    "eval_loss",
    "eval_bpb",
    "epoch",
)


Point = MetricEvent | TaskScored
"""What is logged: it has a step and numbers."""


class Tracker(Protocol):
    """An external tool that receives the metrics."""

    name: str

    def start_at(self, step: int) -> None:
        """Expect steps after ``step`` from now on. Steps after it that were logged before will be logged again."""

    def log(self, point: Point) -> None:
        """Log the numbers of one event."""

    def close(self) -> None:
        """Flush what is left."""


class TensorBoard:
    """Event files in ``tensorboard/`` of the run directory, one for each attempt and each rewind."""

    name = "tensorboard"

    def __init__(self, directory: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._open = partial(SummaryWriter, str(directory))
        self._writer: Any = None

    def start_at(self, step: int) -> None:
        # A new file whose purge_step makes readers drop the later steps of earlier files.
        self.close()
        self._writer = self._open(purge_step=step + 1)

    def log(self, point: Point) -> None:
        for tag, value in scalars(point).items():
            self._writer.add_scalar(tag, value, point.step)
        # At once: a resume does not log again what a killed process had in its buffer.
        self._writer.flush()

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


class Wandb:
    """A run in ``wandb_project``, which later attempts of the same job continue."""

    name = "wandb"

    def __init__(self, spec: JobSpec, run_id: str, directory: Path) -> None:
        import wandb

        self._run: Any = wandb.init(
            project=spec.reporting.wandb_project,
            name=spec.name,
            id=run_id,
            resume="allow",
            dir=str(directory),
            config=spec.model_dump(mode="json"),
        )

    def start_at(self, step: int) -> None:
        pass  # wandb ignores steps that were logged before

    def log(self, point: Point) -> None:
        self._run.log(scalars(point), step=point.step)

    def close(self) -> None:
        self._run.finish()


def scalars(point: Point) -> dict[str, float]:
    """Return the numbers of an event that are not None; those of a task as e.g. ``tasks/NAME/acc``."""
    if isinstance(point, TaskScored):
        values = {f"tasks/{point.task}/{name}": getattr(point, name) for name in ("acc", "acc_norm", "bpb")}
    else:
        values = {name: getattr(point, name) for name in LOGGED_FIELDS}
        if point.expert_load:
            values |= {"expert_load_least": min(point.expert_load), "expert_load_most": max(point.expert_load)}
        for name, result in (point.eval or {}).items():
            values |= {f"eval/{name}/loss": result.loss, f"eval/{name}/bpb": result.bpb}
    return {name: float(value) for name, value in values.items() if value is not None}


class Trackers:
    """The trackers that the spec requests, none if ``spec`` is None. One that fails is dropped with a warning."""

    def __init__(self, spec: JobSpec | None, run_path: Path, emit: Callable[[Event], None]) -> None:
        self._emit = emit
        self._active: list[Tracker] = []
        if spec is not None and spec.reporting.tensorboard:
            self._add("tensorboard", lambda: TensorBoard(run_path / "tensorboard"))
        if spec is not None and spec.reporting.use_wandb:
            self._add("wandb", lambda: Wandb(spec, run_path.name, run_path))

    def _add(self, name: str, make: Callable[[], Tracker]) -> None:
        try:
            self._active.append(make())
        except ImportError:
            message = f"{name} is not installed: training continues without it; `pip install {name}` installs it"
            self._emit(WarningEvent(code=f"{name}_missing", message=message))
        except Exception as error:
            self._warn(name, error)

    def _warn(self, name: str, error: Exception) -> None:
        message = f"{name} failed and gets no more metrics: {type(error).__name__}: {str(error)[:300]}"
        self._emit(WarningEvent(code=f"{name}_failed", message=message))

    def start_at(self, step: int) -> None:
        self._for_each(lambda tracker: tracker.start_at(step))

    def log(self, point: Point) -> None:
        self._for_each(lambda tracker: tracker.log(point))

    def close(self) -> None:
        self._for_each(lambda tracker: tracker.close())

    def _for_each(self, action: Callable[[Tracker], None]) -> None:
        for tracker in list(self._active):
            try:
                action(tracker)
            except Exception as error:
                self._active.remove(tracker)
                self._warn(tracker.name, error)
