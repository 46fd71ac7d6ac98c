import json
import os
import shlex
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx2
import pytest

from tests.client.fake_service import QUICK, URL, FakeService, console, job, metric, written
from trainyard.client.api import Client
from trainyard.client.demo import story
from trainyard.client.demo.service import ServiceFailed
from trainyard.client.demo.story import (
    EVERY,
    KILL_AFTER,
    LEARNED_LOSS,
    LOG_INTERVAL,
    PAUSE_AFTER,
    SAVE_INTERVAL,
    STEPS,
    UNTRAINED_LOSS,
    LossPrinter,
    Machine,
    Story,
    curl,
    damaged_files,
    demo_home,
    done_again,
    done_twice,
    kill_one,
    loss_line,
    past,
    ranks_of,
    running_again,
    spec,
    weights_of,
)
from trainyard.client.download import sha256
from trainyard.client.errors import WaitTimedOut
from trainyard.contract.parsing import parse_spec
from trainyard.contract.processes import MARKER

FAKE_JOB = "job_7f3kq9"
JOB = "job_demo"


class PlayedService(FakeService):
    """Goes 30 steps further at each poll, and does what the story requests, as a real one would."""

    def __init__(self, home: Path, last_loss: float = 4.9) -> None:
        super().__init__()
        self.home, self.step, self.attempt, self.status = home, 0, 1, "running"
        self.last_loss = last_loss
        self.recovered_loss_is_off_by = 0.0
        self.curve = []

    def answer(self, request: httpx2.Request) -> httpx2.Response:
        path = request.url.path
        if request.method == "POST" and path == "/jobs":
            self.jobs[JOB] = self.now()
            return httpx2.Response(201, json=self.jobs[JOB])
        if path == f"/jobs/{JOB}/pause":
            self.status = "paused"
            self.save()
        if path == f"/jobs/{JOB}/resume":
            self.status, self.attempt = "running", 2
        if request.method == "GET" and path == f"/jobs/{JOB}":
            self.proceed()
        if JOB in self.jobs:
            self.jobs[JOB] = self.now()
        return super().answer(request)

    def proceed(self) -> None:
        if self.status == "running":
            for _ in range(3):
                self.step += LOG_INTERVAL
                off = self.recovered_loss_is_off_by if self.attempt == 3 else 0.0
                loss = 8.76 + (self.last_loss - 8.76) * self.step / STEPS + off
                self.curve.append(metric(self.step, loss, attempt=self.attempt))
                if self.step >= STEPS:
                    self.status = "succeeded"
                    self.save()
                    self.rows["samples"] = [{"step": STEPS, "prompt": "Return the", "text": " list of\nfiles."}]
                    return

    def save(self) -> None:
        folder = self.home / "checkpoints" / f"step-{self.step:08d}"
        folder.mkdir(parents=True)
        (folder / "model.safetensors").write_bytes(b"weights")
        told = {"bytes": 7, "sha256": sha256(folder / "model.safetensors")}
        (folder / "manifest.json").write_text(json.dumps({"files": {"model.safetensors": told}}))
        (self.home / "out").mkdir(exist_ok=True)
        (self.home / "out" / "pretrain_128.pth").write_bytes(b"half")
        row = {"id": "1", "step": self.step, "path": str(folder), "sha256": told["sha256"], "kind": "full"}
        self.rows["checkpoints"] = [row, *self.rows.get("checkpoints", [])]

    def crash(self) -> None:
        self.attempt, self.step = 3, KILL_AFTER // SAVE_INTERVAL * SAVE_INTERVAL

    def now(self) -> dict[str, Any]:
        spec = {"model": {"hidden_size": 128, "use_moe": False}, "checkpoint": {"save_weight": "pretrain"}}
        saved = next(iter(self.rows.get("checkpoints", [])), None)
        progress = {"step": self.step, "steps": STEPS, "loss": self.curve[-1]["loss"] if self.curve else None}
        return job(
            self.status, id=JOB, name="demo", attempt=self.attempt, spec=spec, checkpoint=saved, progress=progress
        )


