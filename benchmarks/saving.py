"""Asynchronous saves: how long they block training, against a synchronous save."""

import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from benchmarks.corpus import write_docstrings
from trainyard.contract.spec import DataSpec
from trainyard.model.config import ModelConfig
from trainyard.worker.doctor.bench import SaveBench
from trainyard.worker.openmp import limit_spinning

ROUNDS = 5
LIMIT = 0.15
ROWS = 2
SHAPE = ModelConfig(hidden_size=512, num_hidden_layers=8, vocab_size=6400)


def timed_step(bench: SaveBench) -> float:
    """Run one optimizer step; return its seconds."""
    began = time.perf_counter()
    bench.train(rate=1e-4)
    return time.perf_counter() - began


def main() -> None:
    """Measure in a new process whose OpenMP threads wait as in a run."""
    environment = dict(os.environ)
    limit_spinning(environment)
    subprocess.run([sys.executable, "-m", "benchmarks.saving"], env=environment, check=True)


def measure() -> None:
    """Alternate the two, so that a slow minute of the machine affects both."""
    with tempfile.TemporaryDirectory() as folder:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        texts = Path(folder) / "corpus.jsonl"
        write_docstrings(texts, 300)
        bench = SaveBench(Path(folder), device, texts, SHAPE, ROWS, DataSpec().max_seq_len)
        synchronous, blocked, alone, during_save = [], [], [], []
        for number in range(ROUNDS + 1):
            steps = [timed_step(bench) for _ in range(3)]
            whole = bench.save_synchronously()
            timed_step(bench)
            blocking, during = bench.save_asynchronously()
            if number:  # the first round allocates buffers and optimizer state, and warms the disk cache
                synchronous.append(whole)
                blocked.append(blocking)
                alone += steps
                during_save += during
    ratio = statistics.median(b / w for b, w in zip(blocked, synchronous, strict=True))
    slower = statistics.median(during_save) / statistics.median(alone) - 1
    print(f"a synchronous save           {statistics.median(synchronous):6.2f} s (512 x 8, median of {ROUNDS})")
    print(f"an asynchronous save blocks  {statistics.median(blocked):6.2f} s")
    print(f"ratio                        {ratio:6.1%} (median of pairs; goal: under {LIMIT:.0%})")
    print(f"steps during a save          {slower:+6.0%} longer, on {os.cpu_count()} cores that do both")


if __name__ == "__main__":
    measure()
