"""Saving beside training: how long training stands still for a save, against a save that it waits for."""

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
from trainyard.worker.checkpoint.saver import Checkpointer
from trainyard.worker.checkpoint.staging import StagingBuffers, StateDicts
from trainyard.worker.checkpoint.weights import write_weights
from trainyard.worker.data.loader import MicroBatchLoader
from trainyard.worker.data.prepare import prepare_data
from trainyard.worker.data.sampler import StepSampler
from trainyard.worker.distributed import DistributedContext
from trainyard.worker.training.metrics import MetricsProcessor, MetricsWindow
from trainyard.worker.training.resume_check import ResumeCheck
from trainyard.worker.training.state import (
    TrainProgress,
    TrainState,
    build_train_state,
    initial_model,
)

ROUNDS = 5
LIMIT = 0.15
ROWS = 2
SHAPE = ModelConfig(hidden_size=512, num_hidden_layers=8, vocab_size=6400)


class Bench:
    """A model of MiniMind's size in training, with everything a save needs."""

    def __init__(self, folder: Path) -> None:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.ranks = DistributedContext(0, 1, 0, 1, device)
        write_docstrings(folder / "corpus.jsonl", 300)
        data = {"data_path": str(folder / "corpus.jsonl")}
        asked = JobSpec.model_validate({"data": data, "model": SHAPE, "training": {"batch_size": ROWS}})
        material = prepare_data(asked, RunDir(folder), self.ranks, self.heard, lambda: False)
        self.spec, self.products = material.spec, ArtifactDir(folder)
        order = StepSampler(material.train_set.targets, ROWS, 1)
        self.feed = MicroBatchLoader(material.train_set, order, self.ranks, ROWS, "global_tokens")
        self.trainee: TrainState = build_train_state(
            initial_model(SHAPE, 1, device), self.spec.training, 0.0, self.ranks
        )
        self.meters = MetricsProcessor(self.ranks, MetricsWindow(), 1.0, has_aux=False)
        self.saver = Checkpointer(self.spec, self.products, material.identity, ROWS, self.ranks, self.heard)
        self.saver.resume_check = ResumeCheck.from_dataset(material.train_set, self.spec.training, device)
        self.step = 0

    def heard(self, event: Event) -> None:
        """Whatever goes wrong ends the measurement."""
        if isinstance(event, WarningEvent):
            raise RuntimeError(event.message)

    def train(self) -> float:
        """Seconds of one optimizer step."""
        began = time.perf_counter()
        self.step += 1
        self.trainee.train_step.run(self.feed.microbatches(self.step), 1e-4, lambda _: None)
        return time.perf_counter() - began

    def waited_for(self) -> float:
        """Seconds of a save straight from what is trained, which training waits for."""
        began = time.perf_counter()
        state = self.trainee.run_state(
            TrainProgress(step=self.step), self.saver.identity, rows_per_step=ROWS, interval=[], loss=None
        )
        copies = StateDicts.live(self.trainee.model, self.trainee.optimizer)
        files.write_checkpoint(self.products, state, files.unique_tensors(copies.model), copies.optimizer)
        write_weights(self.products.out / "waited_for.pth", copies.model)
        return time.perf_counter() - began

    def beside(self) -> tuple[float, list[float]]:
        """Seconds that training stands still for a save, and those of each step until it is published."""
        held, published, began = self._held(), self.products.checkpoint(self.step), time.perf_counter()
        self.saver.save(self.trainee, TrainProgress(step=self.step), self.meters, required=False)
        blocked = time.perf_counter() - began
        steps: list[float] = []
        while not (published.exists() and steps):
            steps.append(self.train())
        self.saver.wait()
        return blocked + self._held() - held, steps

    def _held(self) -> float:
        snapshot: StagingBuffers | None = self.saver._staging  # noqa: SLF001
        return snapshot.blocked_seconds if snapshot is not None else 0.0


def main() -> None:
    """Measure in a process whose OpenMP threads wait as those of a run do: asleep. It is read when torch is loaded."""
    environment = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE"}
    subprocess.run([sys.executable, "-m", "benchmarks.saving"], env=environment, check=True)


def measure() -> None:
    """Alternate the two, so that a slow minute of the machine hits both."""
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder))
        waited, blocked, alone, meanwhile = [], [], [], []
        for number in range(ROUNDS + 1):
            steps = [bench.train() for _ in range(3)]
            whole = bench.waited_for()
            bench.train()
            still, during = bench.beside()
            if number:  # the first round makes the buffers, the optimizer's state and the disk's cache
                waited.append(whole)
                blocked.append(still)
                alone += steps
                meanwhile += during
    ratio = statistics.median(b / w for b, w in zip(blocked, waited, strict=True))
    slower = statistics.median(meanwhile) / statistics.median(alone) - 1
    print(f"a save training waits for    {statistics.median(waited):6.2f} s (512 x 8, median of {ROUNDS})")
    print(f"a save beside training       {statistics.median(blocked):6.2f} s standing still")
    print(f"ratio                        {ratio:6.1%} (median of pairs; goal: under {LIMIT:.0%})")
    print(f"steps while one is written   {slower:+6.0%} longer, on {os.cpu_count()} cores that do both")


if __name__ == "__main__":
    measure()
