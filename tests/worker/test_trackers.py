"""What TensorBoard and Weights & Biases get, read back by TensorBoard's own reader and from the file of the other."""

import importlib.util
import json
import signal
import struct
import sys
import types
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.worker import rank_runner
from tests.worker.test_resume import kill_after
from trainyard.contract.events import Event, HeldOutResult, MetricEvent, WarningEvent
from trainyard.contract.rundir import RunDir
from trainyard.contract.spec import JobSpec
from trainyard.worker.events.trackers import TensorBoard, Trackers

NAMES = ("tensorboard", "wandb")
WITH = {
    name: pytest.mark.skipif(importlib.util.find_spec(name) is None, reason=f"{name} is not installed")
    for name in NAMES
}


def metric(step: int, loss: float = 2.0, **more: Any) -> MetricEvent:
    return MetricEvent(step=step, epoch=0.5, loss=loss, learning_rate=0.1, tokens=4, **more)


class FakeWriter:
    """Stands in for TensorBoard's."""

    logged: list[tuple[Any, ...]] = []  # noqa: RUF012 - shared on purpose
    fails = False

    def __init__(self, directory: str, purge_step: int) -> None:
        self.logged.append(("after", purge_step - 1))

    def add_scalar(self, tag: str, value: float, step: int) -> None:
        if self.fails:
            raise OSError("no space")
        self.logged.append((tag, value, step))

    def flush(self) -> None:
        self.logged.append(("flushed",))

    def close(self) -> None:
        """Nothing is left."""


class FakeRun:
    def __init__(self) -> None:
        self.logged: list[tuple[dict[str, float], int]] = []
        self.finished = False

    def log(self, values: dict[str, float], step: int) -> None:
        self.logged.append((values, step))

    def finish(self) -> None:
        self.finished = True


def wanted() -> JobSpec:
    reporting = {"tensorboard": True, "use_wandb": True, "wandb_project": "p"}
    return JobSpec.model_validate({"name": "mine", "data": {"data_path": "/x"}, "reporting": reporting})


def test_trackers_are_told_what_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    board, wandb, run = types.ModuleType("torch.utils.tensorboard"), types.ModuleType("wandb"), FakeRun()
    given: dict[str, Any] = {}

    def init(**settings: Any) -> FakeRun:
        given.update(settings)
        return run

    vars(board)["SummaryWriter"], vars(wandb)["init"] = FakeWriter, init
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", board)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    said: list[Event] = []
    trackers = Trackers(wanted(), tmp_path / "job_1", said.append)
    trackers.start_at(2)
    trackers.log(metric(3))
    assert FakeWriter.logged == [
        ("after", 2),
        ("loss", 2.0, 3),
        ("learning_rate", 0.1, 3),
        ("tokens", 4.0, 3),
        ("epoch", 0.5, 3),
        ("flushed",),
    ]
    assert run.logged == [({"loss": 2.0, "learning_rate": 0.1, "tokens": 4.0, "epoch": 0.5}, 3)]
    assert (given["project"], given["name"], given["id"], given["resume"]) == ("p", "mine", "job_1", "allow")
    monkeypatch.setattr(FakeWriter, "fails", True)
    for step in (4, 5):
        trackers.log(metric(step))
    assert [event.code for event in said if isinstance(event, WarningEvent)] == ["tensorboard_failed"]
    assert len(run.logged) == 3
    trackers.close()
    assert run.finished


