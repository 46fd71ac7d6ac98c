"""A fork continues from its parent's checkpoint: as the same run, or with data and schedule restarted."""

import json
import os
import shutil
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from tests.worker import rank_runner
from trainyard.contract.events import CheckpointSaved, MetricEvent, ResumeVerified, Started
from trainyard.contract.lr_schedule import LRSchedule, lr_at
from trainyard.contract.messages import Fork
from trainyard.contract.run_identity import RunIdentity
from trainyard.contract.rundir import ArtifactDir, RunDir, write_json
from trainyard.contract.status import Reason
from trainyard.worker.checkpoint import files, fork
from trainyard.worker.checkpoint.retention import keep_weights
from trainyard.worker.errors import TrainingError

STEP = 8


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return rank_runner.corpus(tmp_path_factory.mktemp("data") / "corpus.jsonl")


@pytest.fixture(scope="module")
def parent(text: Path, tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    described = rank_runner.spec(text, training={"max_steps": 16}, reporting={"log_interval": 3})
    run = rank_runner.new_run(tmp_path_factory.mktemp("parent") / "run", described)
    assert rank_runner.run_to_end(run).outcome == "completed"
    return run


def forked(parent: RunDir, path: Path, data: Any, weights: bool = False, **changes: dict[str, Any]) -> RunDir:
    """A fork as the service leaves it, before its first attempt."""
    described = json.loads(parent.spec.read_text())
    for group, fields in changes.items():
        described[group] = {**described[group], **fields}
    run = rank_runner.new_run(path, described)
    source = parent.artifacts(None).checkpoint(STEP)
    shutil.copytree(source, run.artifacts(None).origin, copy_function=os.link)
    if weights:
        origin = ArtifactDir(path / "thin")
        origin.checkpoints.mkdir(parents=True)
        keep_weights(origin, STEP, run.artifacts(None).origin)
        shutil.rmtree(run.artifacts(None).origin)
        origin.milestone(STEP).rename(run.artifacts(None).origin)
    write_json(run.fork, Fork(job_id="job_parent", step=STEP, data=data).model_dump(mode="json"))
    return run


def lines(run: RunDir, attempt: int = 1) -> dict[int, tuple[Any, ...]]:
    return {
        step: (m.loss, m.learning_rate, m.grad_norm, m.tokens) for step, m in rank_runner.metrics(run, attempt).items()
    }


@pytest.mark.slow
def test_kept_and_unchanged_it_is_the_parents_run_to_the_last_bit(parent: RunDir, tmp_path: Path) -> None:
    run = forked(parent, tmp_path / "run", "keep")
    assert rank_runner.run_to_end(run).step == 16
    theirs, ours = dict(rank_runner.outputs(parent)), dict(rank_runner.outputs(run))
    assert ours.keys() == theirs.keys() - {"checkpoints/step-00000000/model.safetensors"}
    assert all(theirs[name] == data for name, data in ours.items())
    # The sums since the parent's last line go along: the first line of the fork is the parent's.
    assert lines(run) == {step: line for step, line in lines(parent).items() if step > STEP}
    emitted = rank_runner.events(run)
    assert [e.start_step for e in emitted if isinstance(e, Started)] == [STEP]
    assert [e.difference for e in emitted if isinstance(e, ResumeVerified)] == [0.0]
    assert [e.step for e in emitted if isinstance(e, CheckpointSaved)] == [STEP, 16]
    assert not run.artifacts(None).origin.exists()
    source = parent.artifacts(None).checkpoint(STEP)
    own = run.artifacts(None).checkpoint(STEP)
    for name in ("model.safetensors", "optimizer.safetensors"):
        assert (own / name).stat().st_ino == (source / name).stat().st_ino, "linked, not copied"


@pytest.mark.slow
def test_a_decay_branch_is_the_run_that_would_have_decayed_there(text: Path, tmp_path: Path) -> None:
    """The branch of a stable run has the rates and the weights of one uninterrupted run with that decay."""
    stable = {"lr_scheduler": "constant", "warmup_steps": 2, "max_steps": 100}
    branch = {"lr_scheduler": "wsd", "decay_steps": 4, "decay_fraction": None, "max_steps": STEP + 4}
    reporting = {"log_interval": 1}
    run = rank_runner.new_run(
        tmp_path / "stable", rank_runner.spec(text, training={**stable, "max_steps": STEP}, reporting=reporting)
    )
    assert rank_runner.run_to_end(run).step == STEP
    made = forked(run, tmp_path / "branch", "keep", training={**stable, **branch})
    from tests.worker.test_resume import stop_after

    assert rank_runner.run_to_end(made, 1, partial(stop_after, made, 1, STEP + 2)).step == STEP + 2
    assert rank_runner.run_to_end(made).step == STEP + 4
    whole = rank_runner.new_run(
        tmp_path / "whole", rank_runner.spec(text, training={**stable, **branch}, reporting=reporting)
    )
    assert rank_runner.run_to_end(whole).step == STEP + 4
    rates = {step: m.learning_rate for attempt in (1, 2) for step, m in rank_runner.metrics(made, attempt).items()}
    assert sorted(rates) == [STEP + 1, STEP + 2, STEP + 3, STEP + 4]
    for step, rate in rates.items():
        expected = 5e-3 * (0.1 + 0.9 * (1 - ((step - STEP) / 4) ** 0.5))
        assert rate == pytest.approx(expected, rel=0, abs=1e-12)
    final = f"step-{STEP + 4:08d}/"
    last = {name: data for name, data in rank_runner.outputs(made) if final in name}
    assert last == {name: data for name, data in rank_runner.outputs(whole) if final in name}
    assert len(last) == 2


@pytest.mark.slow
def test_restarted_its_data_and_schedule_begin_anew_and_its_steps_go_on(parent: RunDir, tmp_path: Path) -> None:
    changes: dict[str, Any] = {"training": {"max_steps": 12, "batch_size": 5, "accumulation_steps": 1, "seed": 7}}
    untouched = forked(parent, tmp_path / "untouched", "restart", **changes)
    assert rank_runner.run_to_end(untouched).step == STEP + 12
    emitted = rank_runner.events(untouched)
    begun = next(event for event in emitted if isinstance(event, Started))
    assert (begun.start_step, begun.base_step, begun.steps, begun.global_batch) == (STEP, STEP, STEP + 12, 5)
    rates = {e.step: e.learning_rate for e in emitted if isinstance(e, MetricEvent)}
    assert sorted(rates) == [9, 12, 15, 18, 20]
    assert rates == {step: lr_at(step - STEP, 12, 5e-3) for step in rates}
    epochs = [e.epoch for e in emitted if isinstance(e, MetricEvent)]
    assert epochs == sorted(epochs)
    assert epochs[0] == pytest.approx(5 / begun.samples)
    # The state is that of the fork in every later checkpoint, so an interruption changes nothing.
    broken = forked(parent, tmp_path / "broken", "restart", **changes)
    from tests.worker.test_resume import stop_after

    assert rank_runner.run_to_end(broken, 1, partial(stop_after, broken, 1, STEP + 3)).step == STEP + 3
    assert rank_runner.run_to_end(broken).step == STEP + 12
    final = f"step-{STEP + 12:08d}/"
    last = {name: data for name, data in rank_runner.outputs(untouched) if final in name}
    assert last == {name: data for name, data in rank_runner.outputs(broken) if final in name}
    assert len(last) == 2


def test_a_fork_that_restarts_its_data_has_the_step_size_and_loss_of_a_new_run(parent: RunDir, tmp_path: Path) -> None:
    """The size of its steps is that of all nodes of the range. Only its own losses can reach the target."""
    run = forked(parent, tmp_path / "run", "restart", training={"max_steps": 4}, reporting={"log_interval": 1})
    described = json.loads(run.spec.read_text())
    described["resources"]["nnodes"] = {"min": 1, "max": 2}
    described["limits"] = {"target_loss": 100.0}
    run.spec.write_text(json.dumps(described))
    outcome = rank_runner.run_to_end(run)
    begun = next(event for event in rank_runner.events(run) if isinstance(event, Started))
    assert begun.global_batch == 4 * 2 * 2
    assert (outcome.step, outcome.reason) == (STEP + 1, Reason.LIMIT)


@pytest.mark.slow
def test_weights_alone_begin_with_a_new_optimizer(parent: RunDir, tmp_path: Path) -> None:
    run = forked(parent, tmp_path / "run", "restart", weights=True, training={"max_steps": 2, "optimizer": "muon"})
    assert rank_runner.run_to_end(run).step == STEP + 2
    assert "optimizer_anew" in rank_runner.warned(run)
    kept = forked(parent, tmp_path / "kept", "keep", weights=True)
    failed = rank_runner.run_to_end(kept)
    assert failed.reason == "checkpoint_invalid"
    assert "names too few files" in str(failed.message)


def begin(run: RunDir, said: list[Any], identity: RunIdentity | None = None, **training: Any) -> Path | None:
    """What an attempt of the fork would begin with."""
    from trainyard.contract.spec import JobSpec
    from trainyard.worker.checkpoint.resume import find_resume_point

    described = json.loads(run.spec.read_text())
    spec = JobSpec.model_validate_json(json.dumps({**described, "training": {**described["training"], **training}}))
    artifacts = run.artifacts(None)
    place = artifacts.origin if artifacts.origin.is_dir() else artifacts.checkpoint(STEP)
    identity = identity or files.read_state(place).identity
    found = find_resume_point(spec, run, artifacts, identity, lambda _: False, said.append)
    return found.source if found is not None else None


@pytest.mark.slow
def test_a_crash_between_publishing_and_telling_loses_nothing(parent: RunDir, tmp_path: Path) -> None:
    run, said = forked(parent, tmp_path / "run", "keep"), list[Any]()
    with mock.patch.object(fork, "remove", side_effect=KeyboardInterrupt), pytest.raises(KeyboardInterrupt):
        begin(run, [])
    assert run.artifacts(None).origin.is_dir()
    assert begin(run, said) == run.artifacts(None).checkpoint(STEP)
    assert [event.step for event in said] == [STEP]
    assert not run.artifacts(None).origin.exists()
    said.clear()
    assert begin(run, said) == run.artifacts(None).checkpoint(STEP)
    assert said == []


@pytest.mark.slow
def test_a_fork_never_begins_at_step_0(parent: RunDir, tmp_path: Path) -> None:
    run = forked(parent, tmp_path / "run", "keep")
    state = files.read_state(run.artifacts(None).origin)
    origin = run.artifacts(None).origin
    whole = (origin / "model.safetensors").read_bytes()
    (origin / "model.safetensors").unlink()
    (origin / "model.safetensors").write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(TrainingError, match=r"step 8 of job_parent, where this fork begins.*model.safetensors sha256"):
        begin(run, [])
    shutil.rmtree(origin)
    with pytest.raises(TrainingError, match="nothing is left of it"):
        begin(run, [], state.identity)
    run.fork.write_text("{")
    with pytest.raises(TrainingError, match="cannot be read"):
        begin(run, [], state.identity)


@pytest.mark.slow
def test_what_cannot_be_another_run_is_refused_by_name(parent: RunDir, tmp_path: Path) -> None:
    from dataclasses import replace

    kept, restarted = forked(parent, tmp_path / "kept", "keep"), forked(parent, tmp_path / "restarted", "restart")
    theirs = files.read_state(kept.artifacts(None).origin).identity
    other = replace(theirs, corpus="c" * 64, max_seq_len=16)
    with pytest.raises(TrainingError, match=r"the corpus is another one.*max_seq_len is 16 and was 32"):
        begin(kept, [], other)
    with pytest.raises(TrainingError, match="optimizer is not muon"):
        begin(kept, [], optimizer="muon")
    for wrong in (replace(other, tokenizer="t" * 64), replace(other, model={**theirs.model, "num_hidden_layers": 3})):
        with pytest.raises(TrainingError, match=r"the tokenizer is another one|num_hidden_layers is 3 and was 2"):
            begin(restarted, [], wrong)
    assert begin(restarted, [], replace(other, model={**theirs.model, "dropout": 0.5}))
    state = files.read_state(restarted.artifacts(None).checkpoint(STEP))
    assert (state.step, state.data_offset, state.base_step, state.probe) == (STEP, -STEP, STEP, {})
    assert state.identity.corpus == "c" * 64
    assert state.identity.model["dropout"] == 0.5


def test_the_schedule_is_counted_behind_its_base() -> None:
    rate = LRSchedule(1.0, 0.1, 10, warmup=2, base_step=100)
    assert [rate.at(step) for step in (101, 102, 110)] == pytest.approx([0.5, 1.0, 0.1])
