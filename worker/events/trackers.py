"""TensorBoard and Weights & Biases, where they are asked for and installed. What they lack or do never ends a run."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from trainyard.contract.events import Event, Metric, WarningEvent
from trainyard.contract.spec import JobSpec

LOGGED_FIELDS = (
    "loss",
    "aux_loss",
    "learning_rate",
    "grad_norm",
    "tokens",
    "tokens_per_second",
    "mfu",
    "step_seconds",
    "data_seconds",
    "memory_bytes",
    "eval_loss",
    "epoch",
)


class Tracker(Protocol):
    """Somebody else who is told of metrics."""

    name: str

    def start_at(self, step: int) -> None:
        """What is told from now on lies behind ``step``: later points were of steps that are done once more."""

    def log(self, metric: Metric) -> None:
        """Tell one metric line."""

    def close(self) -> None:
        """Tell what is left."""


class TensorBoard:
    """Event files in ``tensorboard/`` of the run directory, one for each attempt and each way back."""

    name = "tensorboard"

    def __init__(self, directory: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._open = partial(SummaryWriter, str(directory))
        self._writer: Any = None

    def start_at(self, step: int) -> None:
        """A file that makes readers drop what earlier ones have behind ``step``."""
        self.close()
        self._writer = self._open(purge_step=step + 1)

    def log(self, metric: Metric) -> None:
        """One scalar for each known number, on disk at once: no resume tells what was lost with a process."""
        for tag, value in scalars(metric).items():
            self._writer.add_scalar(tag, value, metric.step)
        self._writer.flush()

    def close(self) -> None:
        """Write what is left."""
        if self._writer is not None:
            self._writer.close()


class Wandb:
    """A run of ``wandb_project`` that later attempts of the same job go on with."""

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
        """Nothing: steps that are told again are passed over there."""

    def log(self, metric: Metric) -> None:
        """One row, at the optimizer step."""
        self._run.log(scalars(metric), step=metric.step)

    def close(self) -> None:
        """Upload what is left."""
        self._run.finish()


def scalars(metric: Metric) -> dict[str, float]:
    """The known numbers of a metric line."""
    found = {name: getattr(metric, name) for name in LOGGED_FIELDS}
    if metric.expert_load:
        found |= {"expert_load_least": min(metric.expert_load), "expert_load_most": max(metric.expert_load)}
    return {name: float(value) for name, value in found.items() if value is not None}


class Trackers:
    """All that were asked for and could be had. One that fails is dropped with a warning."""

    def __init__(self, spec: JobSpec | None, run_path: Path, say: Callable[[Event], None]) -> None:
        """None for ``spec``: this rank tells nobody."""
        self._say = say
        self._active: list[Tracker] = []
        if spec is not None and spec.reporting.tensorboard:
            self._try("tensorboard", lambda: TensorBoard(run_path / "tensorboard"))
        if spec is not None and spec.reporting.use_wandb:
            self._try("wandb", lambda: Wandb(spec, run_path.name, run_path))

    def _try(self, name: str, make: Any) -> None:
        try:
            self._active.append(make())
        except ImportError:
            message = f"{name} is not installed: training goes on without it; `pip install {name}` brings it"
            self._say(WarningEvent(code=f"{name}_missing", message=message))
        except Exception as error:
            self._warn(name, error)

    def _warn(self, name: str, error: Exception) -> None:
        message = f"{name} failed and is not told any more: {type(error).__name__}: {str(error)[:300]}"
        self._say(WarningEvent(code=f"{name}_failed", message=message))

    def start_at(self, step: int) -> None:
        """Say to everybody that the next point lies behind ``step``."""
        self._each("begin", step)

    def log(self, metric: Metric) -> None:
        """Tell everybody."""
        self._each("log", metric)

    def close(self) -> None:
        """Let everybody tell what is left."""
        self._each("close")

    def _each(self, what: str, *arguments: Metric | int) -> None:
        for tracker in list(self._active):
            try:
                getattr(tracker, what)(*arguments)
            except Exception as error:
                self._active.remove(tracker)
                self._warn(tracker.name, error)