def scalars(directory: Path) -> dict[str, list[tuple[int, float]]]:
    """(step, value) of every tag, as TensorBoard's own reader has them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    read = EventAccumulator(str(directory), size_guidance={"scalars": 0}).Reload()
    return {tag: [(event.step, event.value) for event in read.Scalars(tag)] for tag in read.Tags()["scalars"]}


@WITH["tensorboard"]
def test_going_back_takes_the_points_away_that_were_told_too_early(tmp_path: Path) -> None:
    board = TensorBoard(tmp_path)
    board.start_at(0)
    for step in range(1, 7):
        board.log(metric(step, loss=1.0))
    board.start_at(3)
    for step in (4, 5):
        sets = {"zh": HeldOutResult(loss=3.0, bpb=1.5), "code": HeldOutResult(loss=2.0)}
        board.log(metric(step, loss=2.0, expert_load=[0.2, 0.3, 0.5], bpb=1.25, eval_bpb=1.0, eval=sets))
    found = scalars(tmp_path)
    assert found["loss"] == [(1, 1), (2, 1), (3, 1), (4, 2), (5, 2)]
    assert [value for _, value in found["expert_load_most"]] == [0.5, 0.5]
    assert [step for step, _ in found["expert_load_least"]] == [4, 5]
    assert found["bpb"] == [(4, 1.25), (5, 1.25)]
    assert found["eval_bpb"] == [(4, 1), (5, 1)]
    assert found["eval/zh/loss"] == [(4, 3), (5, 3)]
    assert found["eval/zh/bpb"] == [(4, 1.5), (5, 1.5)]
    assert "eval/code/loss" in found
    assert "eval/code/bpb" not in found
    board.close()


def killed_and_resumed(path: Path, tracker: dict[str, Any], environment: dict[str, str] | None = None) -> RunDir:
    """24 steps with a line each; killed after the 13th, gone on with from before."""
    described = rank_runner.spec(rank_runner.corpus(path / "c.jsonl"), reporting={"log_interval": 1, **tracker})
    run = rank_runner.new_run(path / "run", described)
    assert rank_runner.start(run, 1, partial(kill_after, 13), environment=environment).wait() == [-signal.SIGKILL]
    assert rank_runner.run_to_end(run, environment=environment).step == 24
    assert rank_runner.warned(run, 1) == rank_runner.warned(run, 2) == {}
    assert min(rank_runner.metrics(run, 2)) <= 9 < max(rank_runner.metrics(run, 1)), "some steps were logged twice"
    return run


@pytest.mark.slow
@WITH["tensorboard"]
def test_tensorboard_reads_each_step_of_a_resumed_run_once(tmp_path: Path) -> None:
    run = killed_and_resumed(tmp_path, {"tensorboard": True})
    assert len(list((run.path / "tensorboard").iterdir())) == 2
    found, lines = scalars(run.path / "tensorboard"), {**rank_runner.metrics(run, 1), **rank_runner.metrics(run, 2)}
    measured = {"tokens_per_second", "step_seconds", "data_seconds", "memory_bytes"}
    assert set(found) == {"loss", "bpb", "learning_rate", "grad_norm", "tokens", "epoch", *measured}
    for tag, points in found.items():
        assert [step for step, _ in points] == list(range(1, 25)), tag
        assert [value for _, value in points] == pytest.approx([getattr(lines[s], tag) for s, _ in points]), tag


def rows(file: Path) -> Iterator[dict[str, Any]]:
    """The history in one of W&B's files: records in blocks of 32 KiB, as LevelDB's log has them."""
    from wandb.proto import wandb_internal_pb2

    data, at, body = file.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if (left := 32768 - at % 32768) < 7:
            at += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        body, at = body + data[at + 7 : at + 7 + length], at + 7 + length
        if kind in (1, 4):  # whole, or its last part
            record = wandb_internal_pb2.Record.FromString(body)
            if record.WhichOneof("record_type") == "history":
                items = record.history.item
                yield {item.key or item.nested_key[0]: json.loads(item.value_json) for item in items}
            body = b""


@pytest.mark.slow
@WITH["wandb"]
def test_wandb_keeps_a_run_on_disk_where_nobody_listens(tmp_path: Path) -> None:
    run = killed_and_resumed(tmp_path, {"use_wandb": True}, {"WANDB_MODE": "offline"})
    files = sorted(run.path.glob("wandb/offline-run-*/run-*.wandb"))
    assert [file.name for file in files] == ["run-run.wandb"] * 2, "both attempts are of one run"
    found, lines = list(rows(files[1])), rank_runner.metrics(run, 2)
    assert [row["_step"] for row in found] == list(lines)
    for tag in ("loss", "learning_rate", "grad_norm", "tokens", "epoch"):
        assert [row[tag] for row in found] == [getattr(line, tag) for line in lines.values()], tag
    # Of a process that is killed, the last seconds are missing there: the library writes them every now and then.
    earlier = [row["_step"] for row in rows(files[0])]
    assert earlier == list(range(1, len(earlier) + 1))


@pytest.mark.slow
@WITH["wandb"]
def test_wandb_without_a_key_is_a_warning(tmp_path: Path) -> None:
    described = rank_runner.spec(
        rank_runner.corpus(tmp_path / "c.jsonl"), training={"max_steps": 2}, reporting={"use_wandb": True}
    )
    run = rank_runner.new_run(tmp_path / "run", described)
    environment = {"WANDB_MODE": "online", "WANDB_API_KEY": "", "HOME": str(tmp_path)}
    assert rank_runner.run_to_end(run, environment=environment).outcome == "completed"
    assert "wandb failed" in rank_runner.warned(run)["wandb_failed"].message
