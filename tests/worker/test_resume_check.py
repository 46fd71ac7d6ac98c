"""The check of a resume: its rows, their score, and the events of the comparison."""

import json
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch.nn import functional as F

from tests.worker import rank_runner
from trainyard.contract.events import ResumeVerified, Started, WarningEvent
from trainyard.contract.rundir import RunDir
from trainyard.contract.spec import JobSpec
from trainyard.worker.data.prepare import TrainingData, prepare_data
from trainyard.worker.distributed import DistributedContext
from trainyard.worker.training.resume_check import ResumeCheck, compare_scores
from trainyard.worker.training.state import TrainState, build_train_state, initial_model

ALONE = DistributedContext(0, 1, 0, 1, torch.device("cpu"))


def material(path: Path, **groups: dict[str, Any]) -> TrainingData:
    text = path / "corpus.jsonl"
    if not text.exists():
        rank_runner.corpus(text)
    described = JobSpec.model_validate_json(json.dumps(rank_runner.spec(text, **groups)))
    return prepare_data(described, RunDir(path), ALONE, lambda _: None, lambda: False)


def train_state(of: TrainingData, seed: int = 1) -> TrainState:
    return build_train_state(initial_model(of.spec.model, seed, ALONE.device), of.spec.training, 0.0, ALONE)


def test_the_rows_depend_on_corpus_and_seed_alone(tmp_path: Path) -> None:
    rows = []
    for training in ({}, {"batch_size": 1, "accumulation_steps": 1}, {"max_steps": 3}, {"seed": 43}):
        of = material(tmp_path, training=training)
        rows.append(ResumeCheck.from_dataset(of.train_set, of.spec.training, ALONE.device).rows.tolist())
    assert len(set(rows[0])) == len(rows[0]) == 4
    assert rows[0] == rows[1] == rows[2] != rows[3]


def test_at_most_four_rows_of_32_positions_are_scored(tmp_path: Path) -> None:
    wide = material(tmp_path, data={"max_seq_len": 600})
    check = ResumeCheck.from_dataset(wide.train_set, wide.spec.training, ALONE.device)
    assert check.batch().input_ids.shape == check.batch().labels.shape == (min(4, len(wide.train_set)), 32)
    few = rank_runner.corpus(tmp_path / "few.jsonl", documents=1)
    tiny = material(tmp_path, data={"data_path": str(few)})
    assert len(ResumeCheck.from_dataset(tiny.train_set, tiny.spec.training, ALONE.device).rows) == len(tiny.train_set)


def test_the_score_is_the_mean_loss_of_those_rows_without_dropout(tmp_path: Path) -> None:
    of = material(tmp_path, model={"dropout": 0.5}, training={"dtype": "float32"})
    check, student = ResumeCheck.from_dataset(of.train_set, of.spec.training, ALONE.device), train_state(of)
    student.model.train()
    scored = check.score(student)
    assert student.model.training
    assert scored == check.score(student)
    batch = check.batch()
    student.model.eval()
    with torch.no_grad():
        logits = student.model(
            batch.input_ids, position_ids=batch.position_ids, segment_ids=batch.segment_ids, logits=True
        ).logits
    expected = F.cross_entropy(logits.flatten(0, 1), batch.labels.flatten(), ignore_index=-100).item()
    assert scored == {"loss": pytest.approx(expected, abs=1e-5), "dtype": "float32"}
    assert check.score(train_state(of, seed=2)) != scored
    with torch.no_grad():
        student.model.model.norm.weight[0] = float("nan")
    assert check.score(student) == {}


