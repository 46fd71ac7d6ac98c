"""Going back to a named step, and a save on demand."""

import dataclasses
import json
import os
from functools import partial
from pathlib import Path
from unittest import mock

import pytest

from tests.worker import rank_runner
from tests.worker.test_resume_start import ALONE, IDENTITY, publish, spec
from trainyard.contract.events import CheckpointRemoved, Event, Started
from trainyard.contract.rundir import ArtifactDir, RunDir
from trainyard.worker.attempt import acquire
from trainyard.worker.checkpoint import files, retention
from trainyard.worker.checkpoint.resume import find_resume_point, rewind_to
from trainyard.worker.errors import TrainingError


def test_newer_ones_are_set_aside_and_the_named_one_is_the_newest_from_then_on(tmp_path: Path) -> None:
    artifacts, said = ArtifactDir(tmp_path), list[Event]()
    for step in (2, 4, 6, 8):
        publish(artifacts, step)
    assert rewind_to(artifacts, 4, IDENTITY, said.append) == artifacts.checkpoint(4)
    assert [step for step, _ in artifacts.published()] == [4, 2]
    aside = sorted(path.name for path in artifacts.checkpoints.iterdir() if path.name.startswith("."))
    assert aside == [".superseded-step-00000006", ".superseded-step-00000008"]
    removed = [(e.step, e.path, e.why) for e in said if isinstance(e, CheckpointRemoved)]
    assert removed == [(step, str(artifacts.checkpoint(step)), "superseded") for step in (8, 6)]
    # Asked again by an attempt that begins after one that got no further: there is nothing left to do.
    assert rewind_to(artifacts, 4, IDENTITY, said.append) == artifacts.checkpoint(4)
    assert len(said) == 2
    assert files.newest_valid(artifacts, []) == artifacts.checkpoint(4)
    # What is set aside is kept, also when it happens twice to one step.
    publish(artifacts, 6)
    rewind_to(artifacts, 4, IDENTITY, said.append)
    assert (artifacts.checkpoints / ".superseded-step-00000006-1" / "model.safetensors").exists()


def test_superseded_ones_go_once_the_run_has_come_as_far(tmp_path: Path) -> None:
    artifacts = ArtifactDir(tmp_path)
    for step in (2, 4, 6, 8):
        publish(artifacts, step)
    rewind_to(artifacts, 2, IDENTITY, lambda _: None)

    def aside() -> list[str]:
        return sorted(path.name for path in artifacts.checkpoints.iterdir() if path.name.startswith("."))

    publish(artifacts, 4)
    retention.delete_old_checkpoints(artifacts, 5, None)
    assert aside() == [".superseded-step-00000006", ".superseded-step-00000008"]
    publish(artifacts, 6)
    rewind_to(artifacts, 4, IDENTITY, lambda _: None)
    assert aside() == [".superseded-step-00000006", ".superseded-step-00000006-1", ".superseded-step-00000008"]
    publish(artifacts, 7)
    retention.delete_old_checkpoints(artifacts, 5, None)
    assert aside() == [".superseded-step-00000008"]
    (artifacts.checkpoints / ".superseded-notes").mkdir()
    publish(artifacts, 9)
    # A late one that is alone and damaged is nothing to rely on.
    os.truncate(artifacts.checkpoint(9) / "model.safetensors", 3)
    retention.delete_old_checkpoints(artifacts, 5, None)
    assert aside() == [".superseded-notes", ".superseded-step-00000008"]
    publish(artifacts, 10)
    retention.delete_old_checkpoints(artifacts, 5, None)
    assert aside() == [".superseded-notes"]
    assert [step for step, _ in artifacts.published()] == [10, 9, 7, 4, 2]


