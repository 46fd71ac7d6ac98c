"""What the trackers get, read back by their own readers, and that a failing one is a warning and no more."""

import importlib.util
import json
import os
import signal
import struct
import subprocess
import sys
import time
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
from trainyard.worker.events.trackers import TensorBoard, TrackerFailed, TrackerProcess, Trackers, requested

NAMES = ("tensorboard", "wandb", "swanlab", "trackio")
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


FAKE = """
import json, os, sys, time
def record(**what):
    with open(os.path.join(os.environ["FAKE_TRACKERS"], __name__), "a") as file:
        file.write(json.dumps(what) + "\\n")
class Run:
    def log(self, values, step):
        if os.environ.get("FAKE_FAILS") == __name__: raise OSError("the server said no")
        record(step=step, loss=values["loss"])
    def finish(self):
        record(finished=True)
def init(**settings):
    print("a library prints")
    if os.environ.get("FAKE_HANGS") == __name__: time.sleep(600)
    record(init={name: settings.get(name) for name in ("project", "name", "id", "resume")})
    return Run()
"""


@pytest.fixture
def fakes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Stand-ins for the libraries: packages that their processes import. Returns the folder of what they got."""
    packages, got = tmp_path / "packages", tmp_path / "got"
    packages.mkdir()
    got.mkdir()
    for name in ("wandb", "swanlab", "trackio"):
        (packages / f"{name}.py").write_text(FAKE)
    monkeypatch.syspath_prepend(str(packages))
    monkeypatch.setenv("PYTHONPATH", f"{packages}:{os.environ.get('PYTHONPATH', '')}")
    monkeypatch.setenv("FAKE_TRACKERS", str(got))
    (tmp_path / "job_1").mkdir()
    return got


def got(fakes: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (fakes / name).read_text().splitlines()]


def wanted(*names: str, **reporting: Any) -> JobSpec:
    reporting = {"trackers": list(names), "wandb_project": "p", **reporting}
    return JobSpec.model_validate({"name": "mine", "data": {"data_path": "/x"}, "reporting": reporting})


def warned(said: list[Event]) -> list[str]:
    return [event.code for event in said if isinstance(event, WarningEvent)]


def test_tensorboard_gets_what_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    board = types.ModuleType("torch.utils.tensorboard")
    vars(board)["SummaryWriter"] = FakeWriter
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", board)
    monkeypatch.setattr(FakeWriter, "logged", [])
    said: list[Event] = []
    trackers = Trackers(wanted(tensorboard=True), tmp_path / "job_1", said.append)
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
    monkeypatch.setattr(FakeWriter, "fails", True)
    for step in (4, 5):
        trackers.log(metric(step))
    assert warned(said) == ["tensorboard_failed"]
    trackers.close()


def test_each_tracker_continues_the_run_of_its_job(tmp_path: Path, fakes: Path) -> None:
    """Six steps, then from step 3 again: W&B and SwanLab ignore repeated steps, trackio gets none."""
    for start, steps in ((0, range(1, 7)), (3, range(4, 9))):
        said: list[Event] = []
        trackers = Trackers(wanted("wandb", "swanlab", "trackio"), tmp_path / "job_1", said.append)
        trackers.start_at(start)
        for step in steps:
            trackers.log(metric(step, loss=float(start)))
        trackers.close()
        assert said == []
    runs = {name: [line["init"] for line in got(fakes, name) if "init" in line] for name in ("wandb", "trackio")}
    assert runs["wandb"] == [{"project": "p", "name": "mine", "id": "job_1", "resume": "allow"}] * 2
    assert runs["trackio"] == [{"project": "p", "name": "job_1", "id": None, "resume": "allow"}] * 2
    logged = {name: [line["step"] for line in got(fakes, name) if "step" in line] for name in fakes_names(fakes)}
    assert logged["wandb"] == logged["swanlab"] == [1, 2, 3, 4, 5, 6, 4, 5, 6, 7, 8]
    assert logged["trackio"] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert all(got(fakes, name)[-1] == {"finished": True} for name in fakes_names(fakes))


def fakes_names(fakes: Path) -> list[str]:
    return sorted(file.name for file in fakes.iterdir())


def test_going_back_within_an_attempt_repeats_no_point_in_trackio(tmp_path: Path, fakes: Path) -> None:
    said: list[Event] = []
    trackers = Trackers(wanted("trackio"), tmp_path / "job_1", said.append)
    trackers.start_at(0)
    for step in (1, 2, 3):
        trackers.log(metric(step))
    trackers.start_at(1)
    for step in (2, 3, 4):
        trackers.log(metric(step))
    trackers.close()
    assert [line["step"] for line in got(fakes, "trackio") if "step" in line] == [1, 2, 3, 4]


def test_one_that_fails_is_a_warning_once_and_the_others_go_on(
    tmp_path: Path, fakes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_FAILS", "swanlab")
    said: list[Event] = []
    trackers = Trackers(wanted("swanlab", "trackio"), tmp_path / "job_1", said.append)
    trackers.start_at(0)
    deadline = time.monotonic() + 60
    step = 0
    while not said and time.monotonic() < deadline:
        step += 1
        trackers.log(metric(step))
        time.sleep(0.01)
    trackers.log(metric(step + 1))
    trackers.close()
    [warning] = said
    assert isinstance(warning, WarningEvent)
    assert warning.code == "swanlab_failed"
    assert warning.message == "swanlab failed and gets no more metrics: OSError: the server said no"
    assert [line["step"] for line in got(fakes, "trackio") if "step" in line] == list(range(1, step + 2))


def test_one_that_hangs_does_not_hold_up_a_step(tmp_path: Path, fakes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is found when a megabyte of points waits for it, and otherwise at the end."""
    monkeypatch.setenv("FAKE_HANGS", "trackio")
    said: list[Event] = []
    trackers = Trackers(wanted("trackio"), tmp_path / "job_1", said.append)
    trackers.start_at(0)
    longest = 0.0
    for step in range(1, 20_000):
        begin = time.process_time()
        trackers.log(metric(step))
        longest = max(longest, time.process_time() - begin)
        if said:
            break
    assert warned(said) == ["trackio_failed"]
    assert "does not read its points" in said[0].message if isinstance(said[0], WarningEvent) else False
    assert longest < 0.5
    process = TrackerProcess("trackio", wanted(), tmp_path / "job_1", close_seconds=0.2)
    with pytest.raises(TrackerFailed, match=r"did not end within 0\.2 s"):
        process.close()


