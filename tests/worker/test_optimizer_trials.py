"""The benchmark of optimizers: its runs share weights, rows and held-out set, and its tables show their results."""

from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from benchmarks import optimizer_trials, optimizers
from benchmarks.optimizer_trials import ROWS, Result, Trial, UpdateRows, prepare_docstrings, run_trial
from trainyard.contract.parsing import parse_spec
from trainyard.model.config import ModelConfig
from trainyard.worker.data.sampler import StepSampler


def result(name: str, steps: int, *losses: float, seed: int = 1) -> Result:
    curve = [(float(steps - len(losses) + 1 + number), loss) for number, loss in enumerate(losses)]
    return Result(name, seed, steps, curve, 0.1)


def test_a_growing_batch_takes_the_same_rows_in_the_same_order() -> None:
    trial = Trial("growing", 20, first_rows=2)
    sizes = trial.sizes()
    assert sum(sizes) == 20 * ROWS
    assert sizes == sorted(sizes)
    assert {2, 4, ROWS} <= set(sizes)
    growing, equal = UpdateRows(100, ROWS, 7, tuple(sizes)), StepSampler(96, ROWS, 7)
    rows = np.concatenate([growing.rows_of(step) for step in range(1, len(sizes) + 1)])
    assert len(rows) == 20 * ROWS
    assert len(set(rows[:100].tolist())) == 100, "one epoch has every row once"
    same = UpdateRows(96, ROWS, 7, tuple(sizes))
    rows = np.concatenate([same.rows_of(step) for step in range(1, len(sizes) + 1)])
    assert np.array_equal(rows[:96], np.concatenate([equal.rows_of(step) for step in range(1, 96 // ROWS + 1)]))


def test_every_trial_is_a_valid_spec() -> None:
    found = optimizers.trials()
    assert len({trial.name for trial in found}) == len(found)
    for trial in found:
        training = {"recipe": "minimind", **trial.training}
        training = {name: list(value) if isinstance(value, tuple) else value for name, value in training.items()}
        assert parse_spec({"data": {"data_path": "/x"}, "training": training}).problems == ()


def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, losses: dict[int, float]) -> optimizers.Bench:
    """A bench whose runs of a length end with these losses."""

    def run(_data: object, trial: Trial, seed: int, every: int | None) -> Result:
        return result(trial.name, trial.steps, losses[trial.steps], seed=seed)

    monkeypatch.setattr(optimizers, "run_trial", run)
    return optimizers.Bench(tmp_path, None, tmp_path / "results.jsonl")  # type: ignore[arg-type]


@pytest.mark.parametrize("shortest", [40, 50, 100, 110, 230, 240, None])
def test_the_shortest_run_is_found(shortest: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    losses = {steps: 1.0 if shortest is not None and steps >= shortest else 2.0 for steps in optimizers.LENGTHS}
    measured = bench(tmp_path, monkeypatch, losses)
    found = measured.shortest("muon", {}, 1, 1.5)
    assert (found.steps if found else None) == shortest
    stored = measured.results()
    assert len(stored) <= 9
    monkeypatch.setattr(optimizers, "run_trial", None)  # all results are stored: nothing runs again
    again = measured.shortest("muon", {}, 1, 1.5)
    assert (again.steps if again else None) == shortest


def test_tables_and_figure() -> None:
    baseline = [
        result("AdamW", optimizer_trials.STEPS, 3.0, 2.0),
        result("AdamW", optimizer_trials.STEPS, 3.0, 2.2, seed=2),
    ]
    muon = [result("muon", 120, 2.5, 2.0), result("muon", 60, 2.6, 2.1, seed=2)]
    reached = optimizers.Reached("muon", muon, 1.25)
    assert reached.shares == [120 / optimizer_trials.STEPS * 1.25, 60 / optimizer_trials.STEPS * 1.25]
    lines = optimizers.comparison_table(baseline, [reached, optimizers.Reached("other", muon[:1], 1.0)])
    assert "loss 2.100" in lines[2]
    assert lines[3] == f"| muon | 120, 60 | 1.25 x | {90 / optimizer_trials.STEPS * 1.25:.0%} |"
    assert lines[4].endswith("| - |"), "one seed has not reached it"
    drawn = ElementTree.fromstring(optimizers.draw(baseline[0], [reached]))
    assert len([part for part in drawn if part.tag.endswith("polyline")]) == 2
    third = optimizers.THIRD
    trials = [result("a", third, 2.0), result("b", third, 1.75), result("b", third, 1.5, seed=2)]
    assert optimizers.trial_table(trials, ["a", "b"])[2:] == ["| a | 2.0000 | - |", "| b | 1.7500, 1.5000 | -0.2500 |"]
    assert muon[0].reaches(2.5) == 119
    assert muon[0].reaches(1.0) is None


@pytest.mark.long
def test_muon_and_adamw_train_on_the_same_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shape = ModelConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1)
    for name, value in {"ROWS": 2, "LENGTH": 32, "SHAPE": shape, "DOCUMENTS": 400}.items():
        monkeypatch.setattr(optimizer_trials, name, value)
    data = prepare_docstrings(tmp_path)
    still = run_trial(data, Trial("still", 6, {"learning_rate": 1e-9}), 1, 3)
    assert [step for step, _ in still.curve] == [3.0, 6.0]
    muon, growing = (
        run_trial(data, Trial("muon", 6, {"optimizer": "muon", "learning_rate": 1e-2}, first_rows=first), 1, 3)
        for first in (None, 1)
    )
    assert muon.held_out < still.held_out
    assert growing.held_out < still.held_out
    assert muon.step_seconds > 0
