"""A whole service with a launcher that does what the test says, and no thread that does anything by itself."""

import contextlib
import itertools
import json
import threading
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx2
from fastapi.testclient import TestClient

from tests.fakes.inventory import FixedInventory
from tests.fakes.launcher import FakeAttempt, FakeLauncher
from trainyard.contract.status import JobStatus
from trainyard.service.api.dependencies import AppState
from trainyard.service.app import create_app
from trainyard.service.db.engine import Database
from trainyard.service.devices.inventory import Device, cpu_slots
from trainyard.service.scheduler.loop import Scheduler
from trainyard.service.settings import Settings
from trainyard.service.streams.broadcaster import MetricBroadcaster
from trainyard.service.webhooks.http_client import WebhookClient
from trainyard.service.webhooks.notice_client import NoticeClient
from trainyard.service.webhooks.sender import Sender

URL = "http://127.0.0.1:8000"


class Clock:
    """Runs at the speed of the real clock, ahead of it by what the test has added."""

    def __init__(self) -> None:
        self.ahead = timedelta()
        self._moment: datetime | None = None

    def __call__(self) -> datetime:
        return self._moment or datetime.now(UTC) + self.ahead

    def forward(self, seconds: float) -> None:
        self.ahead += timedelta(seconds=seconds)
        if self._moment is not None:
            self._moment += timedelta(seconds=seconds)

    @contextlib.contextmanager
    def standing(self, at: datetime | None = None) -> Iterator[None]:
        """Stop the clock in the block, at the time ``at``: for what must not happen yet, however slow the host is."""
        before, self._moment = self._moment, at or self()
        try:
            yield
        finally:
            self._moment = before


