"""The share of this machine's peak bf16 matrix-product speed that a training step reaches, eager and compiled."""

import tempfile
from pathlib import Path

from benchmarks.trainer import flops_per_token, matmul_peak, prepare, trainyard

ROUNDS = 3
GOAL_PER_CENT = 55


def main() -> None:
    """Measure the peak before each run, and count the best of each: a busy moment lowers either."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        prepare(root)
        peaks: list[float] = []
        speeds_by_name: dict[str, list[float]] = {"eager": [], "compiled": []}
        for number in range(ROUNDS):
            for name, speeds in speeds_by_name.items():
                peaks.append(matmul_peak())
                speeds.append(trainyard(root, f"{name}-{number}", compiled=name == "compiled"))
    print(f"bf16 matrix product of this machine: {max(peaks) / 1e12:.2f} TFLOP/s at its best")
    for name, speeds in speeds_by_name.items():
        print(f"{name}: {describe(max(speeds), max(peaks))}")


def describe(tokens_per_second: float, peak: float) -> str:
    """Return the line: tokens/s, the same in FLOP/s, and its share of ``peak`` FLOP/s."""
    reached = tokens_per_second * flops_per_token()
    return (
        f"{tokens_per_second:.0f} tokens/s, {reached / 1e12:.2f} TFLOP/s of the model's own arithmetic: "
        f"{100 * reached / peak:.0f} % of the peak (goal {GOAL_PER_CENT} %)"
    )
