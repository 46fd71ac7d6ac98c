"""The length of a run and its learning rates: max_tokens, and every schedule over resume, fork and changed settings."""

import json
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file

from tests.worker import rank_runner
from tests.worker.test_fork import STEP, forked
from tests.worker.test_resume import stop_after
from trainyard.contract.events import Started, WarningEvent
from trainyard.contract.lr_schedule import LRSchedule
from trainyard.contract.messages import RunSettings
from trainyard.contract.parsing import parse_spec
from trainyard.contract.rundir import RunDir, write_json
from trainyard.contract.spec import TrainingSpec
from trainyard.worker.attempt import StepHeartbeat
from trainyard.worker.data.prepare import prepare_data
from trainyard.worker.distributed import DistributedContext
from trainyard.worker.training.state import initial_model

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return rank_runner.corpus(tmp_path_factory.mktemp("data") / "corpus.jsonl")


def change(run: RunDir, **training: Any) -> None:
    """Change the spec as a resume does."""
    described = json.loads(run.spec.read_text())
    described["training"] |= training
    run.spec.write_text(json.dumps(described))


def started(run: RunDir, attempt: int = 1) -> Started:
    return next(event for event in rank_runner.events(run, attempt) if isinstance(event, Started))


def trained_tokens(run: RunDir) -> dict[int, int]:
    return {step: point[2] for step, point in rank_runner.curve(run).items()}


@pytest.mark.parametrize("weights", [None, pytest.param((0.7, 0.3), marks=pytest.mark.long)])
def test_max_tokens_ends_with_the_first_step_at_or_after_it(
    weights: tuple[float, float] | None, text: Path, tmp_path: Path
) -> None:
    """Also over a pause and a resume with more tokens, which leave the weights of an uninterrupted run."""
    training = {"max_steps": None, "lr_scheduler": "constant"}
    described = rank_runner.spec(text, training=training, reporting={"log_interval": 1})
    if weights is not None:
        other = rank_runner.corpus(tmp_path / "other.jsonl", documents=9, seed=1)
        sources: list[dict[str, Any]] = [
            {"name": name, "path": str(path)} for name, path in (("one", text), ("two", other))
        ]
        for source, weight in zip(sources, weights, strict=True):
            source["weight"] = weight
        described["data"] = {"sources": sources, "max_seq_len": 32}
    first, more = 1500, 3210
    run, whole = (rank_runner.new_run(tmp_path / name, described) for name in ("run", "whole"))
    change(run, max_tokens=first)
    assert rank_runner.run_to_end(run, 1, partial(stop_after, run, 1, 3)).outcome == "stopped"
    assert rank_runner.run_to_end(run).outcome == "completed"
    tokens = trained_tokens(run)
    last = max(tokens)
    assert tokens[last - 1] < first <= tokens[last]
    assert [started(run, attempt).steps for attempt in (1, 2)] == [last, last]
    change(run, max_tokens=more)
    assert rank_runner.run_to_end(run).outcome == "completed"
    change(whole, max_tokens=more)
    assert rank_runner.run_to_end(whole).outcome == "completed"
    tokens = trained_tokens(run)
    assert tokens == trained_tokens(whole)
    end = max(tokens)
    assert last < end == started(run, 3).steps
    assert tokens[end - 1] < more <= tokens[end]
    final = {name: data for name, data in rank_runner.outputs(whole) if f"{end:08d}" in name}
    assert len(final) == 2
    assert final == {name: data for name, data in rank_runner.outputs(run) if name in final}