class ServiceHarness:
    """One service. `restart` makes the next one on the same database, as after a crash."""

    def __init__(
        self,
        home: Path,
        url: str,
        devices: Sequence[Device] = cpu_slots(2),
        launcher: FakeLauncher | None = None,
        clock: Clock | None = None,
        token: str | None = None,
        scheduling: bool = False,
        preempts: bool = False,
        courier: WebhookClient | None = None,
        prepares: bool = False,
        **environment: str,
    ) -> None:
        self.home, self.url, self.devices, self.prepares = home, url, devices, prepares
        self.launcher = launcher or FakeLauncher()
        self.clock = clock or Clock()
        self.corpus = home / "corpus.jsonl"
        self.successors: list[ServiceHarness] = []
        given = {"TRAINYARD_TOKEN": token or "", "TRAINYARD_WEBHOOK_NETWORKS": "127.0.0.0/8", **environment}
        self.settings = Settings.read(given, home=home, database_url=url)
        home.mkdir(parents=True, exist_ok=True)
        self.corpus.write_text('{"text": "one"}\n')
        self.database = Database(url)
        inventory = FixedInventory(tuple(devices))
        corpora = (self.settings.corpus_cache, home) if prepares else None
        self.scheduler = Scheduler(
            self.database, self.launcher, inventory, self.clock, preempts=preempts, corpora=corpora
        )
        self.pulse = MetricBroadcaster(self.database)
        courier = courier or WebhookClient(self.settings.webhook_networks)
        notices = NoticeClient(self.settings.webhook_networks, self.settings.link_url)
        self.sender = Sender(self.database, courier, clock=self.clock, notices=notices)
        services = AppState(self.settings, self.database, inventory, self.scheduler, self.pulse, self.sender)
        self.app = create_app(services, scheduling=scheduling)
        self.client = TestClient(self.app, base_url=URL, raise_server_exceptions=True)
        self.client.__enter__()

    def close(self) -> None:
        """End it and its successors: connections left to the garbage collector would disturb later tests."""
        for successor in self.successors:
            successor.close()
        self.client.__exit__(None, None, None)
        self.sender.notices.close()
        self.database.close()

    def restart(self) -> "ServiceHarness":
        self.close()
        next_one = ServiceHarness(self.home, self.url, self.devices, self.launcher, self.clock, prepares=self.prepares)
        self.successors.append(next_one)
        return next_one

    def reconcile(self) -> None:
        self.scheduler.reconcile_until_stable()

    # What users do

    def spec(self, **groups: Any) -> dict[str, Any]:
        return {"data": {"data_path": str(self.corpus)}, **groups}

    def submit(self, **groups: Any) -> str:
        answer = self.client.post("/jobs", json=self.spec(**groups))
        assert answer.status_code == 201, answer.text[:500]
        job_id: str = answer.json()["id"]
        return job_id

    def get(self, path: str, expect: int = 200, **params: Any) -> Any:
        answer = self.client.get(path, params=params)
        assert answer.status_code == expect, answer.text[:500]
        return answer.json()

    def job(self, job_id: str) -> dict[str, Any]:
        found: dict[str, Any] = self.get(f"/jobs/{job_id}")
        return found

    def status(self, job_id: str) -> JobStatus:
        return JobStatus(self.job(job_id)["status"])

    def post_action(self, job_id: str, verb: str, body: object = None, status: int = 202) -> dict[str, Any]:
        answer = (
            self.client.post(f"/jobs/{job_id}/{verb}", json=body)
            if body
            else self.client.post(f"/jobs/{job_id}/{verb}")
        )
        assert answer.status_code == status, answer.text[:500]
        found: dict[str, Any] = answer.json()
        return found

    def data(self, job_id: str, what: str, **params: Any) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self.get(f"/jobs/{job_id}/{what}", **params)["data"]
        return found

    def report_raw(self, path: str, body: object) -> httpx2.Response:
        """POST a body that the client's own encoder would refuse."""
        answer: httpx2.Response = self.client.post(
            path, content=json.dumps(body), headers={"Content-Type": "application/json"}
        )
        return answer

    # What agents do

    def report(self, attempt: FakeAttempt, what: str, body: Any, token: str | None = None) -> httpx2.Response:
        token = attempt.launch.token if token is None else token
        answer: httpx2.Response = self.client.post(
            f"/internal/attempts/{attempt.launch.attempt_id}/{what}",
            content=body if isinstance(body, str) else json.dumps(body),
            headers={"Authorization": f"Bearer {token}", "Content-Type": "application/json"},
        )
        return answer

    def ship(self, attempt: FakeAttempt, lines: Sequence[dict[str, Any]] | None = None) -> dict[str, Any]:
        """Send the given lines, or all of the outbox."""
        answer = self.report(attempt, "events", {"events": list(lines if lines is not None else attempt.lines)})
        assert answer.status_code == 200, answer.text[:500]
        acked: dict[str, Any] = answer.json()
        return acked

    def heartbeat(self, attempt: FakeAttempt, step: int | None = None) -> dict[str, Any]:
        answer = self.report(attempt, "heartbeat", {"step": step})
        assert answer.status_code == 200, answer.text[:500]
        acked: dict[str, Any] = answer.json()
        return acked

    def exit(self, attempt: FakeAttempt, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Ship the rest, end as told, and say so."""
        if attempt.lines:
            self.ship(attempt)
        report = attempt.end(*args, **kwargs)
        answer = self.report(attempt, "exit", report.model_dump(mode="json"))
        assert answer.status_code == 200, answer.text[:500]
        acked: dict[str, Any] = answer.json()
        return acked

    def running(self, steps: int = 10, **groups: Any) -> tuple[str, FakeAttempt]:
        """A job that runs and has said so."""
        job_id = self.submit(**groups)
        self.reconcile()
        attempt = self.launcher.of(job_id)
        attempt.started(steps=steps)
        self.ship(attempt)
        assert self.status(job_id) is JobStatus.RUNNING
        return job_id, attempt

    def next_attempt(self, job_id: str, number: int, start_step: int = 0, steps: int = 10) -> FakeAttempt:
        """Let the scheduler launch attempt ``number``, and let it say that it started."""
        self.reconcile()
        attempt = self.launcher.of(job_id, number)
        attempt.started(start_step=start_step, steps=steps)
        self.ship(attempt)
        return attempt

    def checkpoint(self, job_id: str, attempt: FakeAttempt, step: int) -> Path:
        """A checkpoint on disk, and the line about it."""
        path = self.home / "runs" / job_id / "checkpoints" / f"step-{step:08d}"
        path.mkdir(parents=True, exist_ok=True)
        attempt.say("checkpoint", step=step, path=str(path), bytes=10, sha256="a" * 64)
        return path


def path_of(events: Sequence[dict[str, Any]]) -> list[str]:
    """The statuses a job went through."""
    changes = [event["data"] for event in events if event["kind"] == "status"]
    for before, after in itertools.pairwise(changes):
        assert before["to"] == after["from"], changes
    return [change["to"] for change in changes]


def in_threads(count: int, work: Any) -> list[Any]:
    """``work(i)`` in as many threads at once; their results, errors included."""
    results: list[Any] = [None] * count
    gate = threading.Barrier(count)

    def run(index: int) -> None:
        gate.wait()
        try:
            results[index] = work(index)
        except Exception as error:
            results[index] = error

    threads = [threading.Thread(target=run, args=(i,)) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return results
