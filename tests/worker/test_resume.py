"""An interrupted run and an uninterrupted one leave the same bytes and the same curve."""

import json
import random
import shutil
import signal
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from tests.worker import rank_runner
from trainyard.contract.events import CheckpointRemoved, PhaseChanged, Started
from trainyard.contract.file_identity import FileFingerprint
from trainyard.contract.rundir import RunDir
from trainyard.contract.tokenizer_info import fingerprint_of
from trainyard.service.errors import CheckpointMismatch
from trainyard.service.jobs.resume_compat import ResumeCandidate, check_compatible
from trainyard.service.settings import Settings

pytestmark = pytest.mark.slow

SEED = 20240611
MOE = {"use_moe": True, "num_experts": 4, "moe_intermediate_size": 32, "router_aux_loss_coef": 0.05}

RUNS: dict[str, tuple[int, dict[str, dict[str, Any]]]] = {
    "dense bf16 dropout": (1, {"model": {"dropout": 0.1}}),
    "moe bf16 dropout": (1, {"model": {"dropout": 0.1, **MOE}}),
    "dense fp16": (1, {"training": {"dtype": "float16", "max_steps": 16}, "checkpoint": {"save_interval": 4}}),
    "two ranks dense bf16 dropout": (2, {"model": {"dropout": 0.1}, "data": {"packing": "none"}}),
    "two ranks moe": (2, {"model": MOE, "training": {"max_steps": 12}, "checkpoint": {"save_interval": 5}}),
    "two ranks muon": (2, {"training": {"optimizer": "muon", "max_steps": 12}, "checkpoint": {"save_interval": 5}}),
    "three ranks uneven": (3, {"training": {"batch_size": 3, "accumulation_steps": 1, "max_steps": 12}}),
}
SHORT = ("moe bf16 dropout", "two ranks dense bf16 dropout")
"""The runs of `make test`; the others are in `make test-long`."""


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return rank_runner.corpus(tmp_path_factory.mktemp("data") / "corpus.jsonl")


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in SHORT else pytest.mark.long) for n in RUNS])
def test_stopped_and_killed_at_random_steps_it_is_the_same_run(name: str, text: Path, tmp_path: Path) -> None:
    world, changes = RUNS[name]
    described = rank_runner.spec(text, **changes)
    steps = described["training"]["max_steps"]
    untouched, broken = (rank_runner.new_run(tmp_path / kind, described) for kind in ("untouched", "broken"))
    assert rank_runner.run_to_end(untouched, world).outcome == "completed"
    chooser = random.Random(f"{SEED} {name}")
    stop_at, kill_at = sorted(chooser.sample(range(1, steps - 2), 2))
    print(f"seed {SEED}: stop after step {stop_at}, SIGKILL after step {kill_at}")
    stopped = rank_runner.run_to_end(broken, world, partial(stop_after, broken, 1, stop_at))
    # Two ranks hear of it one step later, which is what makes the agreement free.
    assert (stopped.outcome, stopped.step) == ("stopped", stop_at + (world > 1))
    killed = rank_runner.start(broken, world, partial(kill_after, kill_at))
    assert -signal.SIGKILL in killed.wait()
    assert not broken.attempt(2).outcome.exists()
    assert rank_runner.run_to_end(broken, world).step == steps
    assert dict(rank_runner.outputs(broken))[f"checkpoints/step-{steps:08d}/model.safetensors"]
    last = {
        key: value for key, value in rank_runner.outputs(untouched) if f"{steps:08d}" in key or key.startswith("out/")
    }
    assert len(last) == 3
    for key, value in rank_runner.outputs(broken):
        assert value == last.get(key, value), key
    assert rank_runner.curve(broken) == rank_runner.curve(untouched)


@pytest.mark.soak
@pytest.mark.parametrize("model", [{}, MOE], ids=["dense", "moe"])
def test_a_compiled_run_is_the_same_run_too(text: Path, tmp_path: Path, model: dict[str, Any]) -> None:
    """Over the end of an epoch, whose last micro-batch is short."""
    training = {"use_compile": True, "max_steps": 12, "batch_size": 5, "accumulation_steps": 1}
    described = rank_runner.spec(text, training=training, checkpoint={"save_interval": 100}, model=model)
    untouched, broken = (rank_runner.new_run(tmp_path / kind, described) for kind in ("untouched", "broken"))
    rank_runner.run_to_end(untouched)
    assert rank_runner.run_to_end(broken, 1, partial(stop_after, broken, 1, 8)).step == 8
    rank_runner.run_to_end(broken)
    assert rank_runner.curve(broken) == rank_runner.curve(untouched)
    last = {key: value for key, value in rank_runner.outputs(broken) if "08" not in key}
    assert last == dict(rank_runner.outputs(untouched))
    phases = [event.phase for event in rank_runner.events(untouched) if isinstance(event, PhaseChanged)]
    assert phases[3:5] == ["compiling", "training"]


def stop_after(run: RunDir, attempt: int, step: int) -> None:
    """Touch the stop file right after ``step``."""
    from trainyard.worker.attempt import StepHeartbeat

    beat = StepHeartbeat.beat

    def noticed(self: StepHeartbeat, done: int) -> None:
        beat(self, done)
        if done == step:
            run.attempt(attempt).stop.touch()

    mock.patch.object(StepHeartbeat, "beat", noticed).start()


