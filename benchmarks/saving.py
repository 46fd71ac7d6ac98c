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
from trainyard.contract.events import Event, WarningEvent
from trainyard.contract.rundir import ArtifactDir, RunDir
from trainyard.contract.spec import JobSpec
from trainyard.model.config import ModelConfig
from trainyard.worker.checkpoint import files
from trainyard.worker.checkpoint.saver import Checkpointer, StagingBuffers, StateDicts
from trainyard.worker.checkpoint.weights import write_weights
from trainyard.worker.data.loader import MicroBatchLoader
from trainyard.worker.data.prepare import prepare_data
from trainyard.worker.data.sampler import StepSampler
from trainyard.worker.distributed import DistributedContext
from trainyard.worker.training.metrics import MetricsProcessor, MetricsWindow
from trainyard.worker.training.resume_check import ResumeCheck
from trainyard.worker.training.state import TrainProgress, TrainState, build_train_state, initial_model

ROUNDS = 5
LIMIT = 0.15
ROWS = 2
SHAPE = ModelConfig(hidden_size=512, num_hidden_layers=8, vocab_size=6400)


class Bench:
    """A model of MiniMind's size in training, with everything that a save needs."""

    def __init__(self, folder: Path) -> None:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.ranks = DistributedContext(0, 1, 0, 1, device)
        write_docstrings(folder / "corpus.jsonl", 300)
        data = {"data_path": str(folder / "corpus.jsonl")}
        spec = JobSpec.model_validate({"data": data, "model": SHAPE, "training": {"batch_size": ROWS}})
        training_data = prepare_data(spec, RunDir(folder), self.ranks, self.require_no_warning, lambda: False)
        self.spec, self.artifacts = training_data.spec, ArtifactDir(folder)
        sampler = StepSampler(training_data.train_set.targets, ROWS, 1)
        self.loader = MicroBatchLoader(training_data.train_set, sampler, self.ranks, ROWS, "global_tokens")
        self.state: TrainState = build_train_state(initial_model(SHAPE, 1, device), self.spec.training, 0.0, self.ranks)
        self.metrics = MetricsProcessor(self.ranks, MetricsWindow(), 1.0, has_aux=False)
        self.saver = Checkpointer(
            self.spec, self.artifacts, training_data.identity, ROWS, self.ranks, self.require_no_warning
        )
        self.saver.resume_check = ResumeCheck.from_dataset(training_data.train_set, self.spec.training, device)
        self.step = 0

    def require_no_warning(self, event: Event) -> None:
        """Raise RuntimeError for a warning: it ends the measurement."""
        if isinstance(event, WarningEvent):
            raise RuntimeError(event.message)

    def train(self) -> float:
        """Run one optimizer step; return its seconds."""
        began = time.perf_counter()
        self.step += 1
        self.state.train_step.run(self.loader.microbatches(self.step), 1e-4, lambda _: None)
        return time.perf_counter() - began

    def save_synchronously(self) -> float:
        """Save without a copy while training waits; return the seconds."""
        began = time.perf_counter()
        state = self.state.run_state(
            TrainProgress(step=self.step), self.saver.identity, rows_per_step=ROWS, interval=[], loss=None
        )
        copies = StateDicts.live(self.state.model, self.state.optimizer)
        files.write_checkpoint(self.artifacts, state, files.unique_tensors(copies.model), copies.optimizer)
        write_weights(self.artifacts.out / "synchronous.pth", copies.model)
        return time.perf_counter() - began

    def save_asynchronously(self) -> tuple[float, list[float]]:
        """Save while training continues; return the blocked seconds, and the seconds of each step meanwhile."""
        before, published, began = self._blocked_seconds(), self.artifacts.checkpoint(self.step), time.perf_counter()
        self.saver.save(self.state, TrainProgress(step=self.step), self.metrics, required=False)
        blocked = time.perf_counter() - began
        steps: list[float] = []
        while not (published.exists() and steps):
            steps.append(self.train())
        self.saver.wait()
        return blocked + self._blocked_seconds() - before, steps

    def _blocked_seconds(self) -> float:
        snapshot: StagingBuffers | None = self.saver._staging  # noqa: SLF001
        return snapshot.blocked_seconds if snapshot is not None else 0.0


def main() -> None:
    """Measure in a new process whose OpenMP threads sleep while they wait, as in a run: torch reads it when loaded."""
    environment = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE"}
    subprocess.run([sys.executable, "-m", "benchmarks.saving"], env=environment, check=True)


def measure() -> None:
    """Alternate the two, so that a slow minute of the machine affects both."""
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder))
        synchronous, blocked, alone, during_save = [], [], [], []
        for number in range(ROUNDS + 1):
            steps = [bench.train() for _ in range(3)]
            whole = bench.save_synchronously()
            bench.train()
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
