"""A run whose save_dir has changed: its checkpoints and weights are moved, and nothing is lost on the way."""

import errno
import json
import os
import shutil
from pathlib import Path

import pytest

from tests.worker import rank_runner
from tests.worker.rank_runner import corpus, new_run, run_to_end
from trainyard.contract.events import CheckpointRemoved, CheckpointSaved, Event, MetricEvent
from trainyard.contract.failpoints import armed
from trainyard.contract.rundir import ArtifactDir, RunDir
from trainyard.contract.spec import JobSpec
from trainyard.contract.status import Reason
from trainyard.worker.checkpoint.files import read_state, verify
from trainyard.worker.checkpoint.relocate import move_artifacts
from trainyard.worker.errors import TrainingError, save_error


def spec_with(save_dir: Path | None, **training: int) -> dict[str, object]:
    checkpoint = {"save_interval": 4, "keep_last": 2, "keep_every": 4, "save_dir": str(save_dir) if save_dir else None}
    return {"checkpoint": checkpoint, "training": training}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 12 steps with two checkpoints, a milestone and weights below `old`."""
    folder = tmp_path_factory.mktemp("finished")
    described = rank_runner.spec(corpus(folder / "c.jsonl"), **spec_with(folder / "old", max_steps=12))  # type: ignore[arg-type]
    assert run_to_end(new_run(folder / "runs" / "job_a", described)).outcome == "completed"
    return folder


@pytest.fixture
def moved_from(finished: Path, tmp_path: Path) -> Path:
    """A copy of it, so that a test may move it."""
    shutil.copytree(finished, tmp_path / "copy")
    for attempt in RunDir(tmp_path / "copy/runs/job_a").attempts():
        described = json.loads(attempt.spec.read_text())
        described["checkpoint"]["save_dir"] = str(tmp_path / "copy/old")
        attempt.spec.write_text(json.dumps(described))
    return tmp_path / "copy"


def move(folder: Path, to: Path | None) -> list[Event]:
    run = RunDir(folder / "runs/job_a")
    described = json.loads(next(iter(run.attempts())).spec.read_text())
    described["checkpoint"]["save_dir"] = str(to) if to else None
    events: list[Event] = []
    move_artifacts(
        JobSpec.model_validate_json(json.dumps(described)), run, run.artifacts(str(to) if to else None), events.append
    )
    return events


def names(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_a_resumed_run_goes_on_below_the_new_save_dir(finished: Path, tmp_path: Path) -> None:
    described = rank_runner.spec(finished / "c.jsonl", **spec_with(tmp_path / "old", max_steps=8))  # type: ignore[arg-type]
    run = new_run(tmp_path / "runs" / "job_b", described)
    assert run_to_end(run).outcome == "completed"
    described = rank_runner.spec(finished / "c.jsonl", **spec_with(tmp_path / "new", max_steps=12))  # type: ignore[arg-type]
    run.spec.write_text(json.dumps(described))
    assert run_to_end(run).outcome == "completed"
    assert [step for step, _ in run.artifacts(str(tmp_path / "new")).published()] == [12, 8]
    assert not (tmp_path / "old" / "job_b").exists()
    metrics = [event for event in rank_runner.events(run, 2) if isinstance(event, MetricEvent)]
    assert metrics[0].step > 8, "it continued from the checkpoint that was moved"


@pytest.mark.parametrize("links", [True, False])
def test_everything_is_moved_and_reported(moved_from: Path, links: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not links:

        def no_link(*_: object, **__: object) -> None:
            raise OSError(errno.EXDEV, "Invalid cross-device link")

        monkeypatch.setattr(os, "link", no_link)
    old, new = moved_from / "old/job_a", moved_from / "new/job_a"
    before = names(old)
    assert len(before) > 8
    events = move(moved_from, moved_from / "new")
    assert names(new) == before
    assert not old.exists()
    for step in (8, 12):
        assert verify(new / f"checkpoints/step-{step:08d}") is None
    saved = {event.path for event in events if isinstance(event, CheckpointSaved)}
    removed = {event.path for event in events if isinstance(event, CheckpointRemoved)}
    assert saved == {str(path) for path in (new / "checkpoints").iterdir()}
    assert removed == {path.replace("/new/", "/old/") for path in saved}
    listed = [event for event in events if isinstance(event, CheckpointSaved)]
    kinds = {event.step: (event.checkpoint_kind, event.loss) for event in listed}
    losses = {
        step: read_state(path).loss for step, path in (*ArtifactDir(new).published(), *ArtifactDir(new).milestones())
    }
    assert losses[12] is not None
    assert kinds == {4: ("weights", losses[4]), 8: ("full", losses[8]), 12: ("full", losses[12])}
    assert move(moved_from, moved_from / "new") == []
    [attempt] = RunDir(moved_from / "runs/job_a").attempts()
    attempt.spec.write_text(attempt.spec.read_text().replace("/copy/old", "/copy/new"))
    move(moved_from, None)
    assert {name for name in names(moved_from / "runs/job_a") if name.startswith(("checkpoints/", "out/"))} == set(
        before
    )


def test_an_interrupted_move_is_continued(moved_from: Path) -> None:
    before = names(moved_from / "old/job_a")

    class Died(BaseException):
        pass

    def die() -> None:
        raise Died

    for _ in range(2):
        with armed("relocate.copied", die), pytest.raises(Died):
            move(moved_from, moved_from / "new")
        found = {name for folder in ("old", "new") for name in names(moved_from / folder / "job_a")}
        assert found == set(before), "nothing is lost"
    move(moved_from, moved_from / "new")
    assert names(moved_from / "new/job_a") == before
    assert not (moved_from / "old/job_a").exists()


def test_a_full_disk_loses_nothing_and_says_what_to_do(moved_from: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = names(moved_from / "old/job_a")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("trainyard.worker.checkpoint.relocate.link_or_copy", full)
    with pytest.raises(TrainingError, match="which are moved to the new save_dir") as caught:
        move(moved_from, moved_from / "new")
    assert caught.value.reason is Reason.DISK_FULL
    assert names(moved_from / "old/job_a") == before


def test_the_hint_of_a_full_disk_is_this_move() -> None:
    error = save_error(OSError(errno.ENOSPC, "No space left on device"), "the checkpoint")
    assert "save_dir" in str(error.hint)