def test_a_tracker_with_a_large_spec_is_not_taken_for_hung(tmp_path: Path) -> None:
    described = wanted().model_dump(mode="json")
    described["data"]["data_path"] = [f"/data/{number:0200}.jsonl" for number in range(8000)]
    idle = (sys.executable, "-c", "import time; time.sleep(600)")
    process = TrackerProcess("json", JobSpec.model_validate_json(json.dumps(described)), tmp_path / "job_1", idle)
    try:
        process.log(metric(1))
    finally:
        process.abandon()


def test_one_that_is_missing_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("wandb", "swanlab", "trackio"):
        monkeypatch.setitem(sys.modules, name, None)
    said: list[Event] = []
    trackers = Trackers(wanted("wandb", "swanlab", "trackio"), tmp_path, said.append)
    trackers.start_at(0)
    trackers.log(metric(1))
    trackers.close()
    assert warned(said) == ["wandb_missing", "swanlab_missing", "trackio_missing"]


def test_use_wandb_is_what_is_installed(fakes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert requested(wanted(use_wandb=True)) == ["wandb"]
    assert requested(wanted("wandb", "tensorboard", use_wandb=True, tensorboard=True)) == ["tensorboard", "wandb"]
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert requested(wanted(use_wandb=True)) == ["swanlab"]
    monkeypatch.setitem(sys.modules, "swanlab", None)
    assert requested(wanted(use_wandb=True)) == ["wandb"], "so that the warning names what to install"


def run_twice(path: Path, name: str) -> Path:
    """Six steps and, from step 3 again, five of another loss, by the library itself."""
    run = path / "job_1"
    run.mkdir()
    for start, steps in ((0, range(1, 7)), (3, range(4, 9))):
        tracker = TrackerProcess(name, wanted(name), run, close_seconds=240)  # of a busy machine
        tracker.start_at(start)
        for step in steps:
            tracker.log(metric(step, loss=float(start + 1)))
        tracker.close()
    return run


@pytest.mark.long
@WITH["trackio"]
def test_trackio_reads_back_each_step_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    run_twice(tmp_path, "trackio")
    code = "import json, trackio.sqlite_storage as s; print(json.dumps(s.SQLiteStorage.get_logs('p', 'job_1')))"
    read = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    found = [(row["step"], row["loss"]) for row in json.loads(read.stdout.splitlines()[-1])]
    assert found == [(step, 1.0) for step in range(1, 7)] + [(7, 4.0), (8, 4.0)]


@pytest.mark.long
@WITH["swanlab"]
def test_swanlab_keeps_an_experiment_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both attempts have one id, and `swanlab sync` leaves out the steps that it has."""
    from swanlab.proto.swanlab.record.v1.record_pb2 import Record
    from swanlab.sdk.internal.core_python.store import DataStoreReader

    monkeypatch.setenv("SWANLAB_MODE", "offline")
    run = run_twice(tmp_path, "swanlab")
    files = sorted(run.glob("swanlab/run-*/run-*.swanlab"))
    assert [file.name for file in files] == ["run-job_1.swanlab"] * 2
    found = []
    for file in files:
        reader = DataStoreReader()
        reader.open(file)
        records = [Record.FromString(data) for data in reader]
        reader.close()
        found += [(r.scalar.step, r.scalar.value.number) for r in records if r.scalar.key == "loss"]
    assert found == [(step, 1.0) for step in range(1, 7)] + [(step, 4.0) for step in range(4, 9)]


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
