"""Saves in the background: what they write, how they fail, and kills at any point."""

import contextlib
import gc
import json
import os
import random
import signal
import threading
import weakref
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file

from tests.worker import rank_runner
from trainyard.contract.events import CheckpointRemoved, CheckpointSaved, Event, WarningEvent
from trainyard.contract.run_identity import RunIdentity
from trainyard.contract.rundir import ArtifactDir
from trainyard.contract.spec import JobSpec
from trainyard.model.config import ModelConfig
from trainyard.worker.checkpoint import files, retention, saver
from trainyard.worker.checkpoint.saver import Checkpointer, StagingBuffers
from trainyard.worker.distributed import DistributedContext
from trainyard.worker.errors import TrainingError
from trainyard.worker.training.metrics import MetricsProcessor, MetricsWindow
from trainyard.worker.training.state import TrainProgress, TrainState, build_train_state, initial_model

ALONE = DistributedContext(0, 1, 0, 1, torch.device("cpu"))
SHAPE = ModelConfig(
    hidden_size=16,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=1,
    vocab_size=32,
    intermediate_size=16,
)
IDENTITY = RunIdentity(model={}, tokenizer="t", corpus="c", seed=1, max_seq_len=8, packing="none")


def spec(**checkpointing: Any) -> JobSpec:
    described = {"data": {"data_path": "/x"}, "model": {"hidden_size": 16}, "checkpoint": checkpointing}
    return JobSpec.model_validate_json(json.dumps(described))


class Bench:
    """A checkpointer with everything it needs, and the events it emitted."""

    def __init__(self, path: Path, **checkpointing: Any) -> None:
        self.events: list[Event] = []
        self.artifacts = ArtifactDir(path)
        self.metrics = MetricsProcessor(ALONE, MetricsWindow(loss_sum=3.0, tokens=2.0), 6.0, has_aux=False)
        self.train_state: TrainState = build_train_state(
            initial_model(SHAPE, 1, ALONE.device), spec().training, 0.0, ALONE
        )
        self.saver = Checkpointer(spec(**checkpointing), self.artifacts, IDENTITY, 8, ALONE, self.events.append)

    def begin(self, step: int, *, required: bool = False) -> None:
        self.saver.save(self.train_state, TrainProgress(step=step, tokens=step), self.metrics, required=required)

    def save(self, step: int, *, required: bool = False) -> None:
        self.begin(step, required=required)
        self.saver.wait()

    def of(self, kind: type[Any]) -> list[Any]:
        return [event for event in self.events if isinstance(event, kind)]


def test_a_save_publishes_reports_and_prunes(tmp_path: Path) -> None:
    bench = Bench(tmp_path, keep_last=2)
    for step in (1, 2, 3):
        bench.save(step)
    assert [event.step for event in bench.of(CheckpointSaved)] == [1, 2, 3]
    assert [(event.step, event.why) for event in bench.of(CheckpointRemoved)] == [(1, "retention")]
    saved = bench.of(CheckpointSaved)[-1]
    assert saved.path == str(bench.artifacts.checkpoint(3))
    assert (saved.sha256, saved.bytes) == (
        files.checkpoint_info(3, bench.artifacts.checkpoint(3)).sha256,
        sum(file.stat().st_size for file in bench.artifacts.checkpoint(3).iterdir()),
    )
    state = files.read_state(bench.artifacts.checkpoint(3))
    assert (state.step, state.tokens, state.rows_per_step) == (3, 3, 8)
    assert state.interval == [[3.0, 0.0, 2.0, 0.0]]
    assert (bench.artifacts.out / "pretrain_16.pth").is_file()
    assert bench.saver.saved_at > 0


