"""Milestones: what is left of a checkpoint that is kept for good."""

import json
import os
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file

from tests.worker.test_resume_start import IDENTITY, publish
from tests.worker.test_saver import Bench
from trainyard.contract.events import CheckpointRemoved, CheckpointSaved, Event
from trainyard.contract.rundir import MODEL_FILE, OPTIMIZER_FILE, ArtifactDir
from trainyard.worker.checkpoint import files, retention
from trainyard.worker.checkpoint import retention as milestones
from trainyard.worker.checkpoint.files import sha256_of
from trainyard.worker.checkpoint.resume import rewind_to


def test_the_weights_stay_and_nothing_resumes_from_them(tmp_path: Path) -> None:
    artifacts = ArtifactDir(tmp_path)
    full = publish(artifacts, 10)
    publish(artifacts, 15)
    weights, state = load_file(full / MODEL_FILE), files.read_state(full)
    saved = milestones.keep_weights(artifacts, 10, full)
    assert retention.remove(full)
    assert saved.path == artifacts.milestone(10)
    assert sorted(file.name for file in saved.path.iterdir()) == ["manifest.json", "model.safetensors", "state.json"]
    assert saved.bytes == sum(file.stat().st_size for file in saved.path.iterdir())
    assert saved.sha256 == sha256_of(saved.path / MODEL_FILE)
    kept = load_file(saved.path / MODEL_FILE)
    assert set(kept) == set(weights)
    assert all(torch.equal(kept[name], value) for name, value in weights.items())
    assert files.read_state(saved.path) == state
    assert [step for step, _ in artifacts.published()] == [15]
    assert artifacts.milestones() == [(10, saved.path)]
    assert files.newest_valid(artifacts, []) == artifacts.checkpoint(15)


def test_linked_where_it_can_be_and_copied_where_not(tmp_path: Path) -> None:
    artifacts = ArtifactDir(tmp_path)
    linked = milestones.keep_weights(artifacts, 10, publish(artifacts, 10))
    assert (linked.path / MODEL_FILE).stat().st_nlink == 2
    with mock.patch.object(os, "link", side_effect=PermissionError(1, "Operation not permitted")):
        copied = milestones.keep_weights(artifacts, 20, publish(artifacts, 20))
    assert (copied.path / MODEL_FILE).stat().st_nlink == 1
    assert copied.sha256 == sha256_of(copied.path / MODEL_FILE)


def test_killed_between_the_two_it_is_finished_the_next_time(tmp_path: Path) -> None:
    artifacts = ArtifactDir(tmp_path)
    full = publish(artifacts, 10)
    first = milestones.keep_weights(artifacts, 10, full)
    written = (first.path / "manifest.json").stat().st_mtime_ns
    for step in (15, 20):
        publish(artifacts, step)
    (pruned,) = retention.delete_old_checkpoints(artifacts, keep_last=2, keep_every=10)
    assert (pruned.step, pruned.path, pruned.weights) == (10, full, first)
    assert (first.path / "manifest.json").stat().st_mtime_ns == written
    assert retention.delete_old_checkpoints(artifacts, keep_last=2, keep_every=10) == []


def test_other_weights_of_the_same_step_take_the_place_of_the_old_ones(tmp_path: Path) -> None:
    artifacts = ArtifactDir(tmp_path)
    torch.manual_seed(0)
    first = milestones.keep_weights(artifacts, 10, publish(artifacts, 10))
    retention.remove(artifacts.checkpoint(10))
    torch.manual_seed(1)
    second = milestones.keep_weights(artifacts, 10, publish(artifacts, 10))
    assert first.sha256 != second.sha256 == sha256_of(artifacts.milestone(10) / MODEL_FILE)


def test_what_cannot_be_thinned_stays_whole(tmp_path: Path) -> None:
    artifacts = ArtifactDir(tmp_path)
    for step in (10, 15, 20):
        publish(artifacts, step)
    with mock.patch.object(files, "write_blocks", side_effect=OSError(28, "No space left on device")):
        assert retention.delete_old_checkpoints(artifacts, keep_last=2, keep_every=10) == []
    assert files.verify(artifacts.checkpoint(10)) is None
    assert artifacts.milestones() == []
    assert [path.name for path in artifacts.checkpoints.iterdir() if path.name.startswith(".")] == []


def test_a_save_tells_of_what_is_left(tmp_path: Path) -> None:
    bench = Bench(tmp_path, keep_last=2, keep_every=4)
    for step in (2, 4, 6, 8):
        bench.save(step)
    said = [
        (e.kind, e.step, e.checkpoint_kind) for e in bench.events if isinstance(e, CheckpointSaved | CheckpointRemoved)
    ]
    assert said == [
        ("checkpoint", 2, "full"),
        ("checkpoint", 4, "full"),
        ("checkpoint", 6, "full"),
        ("checkpoint_removed", 2, "full"),
        ("checkpoint", 8, "full"),
        ("checkpoint", 4, "weights"),
        ("checkpoint_removed", 4, "full"),
    ]
    weights = next(e for e in bench.of(CheckpointSaved) if e.checkpoint_kind == "weights")
    assert weights.path == str(bench.artifacts.milestone(4))
    assert weights.bytes < bench.of(CheckpointSaved)[1].bytes
    assert weights.sha256 == bench.of(CheckpointSaved)[1].sha256
    assert not (Path(weights.path) / OPTIMIZER_FILE).exists()


@pytest.mark.parametrize("kind", ["full", "weights"])
def test_going_back_sets_newer_milestones_aside_too(kind: str, tmp_path: Path) -> None:
    artifacts, said = ArtifactDir(tmp_path), list[Event]()
    for step in (5, 10, 20):
        publish(artifacts, step)
    if kind == "weights":
        milestones.keep_weights(artifacts, 10, artifacts.checkpoint(10))
        retention.remove(artifacts.checkpoint(10))
    rewind_to(artifacts, 5, IDENTITY, said.append)
    assert artifacts.milestones() == []
    removed: list[Any] = [json.loads(event.model_dump_json()) for event in said]
    assert {(e["step"], e["checkpoint_kind"]) for e in removed} == {(20, "full"), (10, kind)}


def test_step_0_is_no_milestone() -> None:
    assert retention.checkpoints_to_delete(range(0, 60, 10), keep_last=2, keep_every=20) == ([30, 10, 0], [20])