def test_a_fork_with_restarted_data_counts_its_own_tokens(text: Path, tmp_path: Path) -> None:
    parent = rank_runner.new_run(tmp_path / "parent", rank_runner.spec(text, training={"max_steps": STEP}))
    rank_runner.run_to_end(parent)
    child = forked(parent, tmp_path / "child", "restart", training={"max_steps": None, "max_tokens": 900})
    change(child, max_steps=None)
    rank_runner.run_to_end(child, 1, partial(stop_after, child, 1, STEP + 1))
    rank_runner.run_to_end(child)
    begun = started(child, 2)
    assert begun.base_tokens == rank_runner.metrics(parent)[STEP].tokens
    ends = rank_runner.metrics(child, 2)[begun.steps].tokens - begun.base_tokens
    assert 900 <= ends < 900 + begun.global_batch * 31
    assert begun.steps == started(child).steps


def test_skipped_data_of_a_rollback_is_not_counted(text: Path, tmp_path: Path) -> None:
    described = rank_runner.spec(text, training={"max_steps": None, "max_tokens": 2500, "on_nonfinite": "rollback"})
    described["reporting"]["log_interval"] = 1
    run = rank_runner.new_run(tmp_path / "run", described)
    assert rank_runner.run_to_end(run, 1, partial(break_step, 6)).outcome == "completed"
    told = next(e for e in rank_runner.events(run) if isinstance(e, WarningEvent) and e.code == "rolled_back")
    lines = rank_runner.metrics(run)
    last = max(lines)
    assert lines[last - 1].tokens < 2500 <= lines[last].tokens
    assert told.data["steps"] == last


def break_step(step: int) -> None:
    """Make the gradient of one step infinite, once."""
    from trainyard.worker.train import Trainer

    broken: list[int] = []
    train_step = Trainer.train_step

    def with_infinity(self: Trainer, progress: Any) -> Any:
        if progress.step + 1 != step or broken:
            return train_step(self, progress)
        broken.append(step)
        parameter: Any = next(self.state.model.parameters())
        hook = parameter.register_hook(lambda gradient: gradient * math.inf)
        try:
            return train_step(self, progress)
        finally:
            hook.remove()

    mock.patch.object(Trainer, "train_step", with_infinity).start()


SHAPES: dict[str, Callable[[float], float]] = {
    "cosine": lambda done: (1 + math.cos(math.pi * done)) / 2,
    "linear": lambda done: 1 - done,
    "sqrt": lambda done: 1 - math.sqrt(done),
}


def formula(step: int, steps: int, kind: str, *, start: float = 1.0, begin: int = 0, warmup: int = 2) -> float:
    """Return the rate after ``begin``, where it was ``start``, of a run that ends at ``steps``: 1 is the peak."""
    if kind == "constant":
        return step / warmup if step < warmup else 1.0
    if begin == 0 and step < warmup:
        return step / warmup
    first = begin or warmup
    if kind == "wsd" and begin == 0:
        first = max(warmup, steps - round(0.5 * steps))
    done = max(0.0, (step - first) / (steps - first))
    return 0.1 + (start - 0.1) * SHAPES["sqrt" if kind == "wsd" else kind](done)