def test_the_events_of_a_comparison() -> None:
    assert compare_scores(3, {}, {"loss": 1.0, "dtype": "float32"}) == []
    (proof,) = compare_scores(3, {"loss": 2.0, "dtype": "float32"}, {"loss": 2.0, "dtype": "float32"})
    assert isinstance(proof, ResumeVerified)
    assert (proof.step, proof.expected, proof.found, proof.difference) == (3, 2.0, 2.0, 0.0)
    within = compare_scores(3, {"loss": 2.0, "dtype": "bfloat16"}, {"loss": 2.009, "dtype": "bfloat16"})
    assert [event.kind for event in within] == ["resume_verified"]
    # If the dtype has changed, the larger of both tolerances counts.
    assert len(compare_scores(3, {"loss": 2.0, "dtype": "bfloat16"}, {"loss": 2.009, "dtype": "float32"})) == 1
    doubt = compare_scores(3, {"loss": 2.0, "dtype": "float32"}, {"loss": 2.009, "dtype": "float32"})
    assert isinstance(doubt[1], WarningEvent)
    assert (doubt[1].code, doubt[1].step) == ("resume_differs", 3)
    assert "scores 2.009000 on the rows on which it scored 2.000000" in doubt[1].message
    gone = compare_scores(3, {"loss": 2.0, "dtype": "float32"}, {})
    assert isinstance(gone[0], ResumeVerified)
    assert (gone[0].found, gone[0].difference) == (None, None)
    assert isinstance(gone[1], WarningEvent)
    assert "scores no finite number" in gone[1].message


RUNS: dict[str, tuple[int, dict[str, dict[str, Any]]]] = {
    "dense bf16 dropout": (1, {"model": {"dropout": 0.1}}),
    "moe fp16": (1, {"model": {"use_moe": True, "moe_intermediate_size": 32}, "training": {"dtype": "float16"}}),
    "two ranks": (2, {}),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_on_the_same_hardware_the_difference_is_0(name: str, tmp_path: Path) -> None:
    world, changes = RUNS[name]
    text = rank_runner.corpus(tmp_path / "corpus.jsonl")
    changes = {**changes, "training": {"max_steps": 3, **changes.get("training", {})}}
    run = rank_runner.new_run(tmp_path / "run", rank_runner.spec(text, **changes))
    assert rank_runner.run_to_end(run, world).outcome == "completed"
    described = json.loads(run.spec.read_text())
    run.spec.write_text(json.dumps({**described, "training": {**described["training"], "max_steps": 5}}))
    assert rank_runner.run_to_end(run, world).step == 5
    assert [event for event in rank_runner.events(run) if isinstance(event, ResumeVerified)] == []
    found = rank_runner.events(run, 2)
    (proof,) = [event for event in found if isinstance(event, ResumeVerified)]
    state = json.loads((run.artifacts(None).checkpoint(3) / "state.json").read_bytes())
    assert (proof.step, proof.expected, proof.difference) == (3, state["probe"]["loss"], 0.0)
    assert isinstance(found[found.index(proof) - 1], Started)
    assert "resume_differs" not in rank_runner.warned(run, 2)


def wrong_weights() -> None:
    """Change the weights after they are loaded, which no checksum finds."""
    load = TrainState.load

    def skewed(self: TrainState, path: Path) -> Any:
        state = load(self, path)
        with torch.no_grad():
            self.model.model.norm.weight.mul_(1.5)
        return state

    mock.patch.object(TrainState, "load", skewed).start()


@pytest.mark.slow
def test_a_resume_with_other_weights_gives_a_warning_with_both_losses(tmp_path: Path) -> None:
    text = rank_runner.corpus(tmp_path / "corpus.jsonl")
    run = rank_runner.new_run(tmp_path / "run", rank_runner.spec(text, training={"max_steps": 3}))
    rank_runner.run_to_end(run)
    assert rank_runner.run_to_end(run, patch=wrong_weights).outcome == "completed"
    warning = rank_runner.warned(run, 2)["resume_differs"]
    assert f"{warning.data['expected']:.6f}" in warning.message
    assert f"{warning.data['found']:.6f}" in warning.message
    assert abs(warning.data["difference"]) > 0.01
