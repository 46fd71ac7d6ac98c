"""The share of this machine's bf16 matrix-product peak that a training step reaches, eager and compiled, in one run."""

import tempfile
from pathlib import Path

from benchmarks.trainer import flops_per_token, matmul_peak, prepare, trainyard

ROUNDS = 3
GOAL_PER_CENT = 55


def main() -> None:
    """The peak is measured beside each run, and the best of each counts: a busy moment lowers either."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        prepare(root)
        peaks: list[float] = []
        found: dict[str, list[float]] = {"eager": [], "compiled": []}
        for number in range(ROUNDS):
            for name, speeds in found.items():
                peaks.append(matmul_peak())
                speeds.append(trainyard(root, f"{name}-{number}", compiled=name == "compiled"))
    print(f"bf16 matrix product of this machine: {max(peaks) / 1e12:.2f} TFLOP/s at its best")
    for name, speeds in found.items():
        print(f"{name}: {told(max(speeds), max(peaks))}")


def told(tokens_per_second: float, peak: float) -> str:
    """The row: tokens/s, what that is in FLOP/s, and its share of ``peak`` FLOP/s."""
    reached = tokens_per_second * flops_per_token()
    return (
        f"{tokens_per_second:.0f} tokens/s, {reached / 1e12:.2f} TFLOP/s of the model's own arithmetic: "
        f"{100 * reached / peak:.0f} % of the peak (goal {GOAL_PER_CENT} %)"
    )
