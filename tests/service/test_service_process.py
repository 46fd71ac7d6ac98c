"""`python -m trainyard.service` as a process: binding, shutdown on SIGTERM, and one service per home."""

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest

from trainyard.contract.locks import FileLock
from trainyard.service.__main__ import main

ROOT = Path(__file__).parents[2]
DEADLINE = 40.0


def wait_for(condition: Callable[[], Any]) -> Any:
    deadline = time.monotonic() + DEADLINE
    while not (value := condition()):
        assert time.monotonic() < deadline, "it did not come true in time"
        time.sleep(0.02)
    return value


def fetch(url: str, **options: Any) -> httpx2.Response:
    """GET with a longer time-out than the library's five seconds: the service has just started, on a busy host."""
    return httpx2.get(url, timeout=DEADLINE, **options)


class Process:
    """A service in a home of its own."""

    def __init__(self, home: Path, *arguments: str, **environment: str) -> None:
        home.mkdir(exist_ok=True)
        self.home = home
        self.log = home / "out"
        self.begin = self.log.stat().st_size if self.log.exists() else 0
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "trainyard.service", "--port=0", f"--home={home}", *arguments],
                cwd=home,
                env={**os.environ, "PYTHONPATH": str(ROOT / "src"), **environment},
                stdout=log,
                stderr=log,
            )

    def url(self) -> str:
        """As it is printed: from then on it answers."""
        line = wait_for(lambda: next((t for t in self.said().splitlines() if "ready at" in t), None))
        url: str = line.split()[-1]
        return url

    def said(self) -> str:
        """What was printed since it was started."""
        return self.log.read_text()[self.begin :]

    def end(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(DEADLINE)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Process]]:
    made: list[Process] = []

    def make(*arguments: str, home: str = "home", **environment: str) -> Process:
        made.append(Process(tmp_path / home, *arguments, **environment))
        return made[-1]

    yield make
    for process in made:
        if process.process.poll() is None:
            process.process.kill()
        process.process.wait()


def test_a_life(start: Callable[..., Process]) -> None:
    service = start()
    url = service.url()
    assert fetch(f"{url}/health").json() == {"status": "ok"}
    assert wait_for(lambda: fetch(f"{url}/ready").status_code == 200)
    assert json.loads((service.home / "service.json").read_text()) == {"url": url}
    assert fetch(f"{url}/jobs").json() == {"object": "list", "data": [], "has_more": False}
    assert "server" not in fetch(f"{url}/jobs").headers
    assert service.end() == 0, "a clean end"
    *_, stopping, stopped = service.said().splitlines()
    assert stopping.endswith("stopping signal=SIGTERM")
    assert stopped.endswith(" stopped")


def test_it_ends_cleanly_with_streams_open(start: Callable[..., Process]) -> None:
    service = start("--no-scheduler")
    url = service.url()
    (service.home / "corpus.jsonl").write_text('{"text": "one"}\n')
    spec = {"data": {"data_path": str(service.home / "corpus.jsonl")}}
    job_id = httpx2.post(f"{url}/jobs", json=spec, timeout=DEADLINE).json()["id"]
    with httpx2.stream("GET", f"{url}/jobs/{job_id}/metrics/stream", timeout=DEADLINE) as stream:
        service.process.send_signal(signal.SIGTERM)
        assert "event: end" not in "".join(stream.iter_text()), "cut, so that its reader comes again"
    assert service.process.wait(DEADLINE) == 0
    assert "Traceback" not in service.said()


def test_a_stop_in_a_container_without_runs_is_as_quick_and_as_clean(start: Callable[..., Process]) -> None:
    service = start(TRAINYARD_ON_STOP="save")
    service.url()
    assert service.end() == 0
    assert service.said().splitlines()[-1].endswith(" stopped")


def test_a_successor_waits_for_its_predecessor(start: Callable[..., Process]) -> None:
    first = start()
    before = first.url()
    second = start()
    assert fetch(f"{before}/health").status_code == 200
    waiting = f"another service runs on {first.home}, at {before}; waiting"
    assert wait_for(lambda: waiting in second.said())
    assert "ready at" not in second.said()
    first.end()
    after = second.url()
    assert fetch(f"{after}/health").status_code == 200
    assert json.loads((second.home / "service.json").read_text()) == {"url": after}


