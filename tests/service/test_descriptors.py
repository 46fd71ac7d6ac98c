"""The limit of open files: what stays reachable when there are more readers and strangers than descriptors."""

import contextlib
import http.client
import json
import resource
import selectors
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from tests.service.harness import ServiceHarness
from trainyard.service import descriptors
from trainyard.service.errors import from_exception

ROOT = Path(__file__).parents[2]
DEADLINE = 60.0
START = """
import resource, sys
resource.setrlimit(resource.RLIMIT_NOFILE, (int(sys.argv[1]), int(sys.argv[2])))
from trainyard.service import server
from trainyard.service.__main__ import main
server.MAX_REQUEST_SECONDS = 600.0  # else the first strangers are gone before the last ones come, on a busy host
sys.exit(main(sys.argv[3:]))
"""


@pytest.fixture(autouse=True)
def many_files() -> Iterator[None]:
    """The readers of these tests need descriptors too."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@contextlib.contextmanager
def limited_service(home: Path, soft: int, hard: int) -> Iterator[tuple[tuple[str, int], Path]]:
    """The address and the log of a service that was started with these limits."""
    home.mkdir()
    log = home / "out"
    with log.open("wb") as out:
        arguments = [str(soft), str(hard), "--port=0", f"--home={home}", "--no-scheduler"]
        process = subprocess.Popen(
            [sys.executable, "-c", START, *arguments],
            cwd=home,
            env={"PYTHONPATH": str(ROOT / "src"), "PATH": "/usr/bin:/bin"},
            stdout=out,
            stderr=out,
        )
    try:
        deadline = time.monotonic() + DEADLINE
        while "ready at" not in log.read_text():
            assert time.monotonic() < deadline, log.read_text()
            assert process.poll() is None, log.read_text()
            time.sleep(0.02)
        url = urlsplit(next(line.split()[-1] for line in log.read_text().splitlines() if "ready at" in line))
        yield (str(url.hostname), int(url.port or 0)), log
    finally:
        process.kill()
        process.wait()


def answer(address: tuple[str, int], method: str, path: str, body: object = None) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection(*address, timeout=DEADLINE)
    connection.request(method, path, json.dumps(body) if body is not None else None)
    response = connection.getresponse()
    content = response.status, response.read()
    connection.close()
    return content


def statuses(connections: list[socket.socket]) -> Counter[str]:
    """How many streams are open by now ("200"), were rejected ("429") and were cut off ("")."""
    counts: Counter[str] = Counter()
    with selectors.DefaultSelector() as selector:
        for connection in connections:
            selector.register(connection, selectors.EVENT_READ)
        deadline = time.monotonic() + DEADLINE
        while selector.get_map() and time.monotonic() < deadline:
            for key, _ in selector.select(1.0):
                assert isinstance(key.fileobj, socket.socket)
                try:
                    head = key.fileobj.recv(1024).decode()
                except ConnectionError:
                    head = ""
                counts[head[9:12]] += 1
                selector.unregister(key.fileobj)
        counts["unanswered"] = len(selector.get_map())
    return counts


@pytest.mark.parametrize(
    ("soft", "hard", "streams"), [(1024, 1024, 256), pytest.param(1024, 8192, 1000, marks=pytest.mark.long)]
)
def test_more_readers_and_strangers_than_descriptors(tmp_path: Path, soft: int, hard: int, streams: int) -> None:
    begun = time.monotonic()
    with limited_service(tmp_path / "home", soft, hard) as (address, log), contextlib.ExitStack() as stack:
        corpus = tmp_path / "home" / "corpus.jsonl"
        corpus.write_text('{"text": "one"}\n')
        created = answer(address, "POST", "/jobs", {"data": {"data_path": str(corpus)}})
        job_id = json.loads(created[1])["id"]

        def send(head: str) -> socket.socket:
            connection = stack.enter_context(socket.create_connection(address, timeout=DEADLINE))
            connection.sendall(head.encode())
            return connection

        request = f"GET /jobs/{job_id}/metrics/stream HTTP/1.1\r\nHost: 127.0.0.1\r\n"
        readers = [send(f"{request}\r\n") for _ in range(1100)]
        counts = statuses(readers)
        assert counts == {"200": streams, "429": 1100 - streams, "unanswered": 0}
        # Requests whose head never ends: more than all descriptors that are left.
        strangers = [send(request) for _ in range(1100)]
        bodies = [send("POST /jobs HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 9\r\n\r\n") for _ in range(300)]
        assert answer(address, "GET", "/health")[0] == 200
        assert answer(address, "POST", "/internal/attempts/none/heartbeat", {})[0] == 401
        status = answer(address, "GET", "/jobs")[0]
        # With the small limit all requests that users may have at once are the unfinished ones.
        assert status in (200, 503)
        lines = log.read_text().splitlines()
        minutes = (time.monotonic() - begun) // 60
        for connection in bodies:
            connection.close()
        deadline = time.monotonic() + DEADLINE
        while answer(address, "GET", "/jobs")[0] != 200:
            assert time.monotonic() < deadline
        assert len(strangers) == 1100
    assert not [line for line in lines if "Traceback" in line or "Errno 24" in line]
    warnings = len([line for line in lines if "at most once a minute" in line])
    assert (1 <= warnings <= 1 + minutes) if hard == soft else warnings == 0


def test_requests_of_users_leave_room_for_agents(rig: ServiceHarness, monkeypatch: pytest.MonkeyPatch) -> None:
    job_id, attempt = rig.running()
    monkeypatch.setattr(descriptors, "MAX_REQUESTS", 0)
    rejected = rig.client.get(f"/jobs/{job_id}")
    assert (rejected.status_code, rejected.json()["code"], rejected.headers["retry-after"]) == (503, "overloaded", "5")
    assert rig.client.get("/health").status_code == 200
    assert rig.heartbeat(attempt)["desired"] == "run"
    monkeypatch.undo()
    assert rig.client.get(f"/jobs/{job_id}").status_code == 200


def test_a_request_that_gets_no_descriptor_is_told_to_wait() -> None:
    error = from_exception(OSError(24, "Too many open files"))
    assert (error.status, error.code) == (503, "overloaded")
    assert from_exception(OSError(2, "No such file")).status == 500


def test_the_warning_comes_once_a_minute(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    warn = descriptors.LimitWarning()
    for now[0] in (1000.0, 1030.0, 1059.0, 1061.0):
        warn("requests fail")
    assert len(caplog.records) == 2
    assert "LimitNOFILE" in caplog.text


@pytest.mark.parametrize("limit", [64, 256, 1024, 4096, 65_536])
def test_the_shares_fit_into_the_limit(limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(descriptors, "limit", lambda: limit)
    of_users = descriptors.max_streams() + descriptors.max_requests()
    assert 0 < of_users < descriptors.max_connections()
    files = descriptors.max_requests()
    assert descriptors.max_connections() + files <= limit - limit // 4
