import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx2
import pytest

from client.api import Trainyard
from client.demo import story
from client.demo.proof import sha256
from client.demo.recipe import KILL_AFTER, LOG_INTERVAL, PAUSE_AFTER, SAVE_INTERVAL, STEPS
from client.demo.server import ServiceFailed
from client.demo.story import Story, demo_home
from tests.client.fake_service import QUICK, URL, FakeService, console, job, metric, written

JOB = "job_demo"


class PlayedService(FakeService):
    """Goes 30 steps further at each look, and does what the story asks of it, as a real one would."""

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


class StoodInFor:
    """The demo's service process, without the process."""

    def __init__(self, home: Path) -> None:
        self.home, self.url = home, URL

    def __enter__(self) -> "StoodInFor":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def start(self) -> str:
        return URL

    def tail(self, _lines: int) -> list[str]:
        return ["the service's last words"]

    def release(self) -> int:
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

    def connected(*_: Any, **__: Any) -> Trainyard:
        return Trainyard(URL, "", patience=QUICK, transport=played.transport)

    monkeypatch.setattr(story, "DemoService", StoodInFor)
    monkeypatch.setattr(story, "Trainyard", connected)
    monkeypatch.setattr(story, "write_corpus", write_corpus)
    monkeypatch.setattr(story, "kill_one", kill_one)
    monkeypatch.setattr(Story, "_tokenizer", lambda _: None)
    monkeypatch.setattr("client.demo.loss_lines.INTERVAL", 0.001)

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
    assert "loss 4.900, 56 % of where it began" in out
    assert "from 'Return the' it wrote: list of files." in out
    paused_at = played.rows["checkpoints"][-1]["step"]
    assert PAUSE_AFTER <= paused_at < PAUSE_AFTER + 60


def test_keep_says_how_to_reach_the_service(perform: Callable[..., tuple[int, str, str]]) -> None:
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
    assert "the recovered run is another one" in err


def test_a_failed_run_is_explained(
    perform: Callable[..., tuple[int, str, str]], played: PlayedService, monkeypatch: pytest.MonkeyPatch
) -> None:
    card = {"code": "data_invalid", "message": "line 7 is no JSON", "hint": "remove it", "rank": 0, "traceback": None}
    played.log = "what rank 0 said\n"
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


def test_a_service_that_does_not_start_is_explained(
    perform: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def start(_: StoodInFor) -> str:
        raise ServiceFailed("the service ended with exit code 1")

    monkeypatch.setattr(StoodInFor, "start", start)
    code, _, err = perform()
    assert code == 1
    assert "the demo failed: the service ended with exit code 1" in err
    assert "the service's last words" in err


def test_ctrl_c_ends_the_run_too(
    perform: Callable[..., tuple[int, str, str]], played: PlayedService, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any) -> tuple[int, int]:
        raise KeyboardInterrupt

    def answer(request: httpx2.Request) -> httpx2.Response:
        if request.url.path.endswith("/kill"):
            killed.append(request.url.path)
            played.status = "cancelled"
        return real(request)

    killed: list[str] = []
    real = played.answer
    monkeypatch.setattr(played, "answer", answer)
    monkeypatch.setattr(story, "kill_one", interrupted)
    assert perform()[0] == 130
    assert killed == [f"/jobs/{JOB}/kill"]


def test_each_demo_has_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "trainyard-home" / "demo-2").mkdir(parents=True)
    names = [demo_home(None).name for _ in range(3)]
    assert names == ["demo-1", "demo-3", "demo-4"]
    assert demo_home("here") == tmp_path / "here"


def test_a_tokenizer_that_fails_is_explained(tmp_path: Path) -> None:
    service: Any = StoodInFor(tmp_path)
    with pytest.raises(story.DemoFailed, match="training the tokenizer ended with 1"):
        Story(tmp_path, service, console())._tokenizer()