def test_where_it_cannot_go_back_nothing_is_touched(tmp_path: Path) -> None:
    artifacts, said = ArtifactDir(tmp_path), list[Event]()
    for step in (2, 4, 6):
        publish(artifacts, step)
    with pytest.raises(TrainingError, match=r"step 3, which was requested, cannot be used: there is none") as failed:
        rewind_to(artifacts, 3, IDENTITY, said.append)
    assert "newest first: 6, 4, 2." in str(failed.value.hint)
    os.truncate(artifacts.checkpoint(2) / "model.safetensors", 3)
    with pytest.raises(TrainingError, match=r"cannot be used: model.safetensors size"):
        rewind_to(artifacts, 2, IDENTITY, said.append)
    with pytest.raises(TrainingError, match="of another run: seed is 2 and was 1"):
        rewind_to(artifacts, 4, dataclasses.replace(IDENTITY, seed=2), said.append)
    assert [step for step, _ in artifacts.published()] == [6, 4, 2]
    assert said == []


def test_the_wish_is_left_in_the_attempt_by_hand_as_by_the_service(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    attempt = acquire(run, None, ALONE, spec(), 40)
    assert attempt.directory.read_resume_from() == 40
    for lock in attempt.locks:
        lock.release()
    later = acquire(run, None, ALONE, spec())
    assert later.directory.read_resume_from() is None
    for lock in later.locks:
        lock.release()
    artifacts = ArtifactDir(tmp_path)
    for step in (40, 50):
        publish(artifacts, step)
    begin = find_resume_point(spec(), run, artifacts, IDENTITY, lambda _: False, lambda _: None, 40)
    assert begin is not None
    assert begin.source == begin.checkpoint == artifacts.checkpoint(40)


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2])
def test_a_run_that_went_back_is_the_run_that_never_left(world: int, tmp_path: Path) -> None:
    text = rank_runner.corpus(tmp_path / "corpus.jsonl")
    described = rank_runner.spec(text, training={"max_steps": 12}, checkpoint={"save_interval": 4})
    run = rank_runner.new_run(tmp_path / "run", described)
    assert rank_runner.run_to_end(run, world).step == 12
    before = dict(rank_runner.outputs(run))
    assert rank_runner.run_to_end(run, world, from_step=4).step == 12
    started = next(event for event in rank_runner.events(run, 2) if isinstance(event, Started))
    assert started.start_step == 4
    assert dict(rank_runner.outputs(run)) == before
    assert sorted(rank_runner.curve(run)) == [5, 10, 12], "steps done twice have equal points"
    assert rank_runner.saves(run, 2) == [8, 12]
    assert rank_runner.run_to_end(run, world).step == 12
    last = next(event for event in rank_runner.events(run, 3) if isinstance(event, Started))
    assert last.start_step == 12
    failed = rank_runner.run_to_end(run, world, from_step=5)
    assert (failed.outcome, failed.reason) == ("failed", "checkpoint_invalid")


def ask_to_save(run: RunDir, *steps: int) -> None:
    """Touch the file right after these steps."""
    from trainyard.worker.attempt import StepHeartbeat

    beat = StepHeartbeat.beat

    def noticed(self: StepHeartbeat, done: int) -> None:
        beat(self, done)
        if done in steps and os.environ["RANK"] == "0":
            run.attempt(1).save.touch()

    mock.patch.object(StepHeartbeat, "beat", noticed).start()


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2])
def test_a_save_that_is_asked_for_comes_once_and_the_run_goes_on(world: int, tmp_path: Path) -> None:
    text = rank_runner.corpus(tmp_path / "corpus.jsonl")
    described = rank_runner.spec(text, training={"max_steps": 12}, checkpoint={"save_interval": 100})
    run = rank_runner.new_run(tmp_path / "run", described)
    assert rank_runner.run_to_end(run, world, partial(ask_to_save, run, 3, 7)).outcome == "completed"
    # Several ranks agree on it one step later, which is what makes the agreement free.
    later = int(world > 1)
    assert rank_runner.saves(run) == [3 + later, 7 + later, 12]
    assert not run.attempt(1).save.exists()
    state = json.loads((run.artifacts(None).checkpoint(3 + later) / "state.json").read_bytes())
    assert state["step"] == 3 + later