def kill_after(step: int) -> None:
    """SIGKILL to this very rank right after ``step``; the others see a broken connection."""
    import os

    from trainyard.worker.attempt import StepHeartbeat

    beat = StepHeartbeat.beat

    def fatal(self: StepHeartbeat, done: int) -> None:
        beat(self, done)
        if done == step:
            os.kill(os.getpid(), signal.SIGKILL)

    mock.patch.object(StepHeartbeat, "beat", fatal).start()


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(text: Path, tmp_path: Path) -> None:
    run = rank_runner.new_run(tmp_path / "run", rank_runner.spec(text))
    assert rank_runner.run_to_end(run).step == 24
    before = dict(rank_runner.outputs(run))
    file = run.artifacts(None).checkpoint(24) / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert rank_runner.run_to_end(run).outcome == "completed"
    found = rank_runner.events(run, 2)
    assert rank_runner.warned(run, 2)["checkpoint_invalid"].message == "checkpoint 24 invalid: model.safetensors sha256"
    removed = [(e.step, e.why) for e in found if isinstance(e, CheckpointRemoved)]
    assert (24, "invalid") in removed
    started = next(e for e in found if isinstance(e, Started))
    assert started.start_step == 16
    assert str(started.resumed_from).endswith("step-00000016")
    assert dict(rank_runner.outputs(run)) == before


def test_when_every_checkpoint_is_damaged_nothing_is_thrown_away_without_a_word(text: Path, tmp_path: Path) -> None:
    described = rank_runner.spec(text, training={"max_steps": 4}, checkpoint={"save_interval": 2})
    run = rank_runner.new_run(tmp_path / "run", described)
    rank_runner.run_to_end(run)
    for _, path in run.artifacts(None).published():
        (path / "manifest.json").unlink()
    failed = rank_runner.run_to_end(run)
    assert (failed.outcome, failed.reason) == ("failed", "checkpoint_invalid")
    assert "checkpoint 4 invalid: manifest.json missing; checkpoint 2 invalid" in str(failed.message)
    assert failed.error is not None
    assert "Resume once more to begin at step 0" in str(failed.error.hint)
    assert rank_runner.run_to_end(run).outcome == "completed"


def test_another_run_s_checkpoint_is_refused_by_name(text: Path, tmp_path: Path) -> None:
    run = rank_runner.new_run(tmp_path / "run", rank_runner.spec(text, training={"max_steps": 2}))
    rank_runner.run_to_end(run)
    other = rank_runner.corpus(tmp_path / "other.jsonl", seed=6)
    changed = rank_runner.spec(other, training={"max_steps": 4, "seed": 43}, model={"hidden_size": 48})
    run.spec.write_text(json.dumps(changed))
    failed = rank_runner.run_to_end(run)
    assert failed.reason == "checkpoint_invalid"
    for part in ("model.hidden_size is 48 and was 32", "the corpus is another one", "seed is 43 and was 42"):
        assert part in str(failed.message)
    assert run.artifacts(None).checkpoint(2).is_dir(), "it is not set aside: the next attempt may undo the change"


def test_the_service_sees_in_a_checkpoint_what_the_worker_would_refuse(text: Path, tmp_path: Path) -> None:
    corpus = Path(shutil.copyfile(text, tmp_path / "corpus.jsonl"))
    run = rank_runner.new_run(tmp_path / "run", rank_runner.spec(corpus, training={"max_steps": 2}))
    rank_runner.run_to_end(run)
    saved = json.loads((run.artifacts(None).checkpoint(2) / "state.json").read_bytes())["identity"]
    assert saved["corpus_file"] == asdict(FileFingerprint.of(corpus))
    assert (saved["vocabulary"], saved["tokenizer"]) == fingerprint_of("byte")
    with corpus.open("a") as more:
        more.write('{"text": "one more"}\n')
    begin, settings = ResumeCandidate(2, run.artifacts(None).checkpoint(2)), Settings.read({}, home=tmp_path)
    resolved = json.loads(run.attempt(1).spec.read_bytes())
    resolved["model"]["vocab_size"] = 259
    with pytest.raises(CheckpointMismatch, match=r"data_path: .* bytes when step 2 was saved"):
        check_compatible([begin], resolved, settings)
    run.spec.write_text(json.dumps(rank_runner.spec(corpus, training={"max_steps": 4})))
    assert "the corpus is another one" in str(rank_runner.run_to_end(run).message)
    shutil.copyfile(text, corpus)
    check_compatible([begin], resolved, settings)
    assert rank_runner.run_to_end(run).outcome == "completed"


def test_more_steps_other_intervals_and_another_world_keep_the_rows_of_a_step(text: Path, tmp_path: Path) -> None:
    run = rank_runner.new_run(tmp_path / "run", rank_runner.spec(text, training={"max_steps": 6}))
    assert rank_runner.run_to_end(run).step == 6
    longer = rank_runner.spec(
        text, training={"max_steps": 10}, checkpoint={"save_interval": 3}, reporting={"log_interval": 2}
    )
    run.spec.write_text(json.dumps(longer))
    assert rank_runner.run_to_end(run, world=2).step == 10
    started = next(e for e in rank_runner.events(run, 2) if isinstance(e, Started))
    assert (started.start_step, started.steps, started.world_size, started.global_batch) == (6, 10, 2, 8)
    assert sorted(rank_runner.metrics(run, 2)) == [8, 10]
    whole = rank_runner.new_run(tmp_path / "whole", longer)
    rank_runner.run_to_end(whole)
    assert rank_runner.metrics(run, 2)[10].tokens == rank_runner.metrics(whole)[10].tokens
