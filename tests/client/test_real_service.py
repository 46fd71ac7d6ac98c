"""The command against the real service, launcher and worker: one tiny run on one CPU rank."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from trainyard.client.api import Client
from trainyard.client.demo.service import DemoService, _is_ready, environment
from trainyard.client.exit_codes import is_idle
from trainyard.contract.rundir import read_json

pytestmark = [pytest.mark.slow, pytest.mark.long, pytest.mark.timeout(900)]

SECONDS = 240.0
TINY = (
    "--hidden_size 32 --num_hidden_layers 1 --num_attention_heads 2 --num_key_value_heads 1 --max_seq_len 32 "
    "--batch_size 2 --accumulation_steps 1 --dtype float32 --device cpu --log_interval 20 --save_interval 500"
)
COMMAND = [sys.executable, "-c", "import sys; from trainyard.client.cli.main import main; sys.exit(main())"]


class Restartable(DemoService):
    """A service that can be killed, and started again at the same address."""

    def kill(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGKILL)
        self._process.wait()

    def start_again(self, monkeypatch: pytest.MonkeyPatch) -> None:
        port = self.url.rsplit(":", 1)[1]
        kept = environment(os.environ, self.home) | {"TRAINYARD_PORT": port}
        monkeypatch.setattr("trainyard.client.demo.service.environment", lambda *_: kept)
        self.start()


@pytest.fixture
def live(tmp_path: Path) -> Iterator[Restartable]:
    with Restartable(tmp_path / "home") as service:
        service.home.mkdir()
        (service.home / "corpus.jsonl").write_text(
            "".join(json.dumps({"text": f"number {n} of many"}) + "\n" for n in range(200))
        )
        service.start()
        yield service
        if not _is_ready(service.url):
            return
        with Client(service.url, "") as trainyard:
            for job in trainyard.jobs():
                if not is_idle(job):
                    trainyard.kill(job["id"])
                    trainyard.wait(job["id"], timeout=SECONDS)


def run(live: Restartable, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [*COMMAND, *arguments, "--url", live.url]
    return subprocess.run(command, capture_output=True, text=True, cwd=live.home, timeout=SECONDS, check=False)


def until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < deadline, f"not within {SECONDS:.0f} s: {what}"
        time.sleep(0.05)


def test_a_run_is_watched_through_the_death_of_its_service(live: Restartable, monkeypatch: pytest.MonkeyPatch) -> None:
    launched = run(
        live, "submit", "-y", "--data_path", "corpus.jsonl", "--max_steps", "1000000", "--name", "live", *TINY.split()
    )
    assert launched.returncode == 0, launched.stderr
    job_id = launched.stdout.strip()
    watching = subprocess.Popen(
        [*COMMAND, "watch", "live", "--json", "--url", live.url],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    with Client(live.url, "") as trainyard:
        until(lambda: next(trainyard.metrics(job_id), None) is not None, "a first metric")
        live.kill()
        assert run(live, "list").returncode == 3
        live.start_again(monkeypatch)
        assert read_json(live.home / "service.json") == {"url": live.url}
        newest = max(point["step"] for point in trainyard.metrics(job_id))
        until(
            lambda: next(trainyard.metrics(job_id, after_step=newest + 20), None) is not None,
            "metrics after the restart",
        )
        assert run(live, "pause", "live").returncode == 0
        out, err = watching.communicate(timeout=SECONDS)
        assert watching.returncode == 12, err
        assert "trainyard resume live" in err
        steps = [point["step"] for point in trainyard.metrics(job_id)]
        assert steps == list(range(20, steps[-1] + 1, 20))[: len(steps)]
        shown = [
            event["metric"]["step"] for line in out.splitlines() if (event := json.loads(line))["event"] == "metric"
        ]
        assert shown == steps
        assert [attempt["number"] for attempt in trainyard.attempts(job_id)] == [1]
    paused = json.loads(run(live, "show", "live", "--json").stdout)
    assert (paused["status"], paused["checkpoint"]["step"]) == ("paused", paused["progress"]["step"])
    assert run(live, "cancel", "live").returncode == 0
    assert run(live, "watch", "live").returncode == 11
    assert run(live, "delete", "live", "-y").returncode == 0
    assert run(live, "show", "live").returncode == 1


def test_a_run_that_succeeds_and_one_that_is_rejected(live: Restartable) -> None:
    done = run(live, "submit", "-y", "--data_path", "corpus.jsonl", "--max_steps", "40", "--watch", *TINY.split())
    assert done.returncode == 0, done.stderr
    assert "status=succeeded" in done.stdout.splitlines()[-1]
    refused = run(live, "submit", "-y", "--data_path", "nowhere.jsonl", "--learning_rate", "-1", "--use_moe", "7")
    assert refused.returncode == 1
    for flag in (
        "--data_path (/data/data_path)",
        "--learning_rate (/training/learning_rate)",
        "--use_moe (/model/use_moe)",
    ):
        assert flag in refused.stderr
    log = run(live, "logs", "pretrain", "--tail", "5")
    assert "40/40" in log.stdout
