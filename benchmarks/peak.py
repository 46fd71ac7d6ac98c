"""The share of this machine's peak bf16 matrix-product speed that a training step reaches, eager and compiled."""

import statistics
import tempfile
from pathlib import Path

from benchmarks.running import worker_events
from benchmarks.trainer import WARMUP_STEPS, matmul_peak, prepare, spec

ROUNDS = 3
GOAL_PER_CENT = 55


def main() -> None:
    """Measure the peak before each run, and count the best of each: a busy moment lowers either."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        prepare(root)
        peaks: list[float] = []
        speeds_by_name: dict[str, list[tuple[float, float]]] = {"eager": [], "compiled": []}
        for number in range(ROUNDS):
            for name, speeds in speeds_by_name.items():
                peaks.append(matmul_peak())
                speeds.append(measure(root, f"{name}-{number}", compiled=name == "compiled"))
    print(f"bf16 matrix product of this machine: {max(peaks) / 1e12:.2f} TFLOP/s at its best")
    for name, speeds in speeds_by_name.items():
        print(f"{name}: {describe(*max(speeds), max(peaks))}")


def measure(root: Path, name: str, *, compiled: bool) -> tuple[float, float]:
    """Return trained tokens per second after the warm-up steps, and FLOP/s as the worker counts them."""
    events = worker_events(root, name, spec(root, compiled=compiled))
    started = next(event for event in events if event["kind"] == "started")
    speeds = [float(event["tokens_per_second"]) for event in events if event["kind"] == "metric"]
    speed = statistics.median(speeds[WARMUP_STEPS:])
    return speed, speed * float(started["flops_per_token"])


def describe(tokens_per_second: float, flops: float, peak: float) -> str:
    """Return the line: tokens/s, FLOP/s, and their share of ``peak`` FLOP/s."""
    return (
        f"{tokens_per_second:.0f} trained tokens/s, {flops / 1e12:.2f} TFLOP/s of the model's own arithmetic: "
        f"{100 * flops / peak:.0f} % of the peak (goal {GOAL_PER_CENT} %)"
    )
