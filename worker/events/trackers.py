"""TensorBoard, Weights & Biases, SwanLab and trackio. A tracker that is missing, fails or hangs never affects training.

TensorBoard writes files by itself. The others connect to servers, take over signals and hold up the end of a process.
So each of them runs in a process of its own, `worker.events.tracker_process`, which gets the points through a pipe.
"""

import contextlib
import importlib.util
import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
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

CLOSE_SECONDS = 30.0
"""For a tracker to upload what is left, at the end of an attempt."""

MAX_UNSENT = 1 << 20
"""Bytes of points that a tracker has not read. More means that it hangs: a point has 300 bytes."""

TRACKER_PROGRAM = (sys.executable, "-P", "-m", "trainyard.worker.events.tracker_process")

Point = MetricEvent | TaskScored
"""What is logged: it has a step and numbers."""


class TrackerFailed(Exception):
    """The tracker gets no more points; the message says why."""


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


class TrackerProcess:
    """A tracker in a process of its own. No call waits for it but `close`, which waits for ``close_seconds`` at most.

    Raises TrackerFailed if the tracker has failed, has ended or does not read its points any more.
    """

    def __init__(
        self,
        name: str,
        spec: JobSpec,
        run_path: Path,
        program: Sequence[str] = TRACKER_PROGRAM,
        close_seconds: float = CLOSE_SECONDS,
    ) -> None:
        self.name = name
        if not installed(name):
            raise ModuleNotFoundError(name)
        self._close_seconds = close_seconds
        self._unsent = bytearray()
        self._deadline: float | None = None
        self._process = subprocess.Popen(
            [*program, name, str(run_path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,  # signals to the ranks are not for it: it ends after its last point
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._points, self._failure = self._process.stdin, self._process.stdout
        os.set_blocking(self._points.fileno(), False)
        os.set_blocking(self._failure.fileno(), False)
        # The spec may list thousands of files. A tracker reads nothing while it imports its library.
        first = {"spec": spec.model_dump(mode="json")}
        self._max_unsent = MAX_UNSENT + len(json.dumps(first))
        self._send(first)

    def start_at(self, step: int) -> None:  # noqa: ARG002 - a tracker knows its own last step
        self._send({"rewind": True})

    def log(self, point: Point) -> None:
        self._send({"step": point.step, "values": scalars(point)})

    def finish(self) -> None:
        """Tell the tracker that no point follows. The time of `close` begins."""
        self._deadline = time.monotonic() + self._close_seconds
        self._write()
        if not self._unsent:
            self._end_of_points()

    def close(self) -> None:
        if self._deadline is None:
            self.finish()
        assert self._deadline is not None
        try:
            while self._unsent and (left := self._deadline - time.monotonic()) > 0:
                select.select([], [self._points], [], left)
                self._write()
            self._end_of_points()
            self._process.wait(max(0.0, self._deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            raise TrackerFailed(f"it did not end within {self._close_seconds:g} s after the last point") from None
        finally:
            self._process.kill()
            self._process.wait()
            failure = self._reported()
            self._failure.close()
            self._end_of_points()
        if failure is not None or self._process.returncode != 0:
            raise TrackerFailed(failure or f"its process ended with code {self._process.returncode}")

    def abandon(self) -> None:
        """End the process at once."""
        self._process.kill()
        self._process.wait()
        self._failure.close()
        self._end_of_points()

    def _send(self, message: dict[str, Any]) -> None:
        failure = self._reported()
        if failure is not None:
            raise TrackerFailed(failure)
        self._unsent += json.dumps(message).encode() + b"\n"
        self._write()
        if len(self._unsent) > self._max_unsent:
            raise TrackerFailed("it does not read its points: it hangs, or its server does not answer")

    def _write(self) -> None:
        try:
            written = os.write(self._points.fileno(), self._unsent)
        except BlockingIOError:
            return
        except OSError:
            raise TrackerFailed(self._reported() or "its process ended") from None
        del self._unsent[:written]

    def _reported(self) -> str | None:
        text: bytes | None = self._failure.read()
        return text.decode("utf-8", "replace").strip() or None if text else None

    def _end_of_points(self) -> None:
        with contextlib.suppress(OSError):
            self._points.close()


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


def requested(spec: JobSpec) -> list[str]:
    """Return the trackers that the spec names, each once. ``use_wandb`` is SwanLab where only that is installed.

    MiniMind's own flag meant W&B at first and means SwanLab today.
    """
    reporting = spec.reporting
    names: list[str] = ["tensorboard"] if reporting.tensorboard else []
    if reporting.use_wandb:
        names.append("swanlab" if installed("swanlab") and not installed("wandb") else "wandb")
    return list(dict.fromkeys([*names, *reporting.trackers]))


def installed(name: str) -> bool:
    """Return whether the package can be imported. A folder of its files, such as W&B's ``wandb/``, is no package."""
    found = importlib.util.find_spec(name)
    return found is not None and found.origin is not None


class Trackers:
    """The trackers that the spec requests, none if ``spec`` is None. One that fails is dropped with one warning."""

    def __init__(self, spec: JobSpec | None, run_path: Path, emit: Callable[[Event], None]) -> None:
        self._emit = emit
        self._active: list[Tracker] = []
        for name in requested(spec) if spec is not None else ():
            assert spec is not None
            if name == "tensorboard":
                self._add(name, lambda: TensorBoard(run_path / "tensorboard"))
            else:
                self._add(name, partial(TrackerProcess, name, spec, run_path))

    def _add(self, name: str, make: Callable[[], Tracker]) -> None:
        try:
            self._active.append(make())
        except ImportError:
            message = f"{name} is not installed: training continues without it; `pip install {name}` installs it"
            self._emit(WarningEvent(code=f"{name}_missing", message=message))
        except Exception as error:
            self._warn(name, error)

    def _warn(self, name: str, error: Exception) -> None:
        reason = str(error) if isinstance(error, TrackerFailed) else f"{type(error).__name__}: {error}"
        message = f"{name} failed and gets no more metrics: {reason[:300]}"
        self._emit(WarningEvent(code=f"{name}_failed", message=message))

    def start_at(self, step: int) -> None:
        self._for_each(lambda tracker: tracker.start_at(step))

    def log(self, point: Point) -> None:
        self._for_each(lambda tracker: tracker.log(point))

    def close(self) -> None:
        # First all, so that several that hang cost the time of one.
        self._for_each(lambda tracker: tracker.finish() if isinstance(tracker, TrackerProcess) else None)
        self._for_each(lambda tracker: tracker.close())

    def _for_each(self, action: Callable[[Tracker], None]) -> None:
        for tracker in list(self._active):
            try:
                action(tracker)
            except Exception as error:
                self._active.remove(tracker)
                self._warn(tracker.name, error)
                if isinstance(tracker, TrackerProcess):
                    tracker.abandon()