class FakeDemoService:
    """Replaces the demo's service process."""

    def __init__(self, home: Path) -> None:
        self.home, self.url = home, URL

    def __enter__(self) -> "FakeDemoService":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def start(self) -> str:
        return URL

    def tail(self, _lines: int) -> list[str]:
        return ["the service's last words"]

    def detach(self) -> int:
        return 4711


@pytest.fixture
def played(tmp_path: Path) -> PlayedService:
    return PlayedService(tmp_path)


@pytest.fixture
def perform(
    played: PlayedService, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[int, str, str]]:
    """The story with a played service: (exit code, stdout, stderr)."""

    def write_corpus(file: Path) -> int:
        file.write_text('{"text": "a"}\n')
        return 1

    def kill_one(job_id: str, attempt: int) -> tuple[int, int]:
        assert (job_id, attempt) == (JOB, 2)
        played.crash()
        return 1, 12345

    def connected(*_: Any, **__: Any) -> Client:
        return Client(URL, "", retries=QUICK, transport=played.transport)

    monkeypatch.setattr(story, "DemoService", FakeDemoService)
    monkeypatch.setattr(story, "Client", connected)
    monkeypatch.setattr(story, "write_corpus", write_corpus)
    monkeypatch.setattr(story, "kill_one", kill_one)
    monkeypatch.setattr(Story, "_tokenizer", lambda _: None)
    monkeypatch.setattr("trainyard.client.demo.story.INTERVAL", 0.001)

    def run(**options: Any) -> tuple[int, str, str]:
        to = console()
        code = story.run(SimpleNamespace(**({"home": str(tmp_path), "keep": False} | options)), to)
        return (int(code), *written(to))

    return run


def test_the_whole_story_fits_on_a_screen(perform: Callable[..., tuple[int, str, str]], played: PlayedService) -> None:
    code, out, err = perform()
    lines = out.splitlines()
    assert (code, err) == (0, "")
    assert len(lines) < 40
    labels = [line.split()[0] for line in lines if not line.startswith(" ")]
    assert labels == [
        *("machine", "home", "corpus", "service", "plan", "submit", "pause", "resume", "accident"),
        *("finished", "checkpoint", "weights", "exported", "sample", "next"),
    ]
    assert f"$ curl -sS -X POST {URL}/jobs/{JOB}/pause" in out
    assert f"saved at step {played.rows['checkpoints'][-1]['step']}, verified" in out
    assert "$ kill -9 12345   (rank 1" in out
    assert "before the accident" in out
    assert "loss 4.900, 56 % of the first loss" in out
    assert "prompt 'Return the': list of files." in out
    paused_at = played.rows["checkpoints"][-1]["step"]
    assert PAUSE_AFTER <= paused_at < PAUSE_AFTER + 60


def test_keep_prints_how_to_reach_the_service(perform: Callable[..., tuple[int, str, str]]) -> None:
    code, out, _ = perform(keep=True)
    assert code == 0
    assert "process 4711" in out
    assert f"trainyard list --url {URL}" in out


def test_a_model_that_has_not_learned_fails_the_demo(
    perform: Callable[..., tuple[int, str, str]], played: PlayedService
) -> None:
    played.last_loss = 5.3
    code, _, err = perform()
    assert code == 1
    assert "the loss is 5.3" in err
    assert "must be below 5.26" in err


def test_a_recovered_run_that_is_another_one_fails_the_demo(
    perform: Callable[..., tuple[int, str, str]], played: PlayedService
) -> None:
    played.recovered_loss_is_off_by = 1e-9
    code, _, err = perform()
    assert code == 1
    assert "the recovered run is not the same run" in err


