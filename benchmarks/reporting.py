"""The cost of reporting: time spent in it during a real run, relative to the time of the steps."""

import functools
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.corpus import write_docstrings
from trainyard.contract.rundir import RunDir

STEPS = 60
LIMIT_PER_CENT = 1.0


def main() -> None:
    """Measure one rank with a log interval of 10, and with the worst case of 1."""
    for log_interval in (10, 1):
        reporting, steps = measure(log_interval)
        share = 100 * reporting / steps
        print(
            f"log_interval {log_interval:3}: {share:5.3f} % of step time ({1e6 * reporting / STEPS:.0f} us of "
            f"{1e3 * steps / STEPS:.1f} ms a step; goal: under {LIMIT_PER_CENT} %)"
        )


def measure(log_interval: int) -> tuple[float, float]:
    """Run the worker once in its own process; return (seconds in reporting, seconds in steps)."""
    with tempfile.TemporaryDirectory() as folder:
        run = RunDir(Path(folder) / "run")
        run.path.mkdir()
        write_docstrings(Path(folder) / "corpus.jsonl", 1000)
        run.spec.write_text(json.dumps(spec(Path(folder) / "corpus.jsonl", log_interval)))
        command = [sys.executable, "-m", "benchmarks.reporting", str(run.path)]
        printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        lines = [json.loads(line) for line in run.attempt(1).outbox.read_text().splitlines()]
    steps = sum(line["step_seconds"] * log_interval for line in lines if line["kind"] == "metric")
    return float(printed.splitlines()[-1]), steps


def child() -> None:
    """Run the worker on the directory in the arguments, and print its seconds in reporting."""
    from trainyard.worker.__main__ import main as worker

    clock = Stopwatch()
    with instrumented(clock):
        worker()
    print(clock.seconds)


def spec(corpus: Path, log_interval: int) -> dict[str, Any]:
    """Return a spec of a small model: the smaller the step, the larger the share of reporting."""
    return {
        "model": {"hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2},
        "data": {"data_path": str(corpus), "max_seq_len": 128},
        "training": {"max_steps": STEPS, "batch_size": 8, "accumulation_steps": 1},
        "reporting": {"log_interval": log_interval},
        "resources": {"device": "cpu"},
    }


class Stopwatch:
    """Sums the seconds inside wrapped functions; nested calls count once."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._depth = 0

    def wrap(self, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            began, self._depth = time.perf_counter(), self._depth + 1
            try:
                return function(*args, **kwargs)
            finally:
                self._depth -= 1
                if self._depth == 0:
                    self.seconds += time.perf_counter() - began

        return timed


class instrumented:  # noqa: N801 - used as a verb: `with instrumented(clock)`
    """Times everything in the worker that reports: events, metrics, heartbeat, stop signal, trackers."""

    def __init__(self, clock: Stopwatch) -> None:
        from trainyard.worker.attempt import StepHeartbeat
        from trainyard.worker.events.trackers import Trackers
        from trainyard.worker.events.writer import EventWriter
        from trainyard.worker.stop_signal import StopSignal
        from trainyard.worker.training.metrics import MetricsProcessor

        self._clock = clock
        self._methods: list[tuple[type, str]] = [
            (EventWriter, "emit"),
            (MetricsProcessor, "metric_event"),
            (MetricsProcessor, "record"),
            (MetricsProcessor, "end_step"),
            (StepHeartbeat, "beat"),
            (StopSignal, "requested"),
            (Trackers, "log"),
        ]

    def __enter__(self) -> None:
        self._originals = [(owner, name, getattr(owner, name)) for owner, name in self._methods]
        for owner, name, function in self._originals:
            setattr(owner, name, self._clock.wrap(function))

    def __exit__(self, *_: object) -> None:
        for owner, name, function in self._originals:
            setattr(owner, name, function)


if __name__ == "__main__":
    child()