def test_it_refuses_to_be_open_to_all(start: Callable[..., Process]) -> None:
    service = start("--host=0.0.0.0")
    assert service.process.wait(DEADLINE) == 2
    assert "TRAINYARD_TOKEN" in service.log.read_text()


def test_a_port_that_is_taken(start: Callable[..., Process]) -> None:
    port = start().url().rsplit(":", 1)[1]
    other = start(f"--port={port}", home="other")
    assert other.process.wait(DEADLINE) == 1
    assert f"service: 127.0.0.1:{port}: another program listens there already; --port takes" in other.said()
    assert "Traceback" not in other.said()


def test_a_home_that_another_service_keeps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("trainyard.service.__main__.PREDECESSOR_SECONDS", 0.0)
    (tmp_path / "service.json").write_text('{"url": "http://127.0.0.1:1"}')
    with FileLock(tmp_path / "service.lock").take():
        assert main(["--port=0", f"--home={tmp_path}"]) == 1
    said = capsys.readouterr().err.splitlines()
    assert said[-1].startswith(f"service: another service runs on {tmp_path}, at http://127.0.0.1:1: use that one")


def test_a_home_that_cannot_be_made(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "file"
    file.touch()
    assert main(["--port=0", f"--home={file}"]) == 1
    assert f"service: {file}: File exists; --home or TRAINYARD_HOME" in capsys.readouterr().err


def test_a_database_that_is_away(start: Callable[..., Process]) -> None:
    service = start("--database-url=postgresql://trainyard:secret@127.0.0.1:1/none")
    assert service.process.wait(DEADLINE) == 1
    assert "service: the database cannot be used: connection failed" in service.said()
    assert "Traceback" not in service.said()
    assert "secret" not in service.said()


def test_its_log_is_json_from_the_first_line_to_the_last(start: Callable[..., Process]) -> None:
    token = "canary-of-the-log"
    service = start(TRAINYARD_LOG_FORMAT="json", TRAINYARD_TOKEN=token)
    url = service.url()
    headers = {"Authorization": f"Bearer {token}"}
    assert wait_for(lambda: fetch(f"{url}/ready").status_code == 200)
    assert fetch(f"{url}/jobs", params={"name": "canary-name"}, headers=headers).status_code == 200
    with httpx2.stream("GET", f"{url}/jobs/job_x/metrics/stream", headers=headers, timeout=DEADLINE) as refused:
        assert refused.status_code == 404
    raw = b"GET / HTTP/1.1\r\nHost: \xff\r\nBad Header\r\n\r\n"
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=DEADLINE) as connection:
        connection.sendall(raw)
        assert b" 400 " in connection.recv(1000)
    assert service.end() == 0
    lines = [json.loads(line) for line in service.said().splitlines() if not line.startswith("Trainyard is ready")]
    assert "uvicorn.error" in {line["logger"] for line in lines}, "it complained of the head that is none"
    asked = [line for line in lines if line.get("route") == "/jobs"]
    assert [(line["actor"], line["status"], line["method"]) for line in asked] == [("admin", 200, "GET")]
    assert "canary" not in service.said()


def test_an_answer_waits_for_nothing(start: Callable[..., Process]) -> None:
    """Head and body are two writes: where the second waits for the peer's ACK, each answer takes 40 ms."""
    host, port = start("--no-scheduler").url().removeprefix("http://").split(":")
    connection = http.client.HTTPConnection(host, int(port), timeout=DEADLINE)

    def seconds() -> float:
        begin = time.perf_counter()
        connection.request("GET", "/health")
        assert connection.getresponse().read() == b'{"status":"ok"}'
        return time.perf_counter() - begin

    seconds()
    # A busy host delays many of them, the ACK all of them.
    wait_for(lambda: seconds() < 0.035)
    connection.close()
