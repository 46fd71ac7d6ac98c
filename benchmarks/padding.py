"""Useful tokens a second of packed rows against padded rows, on docstrings, alternated in one run.

Useful tokens are those that are predicted; a padded row takes the same time for its padding.
"""

import statistics
import tempfile
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from benchmarks.baselines import Ratio
from benchmarks.corpus import write_docstrings
from benchmarks.running import worker_points

ROUNDS = 3
STEPS = 8
WARM = 2
SHAPE = {"hidden_size": 512, "num_hidden_layers": 4}
"""Half of MiniMind's layers: the ratio does not depend on their number, and it takes half the time."""


@dataclass(frozen=True)
class Throughput:
    """Predicted tokens a second and a step, of one run."""

    useful: float
    per_step: float


def main() -> list[Ratio]:
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_docstrings(root / "corpus.jsonl", 7000)
        per_step, per_second = [], []
        for number in range(ROUNDS):
            packed, padded = run(root, "document", number), run(root, "none", number)
            per_second.append(packed.useful / padded.useful)
            per_step.append(packed.per_step / padded.per_step)
            print(
                f"round {number + 1}: {packed.useful:.0f} useful tokens/s packed, {padded.useful:.0f} padded",
                flush=True,
            )
        ratio, padding = statistics.median(per_second), statistics.median(per_step)
    print(f"packed: {ratio:.2f} x the useful tokens/s; {padding:.2f} x the useful tokens a step")
    print(f"of the padding won, {100 * ratio / padding:.0f} % is won in time (goal: at least 95 %)")
    return [Ratio("padding: useful tokens/s, packed to padded", ratio)]


def run(root: Path, packing: str, number: int) -> Throughput:
    """Run the worker for a few steps on rows of 1,024 bytes; return the throughput from its metrics."""
    points = worker_points(root, f"{packing}-{number}", spec(root, packing))
    tokens = [after["tokens"] - before["tokens"] for before, after in pairwise(points)][WARM - 1 :]
    seconds = [point["step_seconds"] for point in points[WARM:]]
    return Throughput(sum(tokens) / sum(seconds), sum(tokens) / len(tokens))


def spec(root: Path, packing: str) -> dict[str, Any]:
    return {
        "model": SHAPE,
        "data": {"data_path": str(root / "corpus.jsonl"), "max_seq_len": 1024, "packing": packing},
        "training": {"max_steps": STEPS, "batch_size": 4, "accumulation_steps": 1},
        "reporting": {"log_interval": 1},
        "resources": {"device": "cpu"},
    }
