"""Where an attempt begins: locks, specs, material, and which checkpoint it goes on from."""

import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.worker import rank_runner
from trainyard.contract.events import CheckpointSaved, Event, PhaseChanged, WarningEvent
from trainyard.contract.locks import FileLock
from trainyard.contract.run_identity import RunIdentity
from trainyard.contract.rundir import ArtifactDir, RunDir
from trainyard.contract.spec import JobSpec
from trainyard.contract.status import Reason
from trainyard.worker.attempt import UnusableSpec, acquire, read_spec
from trainyard.worker.checkpoint import files
from trainyard.worker.checkpoint.files import RunState
from trainyard.worker.checkpoint.resume import find_resume_point, saved_corpora
from trainyard.worker.data.loader import MicroBatchLoader
from trainyard.worker.data.prepare import TrainingData, prepare_data
from trainyard.worker.data.sampler import StepSampler
from trainyard.worker.distributed import DistributedContext
from trainyard.worker.errors import StopRequested, TrainingError

ALONE = DistributedContext(0, 1, 0, 1, torch.device("cpu"))
IDENTITY = RunIdentity(model={"hidden_size": 8}, tokenizer="t", corpus="c", seed=1, max_seq_len=8, packing="none")


def spec(**groups: dict[str, Any]) -> JobSpec:
    return JobSpec.model_validate_json(json.dumps({"data": {"data_path": "/x"}, **groups}))


