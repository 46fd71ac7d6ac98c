"""AdamW against Muon on the demo's corpus: the loss by step and by time, and what it takes to come as far as AdamW.

All learn the same rows side by side, a step of each in turn, so that a slow minute of the machine hits all alike.
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
from trainyard.contract.rundir import RunDir
from trainyard.contract.spec import JobSpec, TrainingSpec
from trainyard.model.config import ModelConfig
from trainyard.worker.data.loader import MicroBatchLoader
from trainyard.worker.data.prepare import TrainingData, prepare_data
from trainyard.worker.data.sampler import StepSampler
from trainyard.worker.distributed import DistributedContext
from trainyard.worker.training.evaluate import Evaluator
from trainyard.worker.training.schedule import LRSchedule
from trainyard.worker.training.state import TrainState, build_train_state, initial_model

STEPS, ROWS, LENGTH, DOCUMENTS = 200, 8, 256, 100_000
SHAPE = ModelConfig(hidden_size=128, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2)
RATES = {"adamw": (1e-3, 2e-3, 4e-3), "muon": (5e-3, 1e-2, 2e-2)}
"""Each optimizer is held against the other at the best of its own."""

WINDOW = 20
"""Steps whose mean loss counts as the loss of the last of them."""


@dataclass
class Learner:
    """One optimizer at one rate, and what it has come to."""

    optimizer: str
    peak: float
    trainee: TrainState
    rate: LRSchedule
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    held_out: float = float("nan")

    def learn(self, feed: MicroBatchLoader, step: int) -> None:
        """One step."""
        began = time.perf_counter()
        result = self.trainee.train_step.run(feed.microbatches(step), self.rate.at(step), lambda _: None).read()
        self.seconds.append(time.perf_counter() - began)
        self.losses.append(result.loss)

    @property
    def smooth(self) -> list[float]:
        """The mean loss of each step and those before it."""
        return [statistics.fmean(self.losses[max(0, end - WINDOW) : end]) for end in range(1, len(self.losses) + 1)]

    @property
    def clock(self) -> list[float]:
        """Seconds until the end of each step. Each takes the median step's: what else the machine did is left out."""
        return [number * statistics.median(self.seconds) for number in range(1, len(self.seconds) + 1)]

    def reaches(self, loss: float) -> int | None:
        """The first step, behind the first window, whose smooth loss is no higher."""
        return next((step for step, found in enumerate(self.smooth, 1) if step >= WINDOW and found <= loss), None)


def main() -> None:
    """Print the table."""
    print("\n".join(table(measured())))


def measured() -> list[Learner]:
    """Every optimizer at every rate, once through."""
    with tempfile.TemporaryDirectory() as folder:
        ranks = DistributedContext(0, 1, 0, 1, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
        material = docstrings(Path(folder), ranks)
        learners = [learner(material, name, rate, ranks) for name, rates in RATES.items() for rate in rates]
        order = StepSampler(material.train_set.targets, ROWS, 1)
        feeds = [MicroBatchLoader(material.train_set, order, ranks, ROWS, "global_tokens") for _ in learners]
        for step in range(1, STEPS + 1):
            for each, feed in zip(learners, feeds, strict=True):
                each.learn(feed, step)
        assert material.eval_set is not None
        for each in learners:
            each.held_out = Evaluator(material.eval_set, ranks, ROWS).loss(each.trainee) or float("nan")
    return learners


def docstrings(folder: Path, ranks: DistributedContext) -> TrainingData:
    """All docstrings of the standard library, a twentieth of them held out."""
    write_docstrings(folder / "corpus.jsonl", DOCUMENTS)
    data = {"data_path": str(folder / "corpus.jsonl"), "max_seq_len": LENGTH, "eval_fraction": 0.05}
    return prepare_data(
        JobSpec.model_validate({"data": data, "model": SHAPE}), RunDir(folder), ranks, ignore, lambda: False
    )


def ignore(_: object) -> None:
    """What is told on the way is of no interest here."""


def learner(material: TrainingData, optimizer: str, rate: float, ranks: DistributedContext) -> Learner:
    """One that begins with the same weights as all others."""
    asked = {"optimizer": optimizer, "learning_rate": rate, "warmup_steps": STEPS // 20}
    training = TrainingSpec.model_validate(asked)
    trainee = build_train_state(initial_model(material.spec.model, 1, ranks.device), training, 0.0, ranks)
    trainee.model.train()
    return Learner(optimizer, rate, trainee, LRSchedule.from_spec(training, STEPS))


def best(learners: Sequence[Learner], optimizer: str) -> Learner:
    """The one of this optimizer that ends lowest on held-out text."""
    return min((each for each in learners if each.optimizer == optimizer), key=lambda each: each.held_out)


def table(learners: Sequence[Learner]) -> list[str]:
    """As Markdown, and a sentence below it."""
    adamw, muon = best(learners, "adamw"), best(learners, "muon")
    target = adamw.smooth[-1]
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
    said = f"Muon comes to {target:.3f}, AdamW's last loss, in {steps:.0%} of its steps and {seconds:.0%} of its time."
    return [*lines, "", said]


def drawn(learners: Sequence[Learner]) -> str:
    """Both at their best, as an SVG: the loss over time, where AdamW's end is 1."""
    pair = [best(learners, name) for name in RATES]
    end = pair[0].clock[-1]
    lines = [
        Line(f"{each.optimizer}, {each.peak:g}", [t / end for t in each.clock][WINDOW:], each.smooth[WINDOW:])
        for each in pair
    ]
    return chart("Loss on docstrings", f"time (AdamW's {STEPS} steps = 1)", f"loss, mean of {WINDOW} steps", lines)


def write() -> None:
    """Draw the curves and write the table into the folder of the arguments."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.optimizers")
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    learners = measured()
    (folder / "optimizers.svg").write_text(drawn(learners))
    (folder / "optimizers-table.md").write_text("\n".join(table(learners)) + "\n")
    print("\n".join(table(learners)))


if __name__ == "__main__":
    write()
