"""One training run of the optimizer benchmark: the same shape, rows and held-out documents for all of them.

Time is the CPU time of one thread, so that other work on the machine hardly affects it.
"""

import statistics
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.corpus import write_docstrings
from trainyard.contract.lr_schedule import LRSchedule
from trainyard.contract.rundir import RunDir
from trainyard.contract.spec import JobSpec, TrainingSpec
from trainyard.model.config import ModelConfig
from trainyard.worker.data.documents import Integers
from trainyard.worker.data.loader import MicroBatchLoader
from trainyard.worker.data.prepare import TrainingData, prepare_data
from trainyard.worker.data.sampler import FeistelPermutation, StepSampler
from trainyard.worker.distributed import DistributedContext
from trainyard.worker.training.heldout import HeldOutEvaluator
from trainyard.worker.training.state import TrainState, build_train_state, initial_model

ROWS, LENGTH, DOCUMENTS, HELD_OUT = 8, 128, 100_000, 0.02
SHAPE = ModelConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1)
ALONE = DistributedContext(0, 1, 0, 1, torch.device("cpu"))

STEPS = 300
"""Steps of AdamW. `ROWS` sequences are one step; see `Trial.sizes`."""


@dataclass(frozen=True)
class Trial:
    """A run to measure. ``steps``: its length. ``training``: fields of the spec's group that are not the default.

    ``first_rows``: sequences of a step in the first quarter of the run, and twice as many in the second one, for a
    batch that grows; None: always `ROWS`. The whole run has the same sequences either way.
    """

    name: str
    steps: int
    training: Mapping[str, Any] = field(default_factory=dict)
    first_rows: int | None = None

    def sizes(self) -> list[int]:
        """Return the number of sequences of each update."""
        if self.first_rows is None:
            return [ROWS] * self.steps
        sizes: list[int] = []
        total = self.steps * ROWS
        while (done := sum(sizes)) < total:
            size = min(ROWS, self.first_rows * 2 ** (4 * done // total))
            sizes.append(min(size, total - done))
        return sizes

    @property
    def spec(self) -> TrainingSpec:
        return TrainingSpec.model_validate({"dtype": "float32", **self.training, "max_steps": self.steps})


@dataclass(frozen=True)
class Result:
    """What a run measured. ``curve``: (steps done, held-out loss). ``step_seconds``: median CPU time of an update."""

    name: str
    seed: int
    steps: int
    curve: list[tuple[float, float]]
    step_seconds: float
    training: dict[str, Any] = field(default_factory=dict)

    @property
    def held_out(self) -> float:
        """The held-out loss at the end."""
        return self.curve[-1][1]

    def reaches(self, loss: float) -> float | None:
        """Return the steps after which the held-out loss is at most ``loss``, or None."""
        return next((step for step, value in self.curve if value <= loss), None)

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class UpdateRows(StepSampler):
    """The rows of updates of different ``sizes``: the same order as that of equal ones."""

    sizes: tuple[int, ...] = ()

    def rows_of(self, step: int) -> Integers:
        first = sum(self.sizes[: step - 1])
        # The row loader looks one step ahead.
        last = first + (self.sizes[step - 1] if step <= len(self.sizes) else self.global_batch)
        epoch, places = first // self.rows, np.arange(first, last) % self.rows
        return FeistelPermutation(self.rows, self.seed, epoch)(places)


def prepare_docstrings(folder: Path) -> TrainingData:
    """Prepare all docstrings of the standard library as bytes, with a part of the documents held out."""
    corpus = folder / "corpus.jsonl"
    if not corpus.exists():
        write_docstrings(corpus, DOCUMENTS)
    data = {"data_path": str(corpus), "tokenizer_path": "byte", "max_seq_len": LENGTH, "eval_fraction": HELD_OUT}
    spec = JobSpec.model_validate({"data": data, "model": SHAPE})
    return prepare_data(spec, RunDir(folder), ALONE, lambda _: None, lambda: False)


def new_state(data: TrainingData, training: TrainingSpec, seed: int) -> TrainState:
    """Return a model with the initial weights of ``seed``, and its optimizer."""
    zeros = training.zero_init_projections
    model = initial_model(data.spec.model, seed, ALONE.device, zero_init_projections=zeros)
    state = build_train_state(model, training, 0.0, ALONE)
    state.model.train()
    return state


def held_out_loss(data: TrainingData, state: TrainState) -> float:
    loss = HeldOutEvaluator(data.eval_sets, ALONE, ROWS, None).evaluate(state).loss
    assert loss is not None
    return loss


def loader_of(data: TrainingData, seed: int, sizes: list[int]) -> MicroBatchLoader:
    rows = UpdateRows(len(data.train_set), ROWS, seed, tuple(sizes))
    return MicroBatchLoader(data.train_set, rows, ALONE, ROWS, "global_tokens")


def run_trial(data: TrainingData, trial: Trial, seed: int, every: int | None = None) -> Result:
    """Train once. ``every``: steps between evaluations; None: only at the end."""
    training, sizes = trial.spec, trial.sizes()
    state, loader = new_state(data, training, seed), loader_of(data, seed, sizes)
    schedule = LRSchedule.from_spec(training, trial.steps)
    curve: list[tuple[float, float]] = []
    seconds: list[float] = []
    done = 0.0
    for update, size in enumerate(sizes, 1):
        before, done = done, done + size / ROWS
        began = time.process_time()
        state.train_step.run(loader.microbatches(update), schedule.at(max(1, round(done))), lambda _: None).read()
        seconds.append(time.process_time() - began)
        if update == len(sizes) or (every is not None and int(done / every) > int(before / every)):
            curve.append((done, held_out_loss(data, state)))
    return Result(trial.name, seed, trial.steps, curve, statistics.median(seconds), dict(trial.training))