@pytest.mark.parametrize("kind", ["cosine", "linear", "constant", "wsd"])
def test_the_rates_are_those_of_the_formula_over_resume_fork_and_changed_settings(
    kind: str, text: Path, tmp_path: Path
) -> None:
    """12 steps are planned; paused after 9, 16 are planned, then 20 that continue the decay from step 12."""
    peak, own = 5e-3, {"lr_scheduler": kind, "warmup_steps": 2, "decay_fraction": 0.5}
    described = rank_runner.spec(
        text, training={"max_steps": 12, **own}, checkpoint={"save_interval": STEP, "keep_last": 50}
    )
    run = rank_runner.new_run(tmp_path / "run", described)
    run_and_change = partial(stop_and_change, run, 5, 9)
    assert rank_runner.run_to_end(run, 1, run_and_change).step == 9
    change(run, max_steps=16)
    run.spec.write_text(json.dumps({**json.loads(run.spec.read_text()), "reporting": {"log_interval": 1}}))
    assert rank_runner.run_to_end(run, 1, partial(stop_after, run, 2, 12)).step == 12
    planned = LRSchedule.from_spec(TrainingSpec.model_validate({"max_steps": 16, **own}), 16)
    change(run, max_steps=20, continued_at=planned.continuations(12))
    assert rank_runner.run_to_end(run).step == 20
    lengths = {1: (range(1, 10), 12, 0), 2: (range(10, 13), 16, 0), 3: (range(13, 21), 20, 12)}
    for attempt, (steps, length, begin) in lengths.items():
        there = formula(12, 16, kind)
        lines = rank_runner.metrics(run, attempt)
        assert set(lines) <= set(steps)
        assert len(lines) >= 3
        for step, line in lines.items():
            expected = peak * formula(step, length, kind, start=there if begin else 1.0, begin=begin)
            assert line.learning_rate == pytest.approx(expected, rel=0, abs=1e-12), (attempt, step)
    child = forked(run, tmp_path / "child", "restart", training={"max_steps": 10, "continued_at": []})
    rank_runner.run_to_end(child)
    for step, line in rank_runner.metrics(child).items():
        expected = peak * formula(step - STEP, 10, kind)
        assert line.learning_rate == pytest.approx(expected, rel=0, abs=1e-12), step


def stop_and_change(run: RunDir, change_at: int, stop_at: int) -> None:
    stop_after(run, 1, stop_at)
    beat = StepHeartbeat.beat

    def request_at(self: StepHeartbeat, done: int) -> None:
        beat(self, done)
        if done == change_at:
            settings = RunSettings(log_interval=1, save_interval=STEP, keep_last=50)
            write_json(run.attempt(1).settings, settings.model_dump())

    mock.patch.object(StepHeartbeat, "beat", request_at).start()


def test_a_decay_branch_has_the_weights_of_an_independent_loop(text: Path, tmp_path: Path) -> None:
    """The loop is plain PyTorch over the same rows: no trainer, no schedule, no checkpoint, no fork."""
    stable = {"lr_scheduler": "constant", "warmup_steps": 2, "max_steps": STEP, "dtype": "float32"}
    run = rank_runner.new_run(tmp_path / "stable", rank_runner.spec(text, training=stable))
    rank_runner.run_to_end(run)
    decay, length = {"lr_scheduler": "wsd", "decay_steps": 6, "decay_fraction": None}, STEP + 6
    branch = forked(run, tmp_path / "branch", "keep", training={**stable, **decay, "max_steps": length})
    assert rank_runner.run_to_end(branch).step == length
    trained = load_file(branch.artifacts(None).checkpoint(length) / "model.safetensors")

    spec = parse_spec(json.loads(branch.spec.read_text())).spec
    one = DistributedContext(0, 1, 0, 1, torch.device("cpu"))
    data = prepare_data(spec, RunDir(tmp_path / "loop"), one, lambda _: None, lambda: False)
    model = initial_model(data.spec.model, spec.training.seed, torch.device("cpu")).train()
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.999), weight_decay=0.01, fused=True)
    sampler = data.sampler(8, spec.training.seed)
    for step in range(1, length + 1):
        rate = 5e-3 * (step / 2 if step < 2 else 1.0)
        if step > STEP:
            rate = 5e-3 * (0.1 + 0.9 * (1 - math.sqrt((step - STEP) / 6)))
        rows = sampler.rows_of(step)
        tokens = int(data.train_set.targets_of(rows).sum())
        for part in (rows[:4], rows[4:]):
            if len(part):
                batch = data.train_set.batch(part)
                output = model(
                    batch.input_ids,
                    position_ids=batch.position_ids,
                    segment_ids=batch.segment_ids,
                    offsets=batch.offsets,
                    labels=batch.labels,
                )
                (output.loss_sum * (1 / tokens)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        optimizer.zero_grad()
    own = model.state_dict()
    assert {name for name in trained if not torch.equal(trained[name], own[name])} == set()