def test_by_hand_attempts_are_numbered_and_one_holds_the_locks(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    first = acquire(run, None, ALONE, spec())
    assert first.directory.number == 1
    assert JobSpec.model_validate_json(first.directory.spec.read_bytes()) == spec()
    with pytest.raises(TrainingError, match="another attempt of this run is alive"):
        acquire(run, None, ALONE, spec())
    for lock in first.locks:
        lock.release()
    second = acquire(run, None, ALONE, spec())
    assert (second.directory.number, run.current.read_text()) == (2, "2")
    for lock in second.locks:
        lock.release()


def test_an_orphan_s_lock_is_enough_to_be_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainyard.worker.attempt.LOCK_SECONDS", 0.05)
    run = RunDir(tmp_path)
    with FileLock(run.alive_lock).take(shared=True):
        with pytest.raises(TrainingError, match=r"alive\.lock is held by another process"):
            acquire(run, None, ALONE, spec())
    assert list(run.attempts()) == []


def test_under_an_agent_the_number_must_be_the_current_one(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    for number in (1, 2):
        run.attempt(number).path.mkdir()
    run.current.write_text("2")
    with pytest.raises(TrainingError, match=r"attempt 1 of .* is not the current one, which is 2"):
        acquire(run, 1, ALONE, spec())
    attempt = acquire(run, 2, ALONE, spec())
    assert attempt.directory == run.attempt(2)
    with pytest.raises(Exception, match="held"):
        FileLock(run.alive_lock).take()
    attempt.locks[0].release()


def test_specs_by_hand_take_minimind_s_habits_and_name_every_mistake(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    with pytest.raises(UnusableSpec, match=r"spec\.json cannot be read"):
        read_spec(run, None)
    run.spec.write_text('{"data": {"data_path": "/x"}, "training": {"use_compile": 0, "num_train_epochs": 2}}')
    assert read_spec(run, None).training.epochs == 2
    run.spec.write_text('{"data": {"data_path": 3}, "trainign": {}, "training": {"epochs": 0}}')
    with pytest.raises(UnusableSpec) as unusable:
        read_spec(run, None)
    lines = str(unusable.value).splitlines()
    assert lines[0] == f"{run.spec} has 3 mistakes:"
    assert {line.split()[0] for line in lines[1:]} == {"/data/data_path", "/trainign", "/training/epochs"}
    run.spec.write_text("{")
    with pytest.raises(UnusableSpec, match="is not JSON"):
        read_spec(run, None)


def test_the_resolved_spec_is_read_as_it_stands(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    run.attempt(1).path.mkdir()
    run.attempt(1).spec.write_text(spec(training={"epochs": 4}).model_dump_json())
    assert read_spec(run, 1) == spec(training={"epochs": 4})
    run.attempt(1).spec.write_text('{"data": {"data_path": 1}}')
    with pytest.raises(UnusableSpec, match="data_path"):
        read_spec(run, 1)


def material(path: Path, said: list[Event], saved: Sequence[str] = (), **groups: dict[str, Any]) -> TrainingData:
    text = path / "corpus.jsonl"
    if not text.exists():
        rank_runner.corpus(text)
    described = JobSpec.model_validate_json(json.dumps(rank_runner.spec(text, **groups)))
    return prepare_data(described, RunDir(path), ALONE, said.append, lambda: False, lambda: saved)


def test_material_is_built_once_and_knows_what_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRAINYARD_CORPUS_CACHE", str(tmp_path / "cache"))
    first = material(tmp_path, [])
    assert first.spec.model.vocab_size == 259
    assert first.eval_sets == ()
    assert first.sources[0].corpus.directory.parent == tmp_path / "cache"
    built = first.sources[0].corpus.directory.stat().st_mtime_ns
    second = material(tmp_path, [])
    assert second.sources[0].corpus.directory.stat().st_mtime_ns == built
    assert second.identity == first.identity
    for change in ({"training": {"seed": 1}}, {"data": {"max_seq_len": 16}}, {"data": {"eval_fraction": 0.3}}):
        assert len(material(tmp_path, [], **change).identity.differences(first.identity)) == 1


def test_held_out_documents_are_not_trained_on(tmp_path: Path) -> None:
    whole, split = material(tmp_path, []), material(tmp_path, [], data={"eval_fraction": 0.25})
    (held_out,) = split.eval_sets
    assert held_out.name == "data"
    assert 0 < held_out.rows.tokens < 0.6 * whole.train_set.tokens
    assert split.train_set.tokens + held_out.rows.tokens == whole.train_set.tokens
    apart = rank_runner.corpus(tmp_path / "eval.jsonl", documents=4, seed=2)
    given = material(tmp_path, [], data={"eval_data_path": str(apart)})
    assert [each.name for each in given.eval_sets] == ["eval"]
    assert given.train_set.tokens == whole.train_set.tokens


def targets(data: TrainingData) -> list[int]:
    return [int(count) for count in data.train_set.targets_of(range(len(data.train_set)))]


def test_a_run_that_release_0_1_began_keeps_its_split(tmp_path: Path) -> None:
    groups = {"eval_fraction": 0.25}
    new = material(tmp_path, [], data=groups)
    assert new.split_by == "text"
    content = json.dumps([new.sources[0].corpus.meta.content, "text", 0.25])
    fingerprint = hashlib.sha256(content.encode()).hexdigest()  # of release 0.1
    assert new.identity.corpus != fingerprint
    old = material(tmp_path, [], ["of another corpus", fingerprint, new.identity.corpus], data=groups)
    assert (old.split_by, old.identity.corpus) == ("number", fingerprint)
    assert targets(old) != targets(new)
    again = material(tmp_path, [], [new.identity.corpus, fingerprint], data=groups)
    assert (again.split_by, again.identity) == ("text", new.identity)


def test_without_a_split_the_identity_is_that_of_release_0_1(tmp_path: Path) -> None:
    data = material(tmp_path, [])
    content = json.dumps([data.sources[0].corpus.meta.content, "text", 0.0])
    assert data.identity.corpus == hashlib.sha256(content.encode()).hexdigest()


def test_the_corpora_of_the_checkpoints_a_run_may_start_from(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "own")
    artifacts = run.artifacts(None)
    for step in (2, 4):
        publish(artifacts, step, dataclasses.replace(IDENTITY, corpus=f"own {step}"))
    publish(ArtifactDir(tmp_path / "earlier"), 9, dataclasses.replace(IDENTITY, corpus="earlier"))
    (artifacts.checkpoint(4) / "state.json").write_bytes(b"[" * 100_000)
    assert list(saved_corpora(spec(), run, artifacts)) == ["own 2"]
    assert list(saved_corpora(spec(checkpoint={"from_resume": True}), run, artifacts)) == ["own 2", "earlier"]


def test_bad_lines_within_the_limit_are_told_with_their_numbers(tmp_path: Path) -> None:
    text = rank_runner.corpus(tmp_path / "corpus.jsonl")
    text.write_text(text.read_text() + '{"text": null}\n')
    said: list[Event] = []
    material(tmp_path, said, data={"max_bad_lines": 0.5})
    warning = next(event for event in said if isinstance(event, WarningEvent))
    assert warning.code == "bad_lines"
    assert ": 1 bad line: line 61: " in warning.message
    assert warning.message.endswith("; bad lines are left out")
    assert warning.data["bad_lines"] == 1
    assert warning.data["named"][0][0] == 61


def test_a_vocabulary_that_is_too_small_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="vocab_size 100 is smaller than the tokenizer's 259"):
        material(tmp_path, [], model={"vocab_size": 100})
    with pytest.raises(TrainingError, match=r"data\.tokenizer_path"):
        material(tmp_path, [], data={"tokenizer_path": str(tmp_path)})


def test_preparation_is_told_and_can_be_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainyard.worker.data.prepare.PROGRESS_SECONDS", 0.0)
    said: list[Event] = []
    material(tmp_path, said)
    phases = [event for event in said if isinstance(event, PhaseChanged)]
    assert phases
    assert all(event.total and event.done is not None and event.done <= event.total for event in phases)
    rank_runner.corpus(tmp_path / "other.jsonl", seed=8)
    described = JobSpec.model_validate_json(json.dumps(rank_runner.spec(tmp_path / "other.jsonl")))
    with pytest.raises(StopRequested):
        prepare_data(described, RunDir(tmp_path), ALONE, said.append, lambda: True)


@pytest.mark.parametrize("changed", ["training", "held out"])
def test_ranks_that_see_different_files_do_not_train(changed: str, tmp_path: Path) -> None:
    """A file was added while the ranks opened the directory, or one node has an old listing of it."""
    gathered: list[Any] = []

    class Recording(DistributedContext):
        def gather_objects(self, own: Any) -> list[Any]:
            gathered.append(own)
            return gathered

    for name in ("training", "held out"):
        (tmp_path / name).mkdir()
        rank_runner.corpus(tmp_path / name / "first.jsonl")
    group = {"data_path": str(tmp_path / "training"), "eval_data_path": str(tmp_path / "held out")}
    described = JobSpec.model_validate_json(json.dumps(rank_runner.spec(tmp_path, data=group)))
    ranks = Recording(0, 2, 0, 2, torch.device("cpu"))
    for _ in range(2):
        prepare_data(described, RunDir(tmp_path), ranks, lambda _: None, lambda: False)
    rank_runner.corpus(tmp_path / changed / "second.jsonl", seed=8)
    with pytest.raises(TrainingError, match="changed while the ranks opened it") as refused:
        prepare_data(described, RunDir(tmp_path), ranks, lambda _: None, lambda: False)
    assert refused.value.reason is Reason.DATA_INVALID
    assert len(gathered) == 3


def test_the_feed_gives_each_row_of_an_epoch_once_on_any_number_of_ranks(tmp_path: Path) -> None:
    rows = material(tmp_path, [], data={"packing": "none"}).train_set
    order = StepSampler(len(rows), 7, seed=3)
    for world in range(1, 9):
        feeds = [
            MicroBatchLoader(rows, order, dataclasses.replace(ALONE, rank=r, world=world), 2, "global_tokens")
            for r in range(world)
        ]
        seen: list[int] = []
        for step in range(1, order.steps_per_epoch + 1):
            micros = [micro for feed in feeds for micro in feed.microbatches(step)]
            tokens = int(rows.targets_of(order.rows_of(step)).sum())
            assert sum(micro.tokens for micro in micros) == feeds[0].tokens(step) == tokens
            assert all(int((micro.batch.labels != -100).sum()) == micro.tokens for micro in micros)
            assert all(micro.factor == world / tokens for micro in micros)
            seen += [row for micro in micros for row in micro.rows]
        assert sorted(seen) == list(range(len(rows)))
    dummy = MicroBatchLoader(rows, order, ALONE, 2, "global_tokens", min_rows=2).dummy()
    assert dummy.batch.input_ids.shape == (2, 32)
    assert (dummy.batch.labels == -100).all()


def publish(artifacts: ArtifactDir, step: int, identity: RunIdentity = IDENTITY) -> Path:
    model = torch.nn.Linear(2, 2)
    state = RunState(step=step, tokens=0, rows_per_step=4, world_size=1, identity=identity)
    return files.write_checkpoint(artifacts, state, model.state_dict(), {"step.weight": torch.zeros(())}).path


class Yard:
    """A directory of jobs, one of which looks for where to begin."""

    def __init__(self, path: Path, *, save_dir: bool = False) -> None:
        self.path = path
        self.run = RunDir(path / "mine")
        self.run.path.mkdir(exist_ok=True)
        self.spec = spec(checkpoint={"from_resume": True, "save_dir": str(path) if save_dir else None})
        self.artifacts = self.run.artifacts(self.spec.checkpoint.save_dir)
        self.said: list[Event] = []

    def begin(self, *, steps: int = 100) -> Path | None:
        found = find_resume_point(
            self.spec, self.run, self.artifacts, IDENTITY, lambda state: state.step >= steps, self.said.append
        )
        return found.source if found is not None else None

    def warnings(self) -> list[str]:
        return [event.message for event in self.said if isinstance(event, WarningEvent)]


def test_its_own_checkpoint_comes_before_any_other_job_s(tmp_path: Path) -> None:
    yard = Yard(tmp_path)
    own = publish(yard.artifacts, 3)
    publish(ArtifactDir(tmp_path / "other"), 50)
    assert yard.begin() == own
    assert yard.warnings() == []


@pytest.mark.parametrize("save_dir", [False, True])
def test_the_last_written_fitting_checkpoint_of_an_earlier_job_is_taken(save_dir: bool, tmp_path: Path) -> None:
    yard = Yard(tmp_path, save_dir=save_dir)
    older, newer = publish(ArtifactDir(tmp_path / "b"), 50), publish(ArtifactDir(tmp_path / "a"), 20)
    os.utime(older, (1000, 1000))
    assert yard.begin() == newer
    own = yard.artifacts.checkpoint(20)
    assert yard.artifacts.published() == [(20, own)]
    assert [(event.step, event.path) for event in yard.said if isinstance(event, CheckpointSaved)] == [(20, str(own))]
    # It is this job's own first one from here on: an attempt that dies before its first save begins there again.
    os.utime(older, (2**32, 2**32))
    shutil.rmtree(newer)
    assert yard.begin() == own
    shutil.rmtree(own)
    assert yard.begin() == older


def test_what_does_not_fit_is_passed_over_with_the_reason(tmp_path: Path) -> None:
    yard = Yard(tmp_path)
    publish(ArtifactDir(tmp_path / "shape"), 5, dataclasses.replace(IDENTITY, model={"hidden_size": 16}))
    publish(ArtifactDir(tmp_path / "done"), 100)
    torn = publish(ArtifactDir(tmp_path / "torn"), 5)
    os.truncate(torn / "model.safetensors", 3)
    flipped = publish(ArtifactDir(tmp_path / "flipped"), 5)
    content = bytearray((flipped / "model.safetensors").read_bytes())
    content[-1] ^= 4
    (flipped / "model.safetensors").write_bytes(content)
    assert yard.begin() is None
    (message,) = yard.warnings()
    for part in (
        "model.hidden_size is 8 and was 16",
        "already at step 100, with nothing left to train",
        f"{torn}: damaged",
        f"{flipped}: model.safetensors sha256",
        "beginning at step 0",
    ):
        assert part in message
    # Another job's files are not ours to set aside.
    assert torn.is_dir()
    assert flipped.is_dir()
    good = publish(ArtifactDir(tmp_path / "good"), 7)
    assert yard.begin() == good


def test_without_from_resume_nothing_of_others_is_looked_at(tmp_path: Path) -> None:
    yard = Yard(tmp_path)
    yard.spec = spec()
    publish(ArtifactDir(tmp_path / "other"), 50)
    assert yard.begin() is None
    assert yard.warnings() == []