def test_a_failed_run_is_explained(
    perform: Callable[..., tuple[int, str, str]], played: PlayedService, monkeypatch: pytest.MonkeyPatch
) -> None:
    card = {"code": "data_invalid", "message": "line 7 is no JSON", "hint": "remove it", "rank": 0, "traceback": None}
    played.log = "what rank 0 said\n"
    played.rows["events"] = [{"at": "2026-01-31T16:31:10Z", "kind": "saved", "message": "step 100"}]
    now = played.now
    monkeypatch.setattr(
        played, "now", lambda: {**now(), "status": "failed", "error": card, "message": "line 7 is no JSON"}
    )
    code, _, err = perform()
    assert code == 1
    for part in (
        "instead of running: line 7",
        "error: line 7 is no JSON (rank 0)",
        "hint: remove it",
        "what rank 0 said",
    ):
        assert part in err
    assert "the service's last words" in err
    assert "failed, attempt 1, phase" in err
    assert "2026-01-31T16:31:10Z saved: step 100" in err


def test_a_slow_machine_does_not_fail_the_demo(
    perform: Callable[..., tuple[int, str, str]], played: PlayedService, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every poll takes a minute, and finds three points more."""
    clock = SimpleNamespace(now=0.0)

    def sleep(_: float) -> None:
        clock.now += 60.0

    for module in ("api", "connection"):
        fake = SimpleNamespace(monotonic=lambda: clock.now, sleep=sleep)
        monkeypatch.setattr(f"trainyard.client.{module}.time", fake)
    code, _, err = perform()
    assert (code, err) == (0, "")
    assert clock.now > 2 * story.STALL_SECONDS


@pytest.mark.long
def test_a_run_that_stands_still_fails_the_demo(
    perform: Callable[..., tuple[int, str, str]], played: PlayedService, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(played, "proceed", lambda: None)
    monkeypatch.setattr(LossPrinter.until, "__defaults__", (0.0,))
    code, _, err = perform()
    assert code == 1
    assert "without progress, and the job is running" in err


def test_a_service_that_does_not_start_is_explained(
    perform: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def start(_: FakeDemoService) -> str:
        raise ServiceFailed("the service ended with exit code 1")

    monkeypatch.setattr(FakeDemoService, "start", start)
    code, _, err = perform()
    assert code == 1
    assert "the demo failed: the service ended with exit code 1" in err
    assert "the service's last words" in err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_ctrl_c_and_a_closed_terminal_end_the_run_too(
    perform: Callable[..., tuple[int, str, str]],
    played: PlayedService,
    monkeypatch: pytest.MonkeyPatch,
    number: signal.Signals,
) -> None:
    def interrupted(*_: Any) -> tuple[int, int]:
        signal.raise_signal(number)
        raise AssertionError("the signal did not end the demo")

    def answer(request: httpx2.Request) -> httpx2.Response:
        if request.url.path.endswith("/kill"):
            killed.append(request.url.path)
            played.status = "cancelled"
        return real(request)

    killed: list[str] = []
    real = played.answer
    monkeypatch.setattr(played, "answer", answer)
    monkeypatch.setattr(story, "kill_one", interrupted)
    # A background job of a shell, or one under nohup, ignores some of them.
    before = signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    try:
        assert perform()[0] == 130
    finally:
        signal.signal(number, before)
    assert killed == [f"/jobs/{JOB}/kill"]


def test_each_demo_has_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "trainyard-home" / "demo-2").mkdir(parents=True)
    names = [demo_home(None).name for _ in range(3)]
    assert names == ["demo-1", "demo-3", "demo-4"]
    assert demo_home("here") == tmp_path / "here"


def test_a_tokenizer_that_fails_is_explained(tmp_path: Path) -> None:
    service: Any = FakeDemoService(tmp_path)
    with pytest.raises(story.DemoFailed, match="training the tokenizer ended with 1"):
        Story(tmp_path, service, console())._tokenizer()


# The run


@pytest.mark.parametrize(
    "machine", [Machine(1, 1, 0), Machine(2, 1, 0), Machine(64, 1, 0), Machine(8, 1, 1), Machine(8, 1, 8)]
)
def test_the_recipe_is_a_valid_spec(machine: Machine) -> None:
    made = parse_spec(spec(machine, Path("/c.jsonl"), Path("/t")))
    assert made.problems == ()
    assert made.spec.rows_per_step == 16
    assert made.spec.resources.nproc_per_node == machine.ranks
    assert made.spec.training.max_steps == STEPS


def test_the_accident_happens_where_there_is_something_to_compare() -> None:
    saved_before = KILL_AFTER // SAVE_INTERVAL * SAVE_INTERVAL
    assert SAVE_INTERVAL < PAUSE_AFTER < saved_before < KILL_AFTER - 20
    assert KILL_AFTER < saved_before + SAVE_INTERVAL < STEPS
    assert pytest.approx(0.6 * UNTRAINED_LOSS) == LEARNED_LOSS
    assert round(UNTRAINED_LOSS, 2) == 8.76


def test_the_machine_in_words(tmp_path: Path) -> None:
    (tmp_path / "nvidia0").touch()
    (tmp_path / "nvidiactl").touch()
    assert Machine.found(tmp_path).gpus == 1
    assert Machine.found(tmp_path / "none").cores == len(os.sched_getaffinity(0))


@pytest.mark.parametrize(("flags", "dtype"), [("avx2 avx512_bf16", "bfloat16"), ("avx2 avx512f", "float32")])
def test_bfloat16_is_used_where_the_cores_have_it(tmp_path: Path, flags: str, dtype: str) -> None:
    (tmp_path / "cpuinfo").write_text(f"flags : {flags}\n")
    machine = Machine.found(tmp_path, tmp_path / "cpuinfo")
    assert spec(machine, tmp_path, tmp_path)["training"]["dtype"] == dtype


def test_a_machine_describes_itself() -> None:
    assert "2 cores, 8.0 GB memory, no GPU" in str(Machine(2, 8_000_000_000, 0))
    assert str(Machine(1, 1, 0)).endswith("1 rank on the CPU")
    assert str(Machine(4, 1, 3)).endswith("2 ranks on the GPU")


def test_curl_can_be_copied(tmp_path: Path) -> None:
    awkward = tmp_path / "it's a spec.json"
    line = curl("POST", "http://h/jobs?a=1&b=2", awkward)
    assert shlex.split(line) == [
        *("curl", "-sS", "-X", "POST", "-H", "Content-Type: application/json"),
        *("-d", f"@{awkward}", "http://h/jobs?a=1&b=2"),
    ]
    assert curl("GET", "http://h/jobs") == "curl -sS http://h/jobs"


def test_curl_does_what_it_says_in_a_shell(tmp_path: Path) -> None:
    file = tmp_path / "a b.json"
    file.write_text('{"a": 1}')
    shown = curl("POST", "http://127.0.0.1:1/jobs", file).replace("curl", "printf '%s\\n'", 1)
    done = subprocess.run(shown, shell=True, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-2:] == [f"@{file}", "http://127.0.0.1:1/jobs"]


# Loss lines


def test_a_loss_line() -> None:
    assert loss_line(metric(50, 4.38), 8.76) == f"step   50   loss 4.380   {'#' * 12}{'-' * 12}   lr 2.61e-04"
    assert "loss -   ----" in loss_line(metric(50, None), 8.76)


def test_each_line_is_printed_once(service: FakeService, trainyard: Client) -> None:
    said: list[str] = []
    lines = LossPrinter(trainyard, FAKE_JOB, 8.76, said.append)
    service.curve = [metric(step) for step in range(10, EVERY + 11, 10)]
    for _ in range(2):
        lines.until(lambda _: True)
    service.curve += [metric(step, attempt=2) for step in range(EVERY, 2 * EVERY + 1, 10)]
    lines.until(lambda _: True)
    assert [line.split()[1] for line in said] == ["10", str(EVERY), str(2 * EVERY)]


def test_waiting_is_bounded_and_ends_with_a_failure(service: FakeService, trainyard: Client) -> None:
    lines = LossPrinter(trainyard, FAKE_JOB, 8.76, print)
    with pytest.raises(WaitTimedOut):
        lines.until(lambda _: False, 0.0)
    service.jobs[FAKE_JOB] = job("failed")
    assert lines.until(lambda _: False, 0.0)["status"] == "failed"


def changed(one: Any, **changes: Any) -> Any:
    return {**one, **changes}


def test_the_conditions(service: FakeService, trainyard: Client) -> None:
    running: Any = job("running", attempt=2)
    assert past(12400)(running)
    assert not past(12401)(running)
    assert past(99999)(changed(running, status="paused"))
    assert not past(1)(changed(running, progress=None))
    assert running_again(1)(running)
    assert not running_again(2)(running)
    assert not running_again(1)(changed(running, phase="loading"))
    service.curve = [metric(100, attempt=1)]
    assert not done_again(trainyard, 100)(running)
    service.curve.append(metric(100, attempt=2))
    assert done_again(trainyard, 100)(running)
    assert not done_again(trainyard, 101)(running)


# Proofs


def test_a_damaged_checkpoint_is_found(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    told = {"bytes": 7, "sha256": sha256(tmp_path / "model.safetensors")}
    (tmp_path / "manifest.json").write_text(json.dumps({"files": {"model.safetensors": told}}))
    assert damaged_files(tmp_path) == []
    (tmp_path / "model.safetensors").write_bytes(b"weightz")
    assert damaged_files(tmp_path) == ["model.safetensors"]
    (tmp_path / "model.safetensors").unlink()
    assert damaged_files(tmp_path) == ["model.safetensors"]
    (tmp_path / "manifest.json").unlink()
    assert damaged_files(tmp_path) == ["manifest.json"]


def test_steps_done_twice() -> None:
    before = [metric(10, 5.0), metric(20, 4.0), metric(30, 3.0)]
    after = [metric(30, 3.0, attempt=2), metric(40, 2.0, attempt=2)]
    assert done_twice(before, after) == [(30, 3.0, 3.0)]


def test_the_weights_file(tmp_path: Path) -> None:
    made = {"spec": {"model": {"hidden_size": 128, "use_moe": True}, "checkpoint": {"save_weight": "pretrain"}}}
    checkpoint = tmp_path / "checkpoints" / "step-00000010"
    with pytest.raises(FileNotFoundError, match=r"pretrain_128_moe\.pth"):
        weights_of(made, checkpoint)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "pretrain_128_moe.pth").touch()
    assert weights_of(made, checkpoint) == tmp_path / "out" / "pretrain_128_moe.pth"


# Ranks


@pytest.fixture
def attempt() -> Iterator[str]:
    """Two processes that look like the ranks of an attempt, and one like its agent."""
    mark = f"job_{os.getpid()}"
    variables: list[dict[str, str]] = [{"RANK": "0"}, {"RANK": "1"}, {}]
    environments = [{"PATH": os.environ["PATH"], MARKER: f"{mark}/1", **one} for one in variables]
    processes = [subprocess.Popen(["sleep", "60"], env=environment) for environment in environments]
    yield mark
    for process in processes:
        process.kill()
        process.wait()


def test_ranks_are_found_by_their_marker(attempt: str) -> None:
    deadline = time.monotonic() + 50
    while len(ranks_of(attempt, 1)) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert sorted(ranks_of(attempt, 1)) == [0, 1]
    assert ranks_of(attempt, 2) == {}


def test_only_the_highest_rank_is_killed(attempt: str) -> None:
    rank, pid = kill_one(attempt, 1)
    assert rank == 1
    ended = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    assert ended is not None
    assert ended.si_status == signal.SIGKILL
    assert 0 in ranks_of(attempt, 1)


def test_no_rank_to_kill_is_an_error() -> None:
    with pytest.raises(LookupError, match="no rank of job_none, attempt 1"):
        kill_one("job_none", 1, seconds=0.05)