def test_the_same_step_is_not_written_twice_unless_it_is_damaged(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    bench.save(5)
    file = bench.artifacts.checkpoint(5) / "model.safetensors"
    written = file.stat().st_mtime_ns
    bench.save(5)
    assert file.stat().st_mtime_ns == written
    os.truncate(file, 20)
    bench.save(5)
    assert files.verify(bench.artifacts.checkpoint(5)) is None
    assert [event.message for event in bench.of(WarningEvent)] == ["checkpoint 5 invalid: model.safetensors size"]
    assert (bench.artifacts.checkpoints / ".invalid-step-00000005").is_dir()


def test_a_home_that_is_moved_is_not_created_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In 0.1 later checkpoints were written at the old place, in a directory that the service does not know."""
    monkeypatch.setattr(saver, "RETRY_SECONDS", 0.0)
    run = tmp_path / "home" / "runs" / "job_a"
    bench = Bench(run)
    bench.save(1)
    (tmp_path / "home").rename(tmp_path / "moved")
    bench.save(2)
    assert not (tmp_path / "home").exists()
    [warning] = bench.of(WarningEvent)
    assert warning.code == "save_failed"
    assert "the directory of the run is gone; if it was moved" in warning.message
    with pytest.raises(TrainingError, match="the directory of the run is gone"):
        bench.save(3, required=True)
    (tmp_path / "moved").rename(tmp_path / "home")
    bench.save(4)
    assert [event.step for event in bench.of(CheckpointSaved)] == [1, 4]


class PausedSave:
    """Pauses each save before it is published, until the test sets ``go``."""

    def __init__(self) -> None:
        self.begun, self.go = threading.Event(), threading.Event()
        self._publish = files.write_checkpoint

    def publish(self, *arguments: Any) -> files.CheckpointInfo:
        self.begun.set()
        assert self.go.wait(120)
        return self._publish(*arguments)

    def __enter__(self) -> "PausedSave":
        self._patch = mock.patch.object(files, "write_checkpoint", self.publish)
        self._patch.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.go.set()
        self._patch.stop()


def train_on(train_state: TrainState) -> None:
    """One update, of any kind, in place."""
    for parameter in train_state.model.parameters():
        parameter.grad = torch.ones_like(parameter)
    train_state.optimizer.step()


def test_the_checkpoint_has_the_weights_of_its_step_although_training_continues(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    train_on(bench.train_state)
    weights = {name: value.clone() for name, value in bench.train_state.model.state_dict().items()}
    moments = {
        name: value.clone()
        for name, value in files.optimizer_tensors(bench.train_state.model, bench.train_state.optimizer).items()
    }
    with PausedSave() as paused:
        bench.begin(5)
        assert paused.begun.wait(120)
        assert bench.artifacts.published() == []
        for _ in range(3):
            train_on(bench.train_state)
        paused.go.set()
        bench.saver.wait()
    path = bench.artifacts.checkpoint(5)
    saved, saved_moments = load_file(path / "model.safetensors"), load_file(path / "optimizer.safetensors")
    assert all(torch.equal(value, weights[name]) for name, value in saved.items())
    assert set(saved_moments) == set(moments)
    assert all(torch.equal(value, moments[name]) for name, value in saved_moments.items())
    half = torch.load(bench.artifacts.out / "pretrain_16.pth", weights_only=True)
    assert list(half) == list(weights)
    assert all(torch.equal(value, weights[name].half()) for name, value in half.items())


def test_the_next_save_waits_for_the_one_before(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    with PausedSave() as paused:
        bench.begin(1)
        assert paused.begun.wait(120)
        later = threading.Timer(0.05, paused.go.set)
        later.start()
        bench.begin(2, required=True)
        later.join()
    assert [event.step for event in bench.of(CheckpointSaved)] == [1, 2]


def test_close_waits_for_the_save(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    with PausedSave() as paused:
        bench.begin(3)
        later = threading.Timer(0.05, paused.go.set)
        later.start()
        bench.saver.close()
        later.join()
    assert files.verify(bench.artifacts.checkpoint(3)) is None


def test_an_unexpected_error_in_the_writer_thread_is_raised(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    with mock.patch.object(files, "write_checkpoint", side_effect=ZeroDivisionError("unforeseen")):
        bench.begin(3)
        bench.saver.close()
        with pytest.raises(ZeroDivisionError):
            bench.saver.wait()
    bench.save(4)
    assert [event.step for event in bench.of(CheckpointSaved)] == [4]


def test_without_memory_for_a_copy_training_waits_and_a_warning_is_emitted(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    with mock.patch.object(StagingBuffers, "stage", side_effect=RuntimeError("can't allocate memory")):
        bench.begin(3)
        assert files.verify(bench.artifacts.checkpoint(3)) is None
    (warning,) = bench.of(WarningEvent)
    assert (warning.code, warning.step) == ("save_blocks", 3)
    bench.save(4)
    assert len(bench.of(WarningEvent)) == 1


def test_the_memory_of_an_incomplete_copy_is_freed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bench, buffer = Bench(tmp_path), StagingBuffers._buffer
    allocated: list[weakref.ref[torch.Tensor]] = []

    def short(self: StagingBuffers, name: str, tensor: torch.Tensor) -> torch.Tensor:
        if len(self._buffers) == 3:
            raise MemoryError("can't allocate memory")
        found = buffer(self, name, tensor)
        allocated.append(weakref.ref(found))
        return found

    monkeypatch.setattr(StagingBuffers, "_buffer", short)
    for step in (3, 4):
        bench.save(step)
    gc.collect()
    assert [event.step for event in bench.of(WarningEvent)] == [3, 4]
    assert [ref() for ref in allocated] == [None] * 6
    assert len(bench.train_state.optimizer._optimizer_step_pre_hooks) == 0


def test_the_moments_that_a_rollback_replaces_are_freed(tmp_path: Path) -> None:
    """The save must not keep references to them, or a GPU would hold the optimizer state twice."""
    bench = Bench(tmp_path)
    train_on(bench.train_state)
    bench.save(1)
    moments = [m for state in bench.train_state.optimizer.state.values() for m in state.values()]
    shared = [torch._C._storage_Use_Count(m.untyped_storage()._cdata) for m in moments]
    assert set(shared) == {2}, "the tensor, and the storage object of this line"


def test_staging_reuses_its_memory_and_keeps_tied_weights(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    staging = StagingBuffers(bench.train_state.model, bench.train_state.optimizer)
    first = staging.stage()
    staging.fill()
    assert first.optimizer == {}
    assert list(first.model) == list(bench.train_state.model.state_dict())
    assert first.model["lm_head.weight"] is first.model["model.embed_tokens.weight"]
    train_on(bench.train_state)
    second = staging.stage()
    staging.fill()
    assert {value.data_ptr() for value in second.model.values()} == {v.data_ptr() for v in first.model.values()}
    assert set(files.unique_tensors(second.model)) == set(dict(bench.train_state.model.named_parameters()))
    assert len(second.optimizer) == 3 * len(list(bench.train_state.model.parameters()))


def test_an_update_that_comes_too_soon_waits_for_the_copy(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    staging = StagingBuffers(bench.train_state.model, bench.train_state.optimizer)
    expected = {name: value.clone() for name, value in bench.train_state.model.state_dict().items()}
    copies = staging.stage()
    # The copy is made once the update waits for it, and not before, however busy the machine is.
    is_open, waits, threads = staging.gate._is_open, staging.gate._is_open.wait, list[threading.Thread]()

    def fill_and_wait() -> bool:
        threads.append(threading.Thread(target=staging.fill))
        threads[0].start()
        return waits()

    with mock.patch.object(is_open, "wait", fill_and_wait):
        train_on(bench.train_state)
    (later,) = threads
    later.join()
    assert staging.gate.blocked_seconds > 0
    assert all(torch.equal(value, expected[name]) for name, value in copies.model.items())
    assert not torch.equal(bench.train_state.model.lm_head.weight, expected["lm_head.weight"])
    blocked = staging.gate.blocked_seconds
    train_on(bench.train_state)
    assert staging.gate.blocked_seconds == blocked


def test_the_writer_thread_waits_on_the_device_of_its_rank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train_state, done = Bench(tmp_path).train_state, list[str]()

    @contextlib.contextmanager
    def use(device: torch.device) -> Iterator[None]:
        done.append(f"use {device}")
        yield
        done.append("back")

    staging: Any = StagingBuffers(train_state.model, train_state.optimizer)
    staging._device = torch.device("cuda", 1)
    staging._copy_event = SimpleNamespace(synchronize=lambda: done.append("wait"))
    monkeypatch.setattr(torch.cuda, "device", use)
    staging.fill()
    assert done == ["use cuda:1", "wait", "back"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_the_copy_is_of_its_step() -> None:
    device = torch.device("cuda")
    ranks = DistributedContext(0, 1, 0, 1, device)
    train_state = build_train_state(initial_model(SHAPE, 1, device), spec().training, 0.0, ranks)
    staging = StagingBuffers(train_state.model, train_state.optimizer)
    for _ in range(20):
        train_on(train_state)
        expected = {name: value.cpu() for name, value in train_state.model.state_dict().items()}
        copies = staging.stage()
        train_on(train_state)
        staging.fill()
        assert all(value.is_pinned() and torch.equal(value, expected[name]) for name, value in copies.model.items())


@pytest.mark.parametrize("failures", [1, 2])
@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (PermissionError(13, "Permission denied", "/d"), "Permission denied (/d)"),
        (MemoryError(), "the host is out of memory"),
    ],
)
def test_a_save_is_tried_twice(error: Exception, reason: str, failures: int, tmp_path: Path) -> None:
    bench, real, left = Bench(tmp_path), files.write_checkpoint, iter(range(failures))

    def publish(*arguments: Any) -> files.CheckpointInfo:
        if next(left, None) is not None:
            raise error
        return real(*arguments)

    with mock.patch.object(files, "write_checkpoint", publish), mock.patch.object(saver, "RETRY_SECONDS", 0.0):
        bench.save(4)
    assert len(bench.of(CheckpointSaved)) == 2 - failures
    messages = [event.message for event in bench.of(WarningEvent)]
    assert messages == (
        [f"the checkpoint of step 4 was not saved: {reason}; training continues"] if failures == 2 else []
    )


@pytest.mark.parametrize("required", [False, True])
def test_a_checkpoint_is_saved_even_if_old_ones_cannot_be_deleted(required: bool, tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    broken = PermissionError(13, "Permission denied", "/d")
    with mock.patch.object(retention, "delete_old_checkpoints", side_effect=broken):
        bench.save(4, required=required)
    assert [event.step for event in bench.of(CheckpointSaved)] == [4]
    (warning,) = bench.of(WarningEvent)
    assert (warning.code, warning.step) == ("prune_failed", 4)
    assert "Permission denied (/d)" in warning.message


def test_a_checkpoint_is_saved_even_if_the_weights_file_cannot_be_written(tmp_path: Path) -> None:
    bench = Bench(tmp_path, keep_last=2)
    with mock.patch.object(saver, "RETRY_SECONDS", 0.0):
        bench.artifacts.path.joinpath("out").write_text("a file where a directory belongs")
        for step in (1, 2, 3):
            bench.save(step)
        assert [event.step for event in bench.of(CheckpointSaved)] == [1, 2, 3]
        assert [event.step for event in bench.of(CheckpointRemoved)] == [1], "old ones are deleted all the same"
        assert {event.code for event in bench.of(WarningEvent)} == {"save_failed"}
        assert "the weights file" in bench.of(WarningEvent)[0].message
        with pytest.raises(TrainingError, match="the weights file "):
            bench.save(4, required=True)
    assert bench.of(CheckpointSaved)[-1].step == 4


@pytest.mark.parametrize("damage", [b"\0", b"[", b"7"])
def test_a_damaged_old_state_does_not_end_the_run(damage: bytes, tmp_path: Path) -> None:
    bench = Bench(tmp_path, keep_last=2, keep_every=1)
    bench.metrics.last_loss = 1.5
    bench.save(1)
    state = bench.artifacts.checkpoint(1) / "state.json"
    state.write_bytes((damage * state.stat().st_size)[: state.stat().st_size])
    for step in (2, 3, 4):
        bench.save(step)
    thinned = [(event.step, event.loss) for event in bench.of(CheckpointSaved) if event.checkpoint_kind == "weights"]
    assert thinned == [(1, None), (2, 1.5)]
    assert [(event.step, event.code) for event in bench.of(WarningEvent)] == [(1, "checkpoint_invalid")]
    assert [event.step for event in bench.of(CheckpointRemoved)] == [1, 2]


def test_without_memory_a_required_save_fails_with_host_out_of_memory(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    out = mock.patch.object(files, "write_checkpoint", side_effect=MemoryError)
    with out, mock.patch.object(saver, "RETRY_SECONDS", 0.0), pytest.raises(TrainingError) as failed:
        bench.save(4, required=True)
    assert failed.value.reason == "host_out_of_memory"


def test_a_required_save_that_fails_ends_the_run(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    (tmp_path / "checkpoints").write_text("a file where a directory belongs")
    bench.save(4)
    assert "the checkpoint of step 4 was not saved" in bench.of(WarningEvent)[0].message
    with pytest.raises(TrainingError, match="the checkpoint of step 4 could not be written") as failed:
        bench.save(4, required=True)
    assert failed.value.reason == "disk_full"


def test_save_minutes_are_counted_from_the_last_save(tmp_path: Path) -> None:
    bench = Bench(tmp_path, save_minutes=2.0)
    bench.saver.saved_at = 1000.0
    assert not bench.saver.is_due_by_time(1119.0)
    assert bench.saver.is_due_by_time(1120.0)
    assert not Bench(tmp_path).saver.is_due_by_time(1e9)


def kill_in_save(step: int, at_write: int) -> None:
    """Kill this process in write ``at_write`` of the save of ``step``, after half of its bytes."""
    writes = iter(range(10**9))
    real = os.write
    publish = files.write_checkpoint

    def fatal(descriptor: int, data: Any) -> int:
        if next(writes) == at_write:
            real(descriptor, memoryview(data)[: len(data) // 2])
            os.kill(os.getpid(), signal.SIGKILL)
        return real(descriptor, data)

    def watched(artifacts: Any, state: Any, *rest: Any) -> Any:
        if state.step == step:
            mock.patch.object(os, "write", fatal).start()
        return publish(artifacts, state, *rest)

    mock.patch.object(files, "write_checkpoint", watched).start()


@pytest.mark.slow
def test_a_run_killed_at_any_byte_of_a_save_resumes_from_the_save_before(tmp_path: Path) -> None:
    seed = 77
    chooser = random.Random(seed)
    text = rank_runner.corpus(tmp_path / "corpus.jsonl")
    described = rank_runner.spec(text, training={"max_steps": 6}, checkpoint={"save_interval": 2})
    untouched = rank_runner.new_run(tmp_path / "untouched", described)
    rank_runner.run_to_end(untouched)
    expected = dict(rank_runner.outputs(untouched))
    # About 26 tensors in the model, three times as many in the optimizer, then state and manifest.
    for number, at_write in enumerate(sorted(chooser.sample(range(90), 3))):
        print(f"seed {seed}: killed at write {at_write}")
        run = rank_runner.new_run(tmp_path / f"run-{number}", described)
        killed = rank_runner.start(run, patch=partial(kill_in_save, 4, at_write))
        assert killed.wait() == [-signal.SIGKILL], killed.logs()
        assert [step for step, _ in run.artifacts(None).published()] == [2]
        assert any(path.name.startswith(".saving-") for path in run.artifacts(None).checkpoints.iterdir())
        rank_runner.run_to_end(run)
        assert rank_runner.events(run, 2)[-1].step == 6  # type: ignore[union-attr]
        assert sorted(path.name for path in run.artifacts(None).checkpoints.iterdir()) == [
            "step-00000002",
            "step-00000004",
            "step-00000006",
        ]
        assert dict(rank_runner.outputs(run)) == expected
