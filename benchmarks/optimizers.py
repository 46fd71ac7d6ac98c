"""AdamW against Muon on a corpus of docstrings: loss by step and by time, and the cost of reaching AdamW's loss.

All train on the same rows, one step of each in turn, so that a slow minute of the machine affects all of them.
``python -m benchmarks.optimizers FOLDER`` draws the curves and writes their table there.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from benchmarks.corpus import write_docstrings
from benchmarks.drawing import Line, chart
from trainyard.contract.lr_schedule import LRSchedule
from trainyard.contract.rundir import RunDir
from trainyard.contract.spec import JobSpec, TrainingSpec
from trainyard.model.config import ModelConfig
from trainyard.worker.data.loader import MicroBatchLoader
from trainyard.worker.data.prepare import TrainingData, prepare_data
from trainyard.worker.data.sampler import StepSampler
from trainyard.worker.distributed import DistributedContext
from trainyard.worker.training.heldout import HeldOutEvaluator
from trainyard.worker.training.state import TrainState, build_train_state, initial_model

STEPS, ROWS, LENGTH, DOCUMENTS = 200, 8, 256, 100_000
SHAPE = ModelConfig(hidden_size=128, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2)
RATES = {"adamw": (1e-3, 2e-3, 4e-3), "muon": (5e-3, 1e-2, 2e-2)}
"""Each optimizer is compared at its best learning rate."""

WINDOW = 20
"""Steps over which the loss is smoothed."""


@dataclass
class Learner:
    """One optimizer at one learning rate, and its results."""

    optimizer: str
    peak: float
    state: TrainState
    schedule: LRSchedule
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    held_out: float = float("nan")

    def learn(self, loader: MicroBatchLoader, step: int) -> None:
        began = time.perf_counter()
        metrics = self.state.train_step.run(loader.microbatches(step), self.schedule.at(step), lambda _: None).read()
        self.seconds.append(time.perf_counter() - began)
        self.losses.append(metrics.loss)

    @property
    def smoothed(self) -> list[float]:
        """The loss of each step, smoothed over WINDOW steps."""
        return [statistics.fmean(self.losses[max(0, end - WINDOW) : end]) for end in range(1, len(self.losses) + 1)]

    @property
    def clock(self) -> list[float]:
        """Seconds until the end of each step, all of the median length: other load on the machine is left out."""
        return [number * statistics.median(self.seconds) for number in range(1, len(self.seconds) + 1)]

    def reaches(self, loss: float) -> int | None:
        """Return the first step from WINDOW on with a smoothed loss of at most ``loss``, or None."""
        return next((step for step, value in enumerate(self.smoothed, 1) if step >= WINDOW and value <= loss), None)


def main() -> None:
    print("\n".join(table(train_all())))


def train_all() -> list[Learner]:
    with tempfile.TemporaryDirectory() as folder:
        ranks = DistributedContext(0, 1, 0, 1, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
        data = prepare_docstrings(Path(folder), ranks)
        learners = [learner(data, name, rate, ranks) for name, rates in RATES.items() for rate in rates]
        sampler = StepSampler(len(data.train_set), ROWS, 1)
        loaders = [MicroBatchLoader(data.train_set, sampler, ranks, ROWS, "global_tokens") for _ in learners]
        for step in range(1, STEPS + 1):
            for each, loader in zip(learners, loaders, strict=True):
                each.learn(loader, step)
        for each in learners:
            each.held_out = HeldOutEvaluator(data.eval_sets, ranks, ROWS, None).evaluate(each.state).loss or float(
                "nan"
            )
    return learners


def prepare_docstrings(folder: Path, ranks: DistributedContext) -> TrainingData:
    """Prepare all docstrings of the standard library, with 5 % held out."""
    write_docstrings(folder / "corpus.jsonl", DOCUMENTS)
    data = {"data_path": str(folder / "corpus.jsonl"), "max_seq_len": LENGTH, "eval_fraction": 0.05}
    return prepare_data(
        JobSpec.model_validate({"data": data, "model": SHAPE}), RunDir(folder), ranks, lambda _: None, lambda: False
    )


def learner(data: TrainingData, optimizer: str, rate: float, ranks: DistributedContext) -> Learner:
    """Return a learner with the same initial weights as all others."""
    spec = {"optimizer": optimizer, "learning_rate": rate, "warmup_steps": STEPS // 20}
    training = TrainingSpec.model_validate(spec)
    state = build_train_state(initial_model(data.spec.model, 1, ranks.device), training, 0.0, ranks)
    state.model.train()
    return Learner(optimizer, rate, state, LRSchedule.from_spec(training, STEPS))


def best(learners: Sequence[Learner], optimizer: str) -> Learner:
    """Return this optimizer's learner with the lowest held-out loss."""
    return min((each for each in learners if each.optimizer == optimizer), key=lambda each: each.held_out)


def table(learners: Sequence[Learner]) -> list[str]:
    """Return the results as a Markdown table with a sentence below it."""
    adamw, muon = best(learners, "adamw"), best(learners, "muon")
    target = adamw.smoothed[-1]
    lines = ["| optimizer | rate | held-out loss | steps to AdamW's last loss | of its time | a step |"]
    lines.append("|---|---|---|---|---|---|")
    for each in learners:
        reached = each.reaches(target)
        share = f"{each.clock[reached - 1] / adamw.clock[-1]:.0%}" if reached else "-"
        slower = statistics.median(each.seconds) / statistics.median(adamw.seconds)
        lines.append(
            f"| {each.optimizer} | {each.peak:g} | {each.held_out:.3f} | {reached or '-'} | {share} | {slower:.2f} x |"
        )
    reached = muon.reaches(target)
    if reached is None:
        return [*lines, "", f"Muon does not come to {target:.3f}, AdamW's last loss, within {STEPS} steps."]
    steps, seconds = reached / STEPS, muon.clock[reached - 1] / adamw.clock[-1]
    summary = (
        f"Muon comes to {target:.3f}, AdamW's last loss, in {steps:.0%} of its steps and {seconds:.0%} of its time."
    )
    return [*lines, "", summary]


def draw(learners: Sequence[Learner]) -> str:
    """Return an SVG of the loss over time at the best rates, where AdamW's end is 1."""
    pair = [best(learners, name) for name in RATES]
    end = pair[0].clock[-1]
    lines = [
        Line(f"{each.optimizer}, {each.peak:g}", [t / end for t in each.clock][WINDOW:], each.smoothed[WINDOW:])
        for each in pair
    ]
    return chart("Loss on docstrings", f"time (AdamW's {STEPS} steps = 1)", f"loss, mean of {WINDOW} steps", lines)


def write() -> None:
    """Draw the curves and write the table, into the folder in the arguments."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.optimizers")
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    learners = train_all()
    (folder / "optimizers.svg").write_text(draw(learners))
    (folder / "optimizers-table.md").write_text("\n".join(table(learners)) + "\n")
    print("\n".join(table(learners)))


if __name__ == "__main__":
    write()
