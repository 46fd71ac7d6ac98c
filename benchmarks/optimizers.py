"""How long Muon and `recipe: fast` take to the held-out loss that Hugging Face's Trainer with AdamW ends with.

docs/experiments.md has the protocol. The default is the comparison with one seed; ``--seeds 3 --trials all`` repeats
all of it. Without transformers, our AdamW replaces Trainer's: the same model and update, but our loop's time.
"""

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.drawing import Line, chart
from benchmarks.optimizer_trials import SHAPE, STEPS, Result, Trial, prepare_docstrings, run_trial
from trainyard.contract.recipes import fill_recipe
from trainyard.worker.data.prepare import TrainingData

RATES = (2e-3, 4e-3, 8e-3, 16e-3, 32e-3)
"""Learning rates of the baseline; the best one counts."""

THIRD = STEPS // 3
"""Steps of a trial."""

LENGTHS = tuple(range(20, STEPS + 1, 5))
"""Lengths of a run of which the shortest that reaches the baseline's loss is sought."""

EVERY = 25

MUON: dict[str, Any] = {"optimizer": "muon", "learning_rate": 2e-2, "warmup_steps": THIRD // 20}
"""Muon as it was before the recipe: the rate with which it was best, a cosine, and a short warm-up."""

DECAYED: dict[str, Any] = {**MUON, "lr_scheduler": "wsd", "min_lr_ratio": 0.0}


def fast() -> dict[str, Any]:
    """Return what ``recipe: fast`` fills in."""
    spec = {"training": {"recipe": "fast"}, "model": {"hidden_size": SHAPE.hidden_size}}
    filled: dict[str, Any] = fill_recipe(spec)["training"]
    return filled


def trials() -> list[Trial]:
    """Return each idea alone, on top of the first trial, and all that were kept together."""
    ideas: dict[str, dict[str, Any]] = {
        "muon": {},
        "rate 0.01": {"learning_rate": 1e-2},
        "rate 0.04": {"learning_rate": 4e-2},
        "zero projections": {"zero_init_projections": True},
        "wsd to 0, linear over half": {**DECAYED, "decay_fraction": 0.5, "decay_shape": "linear"},
        "embedding x 0.5": {"embedding_lr_multiplier": 0.5},
        "embedding x 2": {"embedding_lr_multiplier": 2.0},
        "norms x 0.5": {"norm_lr_multiplier": 0.5},
        "weight decay 0.1, cautious": {"weight_decay": 0.1, "cautious_weight_decay": True},
        "weight decay 0.1, cautious, decaying": {
            "weight_decay": 0.1,
            "cautious_weight_decay": True,
            "weight_decay_schedule": "learning_rate",
        },
        "weight decay 0.1": {"weight_decay": 0.1},
        "betas 0.9, 0.95": {"betas": (0.9, 0.95)},
    }
    found = [Trial(name, THIRD, {**MUON, **changes}) for name, changes in ideas.items()]
    together: dict[str, dict[str, Any]] = {
        "recipe fast": {},
        "recipe fast, embedding x 2": {"embedding_lr_multiplier": 2.0},
        "recipe fast, zero projections": {"zero_init_projections": True},
    }
    found.append(Trial("batch from 4", THIRD, MUON, first_rows=4))
    return [*found, *(Trial(name, THIRD, {**fast(), **changes}) for name, changes in together.items())]


@dataclass(frozen=True)
class Bench:
    """Runs trials, and keeps their results in a file, so that none is repeated. ``folder``: of the corpus."""

    folder: Path
    data: TrainingData
    file: Path

    def result(self, name: str, seed: int, steps: int, run: Callable[[], Result]) -> Result:
        """Return the stored result of this run, or run it and store its result."""
        for each in self.results():
            if (each.name, each.seed, each.steps) == (name, seed, steps):
                return each
        found = run()
        print(f"{name}, seed {seed}: {found.held_out:.4f} after {steps} steps", flush=True)
        with self.file.open("a") as file:
            file.write(json.dumps(found.as_json()) + "\n")
        return found

    def results(self) -> list[Result]:
        lines = self.file.read_text().splitlines() if self.file.exists() else []
        return [Result(**json.loads(line)) for line in lines]

    def trial(self, trial: Trial, seed: int, every: int | None = None) -> Result:
        return self.result(trial.name, seed, trial.steps, lambda: run_trial(self.data, trial, seed, every))

    def baselines(self, runs: Sequence[tuple[int, float]]) -> list[Result]:
        """Return the results of Trainer's AdamW, or of ours without transformers, for each (seed, learning rate)."""
        if not has_trainer():
            fields = {"min_lr_ratio": 0.0, "warmup_steps": STEPS // 20, "weight_decay": 0.0}
            named = [(Trial(_named(rate), STEPS, {**fields, "learning_rate": rate}), seed) for seed, rate in runs]
            return [self.trial(trial, seed, EVERY) for trial, seed in named]
        stored = {(each.name, each.seed) for each in self.results() if each.steps == STEPS}
        missing = [(seed, rate) for seed, rate in runs if (_named(rate), seed) not in stored]
        measured = iter(self.trainer(missing) if missing else [])

        def next_result(seed: int, rate: float) -> Result:
            found = next(measured)
            return Result(_named(rate), seed, STEPS, found["curve"], found["step_seconds"], {"learning_rate": rate})

        return [self.result(_named(rate), seed, STEPS, partial(next_result, seed, rate)) for seed, rate in runs]

    def best_baseline(self, seeds: Iterable[int]) -> list[Result]:
        """Return the results of all seeds with the rate that is best for the first seed."""
        first, *others = seeds
        runs = self.baselines([(first, rate) for rate in RATES])
        best = min(range(len(RATES)), key=lambda number: runs[number].held_out)
        return [runs[best], *self.baselines([(seed, RATES[best]) for seed in others])]

    def trainer(self, runs: Sequence[tuple[int, float]], fields: Sequence[dict[str, Any]] = ()) -> list[dict[str, Any]]:
        """Return what `optimizer_trainer` measures."""
        command = [sys.executable, "-m", "benchmarks.optimizer_trainer", str(self.folder), json.dumps(runs)]
        command += [json.dumps(fields)] if fields else []
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
        return [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"curve"')]

    def shortest(self, name: str, training: dict[str, Any], seed: int, target: float) -> Result | None:
        """Return the shortest run of `LENGTHS` that ends with a held-out loss of at most ``target``, by bisection."""
        low, high, found = 0, len(LENGTHS), None
        while low < high:
            # Until one is long enough, lengths grow: short runs cost little.
            middle = (low + high) // 2 if found else min(max(6, 2 * low), high - 1)
            result = self.trial(Trial(name, LENGTHS[middle], training), seed, EVERY)
            if result.held_out <= target:
                high, found = middle, result
            else:
                low = middle + 1
        return found


def has_trainer() -> bool:
    return all(importlib.util.find_spec(name) is not None for name in ("transformers", "accelerate"))


def _named(rate: float) -> str:
    owner = "Trainer's AdamW" if has_trainer() else "AdamW"
    return f"{owner}, {rate:g}"


@dataclass(frozen=True)
class Reached:
    """The shortest runs of one optimizer with the baseline's loss, one per seed.

    ``slower``: CPU time of a step, divided by the baseline's.
    """

    name: str
    runs: list[Result]
    slower: float

    @property
    def shares(self) -> list[float]:
        """Share of the baseline's time."""
        return [run.steps / STEPS * self.slower for run in self.runs]


def compare(bench: Bench, seeds: Sequence[int]) -> tuple[list[Result], list[Reached]]:
    """Return the baseline of each seed, and what Muon and the recipe need to its last loss."""
    baseline = bench.best_baseline(seeds)
    compared = {"muon": MUON, "recipe fast": fast()}
    ratios = step_ratios(bench, list(compared.values()))
    found = []
    for (name, training), slower in zip(compared.items(), ratios, strict=True):
        runs = [bench.shortest(name, training, each.seed, each.held_out) for each in baseline]
        found.append(Reached(name, [run for run in runs if run is not None], slower))
    return baseline, found


def step_ratios(bench: Bench, settings: list[dict[str, Any]]) -> list[float]:
    """Return the CPU time of a step with each of ``settings``, divided by the baseline's."""
    if has_trainer():
        [measured] = bench.trainer([(1, RATES[0])], settings)
        return [seconds / measured["step_seconds"] for seconds in measured["own_step_seconds"]]
    seconds = [run_trial(bench.data, Trial("timed", 20, each), 1).step_seconds for each in [{}, *settings]]
    return [own / seconds[0] for own in seconds[1:]]


def comparison_table(baseline: Sequence[Result], found: Sequence[Reached]) -> list[str]:
    """Return the comparison as a Markdown table."""
    target = statistics.fmean(each.held_out for each in baseline)
    lines = ["| run | steps to the baseline's last loss | time per step | share of the baseline's time |"]
    lines += ["|---|---|---|---|", f"| {baseline[0].name} (loss {target:.3f}) | {STEPS} | 1.00 x | 100% |"]
    for each in found:
        steps = ", ".join(str(run.steps) for run in each.runs) or "-"
        share = f"{statistics.fmean(each.shares):.0%}" if len(each.runs) == len(baseline) else "-"
        lines.append(f"| {each.name} | {steps} | {each.slower:.2f} x | {share} |")
    return lines


def trial_table(results: Sequence[Result], names: Sequence[str]) -> list[str]:
    """Return the held-out losses of all trials as a Markdown table, with the mean difference from the first one."""
    by_name = {
        name: {each.seed: each for each in results if each.name == name and each.steps == THIRD} for name in names
    }
    first = by_name[names[0]]
    lines = [f"| trial | held-out loss after {THIRD} steps, by seed | difference from {names[0]} |", "|---|---|---|"]
    for name, runs in by_name.items():
        losses = ", ".join(f"{runs[seed].held_out:.4f}" for seed in sorted(runs))
        shared = [runs[seed].held_out - first[seed].held_out for seed in runs if seed in first]
        difference = f"{statistics.fmean(shared):+.4f}" if shared and name != names[0] else "-"
        lines.append(f"| {name} | {losses} | {difference} |")
    return lines


def draw(baseline: Result, found: Sequence[Reached]) -> str:
    """Return an SVG of the held-out losses over time, with the baseline's end at 1."""
    runs = [(baseline, 1.0), *((each.runs[0], each.slower) for each in found if each.runs)]
    lines = [
        Line(run.name, [step / STEPS * slower for step, _ in run.curve], [loss for _, loss in run.curve])
        for run, slower in runs
    ]
    return chart("Held-out loss on docstrings", f"time ({STEPS} steps of {baseline.name} = 1)", "held-out loss", lines)


def main(arguments: Sequence[str] = ()) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks --only optimizers", description=__doc__)
    parser.add_argument("--seeds", type=int, default=1, help="number of seeds")
    parser.add_argument("--trials", default="", help='names separated by semicolons, or "all": run these as well')
    parser.add_argument("--folder", type=Path, help="keep corpus, results and figure here, and continue from them")
    options = parser.parse_args(arguments)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with tempfile.TemporaryDirectory() as temporary:
            folder = options.folder or Path(temporary)
            folder.mkdir(parents=True, exist_ok=True)
            _run(folder, range(1, options.seeds + 1), options.trials)
    finally:
        torch.set_num_threads(threads)


def _run(folder: Path, seeds: Sequence[int], wanted: str) -> None:
    bench = Bench(folder, prepare_docstrings(folder), folder / "results.jsonl")
    chosen = [trial for trial in trials() if wanted == "all" or trial.name in wanted.split(";")]
    for trial in chosen:
        for seed in seeds:
            bench.trial(trial, seed)
    if chosen:
        print("\n".join(trial_table(bench.results(), [trial.name for trial in chosen])), flush=True)
    baseline, found = compare(bench, seeds)
    print("\n".join(comparison_table(baseline, found)))
    figure = folder / "optimizers.svg"
    figure.write_text(draw(baseline[0], found))
    print(figure)


if __name__ == "__main__":
    main(sys.argv[1:])
