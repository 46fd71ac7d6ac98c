"""The uploader on a clock of the test: what a retry costs, and a day without a service."""

import errno
import io
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from trainyard.contract.rundir import AttemptDir, RunDir
from trainyard.worker.agent.uploader import BATCH_LINES, EventUploader, ReportEndpoint, Unreachable

DAY_SECONDS = 86_400.0


@dataclass
class Clock:
    """Seconds that pass only in `forward`."""

    now: float = 0.0

    def __call__(self) -> float:
        return self.now

    def forward(self, seconds: float) -> None:
        self.now += seconds


@dataclass(frozen=True)
class Service(ReportEndpoint):
    """Keeps the lines that it is sent, unless it is ``away``. ``requests`` has the resource of every request."""

    stored: list[dict[str, Any]] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)
    away: list[bool] = field(default_factory=lambda: [False])

    def post(self, resource: str, body: bytes) -> dict[str, Any]:
        self.requests.append(resource)
        if self.away[0]:
            raise Unreachable(f"{resource}: the service is away")
        for line in json.loads(body).get("events", []):
            if line["seq"] == len(self.stored) + 1:
                self.stored.append(line)
        return {"acked": len(self.stored), "desired": "run"}

    def go_away(self, away: bool = True) -> None:
        self.away[0] = away


@pytest.fixture
def attempt(tmp_path: Path) -> AttemptDir:
    made = RunDir(tmp_path / "job_1").attempt(1)
    made.path.mkdir(parents=True)
    return made


@pytest.fixture
def service() -> Service:
    return Service("http://127.0.0.1:1", "att_1", "token", None)


@pytest.fixture
def bytes_read(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """The size of every read from a file that is opened by `Path.open`."""
    sizes: list[int] = []

    class Counted(io.FileIO):
        def readinto(self, buffer: Any, /) -> int:
            sizes.append(super().readinto(buffer) or 0)
            return sizes[-1]

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", lambda path, mode: io.BufferedReader(Counted(path, "rb")))
        yield sizes


def write_lines(attempt: AttemptDir, first: int, last: int) -> None:
    with open(attempt.outbox, "ab") as outbox:
        outbox.write(b"".join(b'{"n":%d}\n' % number for number in range(first, last + 1)))


@pytest.mark.parametrize("acknowledged", [10, 1_000_000])
def test_a_retry_reads_nothing_however_many_lines_were_acknowledged(
    attempt: AttemptDir, service: Service, bytes_read: list[int], acknowledged: int
) -> None:
    write_lines(attempt, 1, acknowledged)
    uploader = EventUploader(attempt, service, Clock())
    service.stored.extend({"seq": seq} for seq in range(1, acknowledged + 1))
    uploader.poll()
    uploader.poll()
    assert uploader.acked == acknowledged
    write_lines(attempt, acknowledged + 1, acknowledged + 2 * BATCH_LINES)
    service.go_away()
    bytes_read.clear()
    uploader.poll()
    assert 0 < sum(bytes_read) < 20 * 2 * BATCH_LINES, "the first try reads the lines that are new, and no other"
    bytes_read.clear()
    for _ in range(100):
        uploader.poll()
    assert bytes_read == []
    service.go_away(False)
    for _ in range(3):
        uploader.poll()
    assert len(service.stored) == acknowledged + 2 * BATCH_LINES


def test_lines_that_the_service_has_lost_are_read_and_sent_again(attempt: AttemptDir, service: Service) -> None:
    """After a restored backup the service knows fewer lines than it acknowledged."""
    write_lines(attempt, 1, 40)
    uploader = EventUploader(attempt, service, Clock())
    uploader.poll()
    assert uploader.acked == 40
    del service.stored[7:]
    write_lines(attempt, 41, 50)
    for _ in range(3):
        uploader.poll()
    assert [line["n"] for line in service.stored] == list(range(1, 51))


def test_a_day_without_a_service(attempt: AttemptDir, service: Service) -> None:
    """The run writes a line a minute. Each line arrives once, a retry comes every 3 to 5 s."""
    clock, written = Clock(), 0
    uploader = EventUploader(attempt, service, clock)
    until = {"before": 600.0, "away": 600.0 + DAY_SECONDS, "after": 600.0 + DAY_SECONDS + 30.0}
    for phase, end in until.items():
        service.go_away(phase == "away")
        service.requests.clear()
        while clock.now < end:
            clock.forward(uploader.poll())
            if written < clock.now // 60:
                write_lines(attempt, written + 1, int(clock.now // 60))
                written = int(clock.now // 60)
        if phase == "away":
            assert DAY_SECONDS / 5 <= len(service.requests) < DAY_SECONDS / 3
            assert len(service.stored) <= 10
    assert written == 1450
    assert [line["n"] for line in service.stored] == list(range(1, written + 1))
    # The line of the first retry alone, the other 1,439 in batches, the last line of the half minute.
    assert service.requests.count("events") <= 1 + -(-1439 // BATCH_LINES) + 1


@pytest.mark.parametrize("code", [errno.EIO, errno.ESTALE])
def test_uploads_continue_after_the_outbox_could_not_be_read(
    code: int,
    attempt: AttemptDir,
    service: Service,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """During an error of a network file system, heartbeats are sent. After it, the lines are uploaded."""
    clock = Clock()
    uploader = EventUploader(attempt, service, clock)
    write_lines(attempt, 1, 3)
    attempt.progress.write_text("7")

    def fail(*_: object, **__: object) -> None:
        raise OSError(code, os.strerror(code), str(attempt.outbox))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", fail)
        for _ in range(3):
            clock.forward(uploader.poll())
    assert service.requests == ["heartbeat"] * 3
    assert capsys.readouterr().out.count(f"{os.strerror(code)}: '{attempt.outbox}'; training continues") == 1
    uploader.poll()
    assert [line["seq"] for line in service.stored] == [1, 2, 3]
