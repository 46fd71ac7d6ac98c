"""Carries the outbox to the service, and the user's wish back. A thread of its own: a slow service delays nothing."""

import http.client
import json
import os
import random
import threading
import time
import urllib.parse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from trainyard.contract.messages import HEARTBEAT_SECONDS, ExitReport, RunSettings
from trainyard.contract.outbox import OutboxReader
from trainyard.contract.rundir import AttemptDir, read_json
from trainyard.contract.status import Desired

BATCH_LINES = 500
POLL_SECONDS = 0.1
REQUEST_SECONDS = 10.0
FIRST_RETRY_SECONDS = 0.25
MAX_RETRY_SECONDS = 5.0
DELIVERY_SECONDS = 60.0
"""How long a finished agent goes on trying; after that the service reads the same facts from the run directory."""


class Unreachable(Exception):
    """The service did not answer, or answered something else than an acknowledgement."""


@dataclass(frozen=True)
class ReportEndpoint:
    """Where reports go: the attempt's path, its token, and the file in which a restarted service leaves its new URL."""

    url: str
    attempt_id: str
    token: str
    service_file: Path | None

    def current_url(self) -> str:
        """The URL of the service that runs now, or the one we were started with."""
        try:
            record = read_json(self.service_file) if self.service_file is not None else None
        except (OSError, ValueError):
            record = None
        return str(record["url"]) if isinstance(record, dict) and "url" in record else self.url

    def post(self, what: str, body: bytes) -> dict[str, Any]:
        """One bounded request. Raises Unreachable."""
        url = urllib.parse.urlsplit(self.current_url())
        kind = http.client.HTTPSConnection if url.scheme == "https" else http.client.HTTPConnection
        connection = kind(url.hostname or "127.0.0.1", url.port, timeout=REQUEST_SECONDS)
        headers = {"Authorization": f"Bearer {self.token}", "Content-Type": "application/json"}
        try:
            path = f"{url.path.rstrip('/')}/internal/attempts/{self.attempt_id}/{what}"
            connection.request("POST", path, body, headers)
            answer = connection.getresponse()
            content = answer.read(1 << 20)
            if answer.status != http.client.OK:
                raise Unreachable(f"{what}: the service answered {answer.status} {content[:200]!r}")
            return dict(json.loads(content))
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise Unreachable(f"{what}: {type(error).__name__}: {error}") from error
        finally:
            connection.close()


class EventUploader:
    """Ships one attempt's lines in order until `finish`; ``desired``, ``settings``: what the service last said."""

    def __init__(self, attempt: AttemptDir, address: ReportEndpoint | None) -> None:
        self.desired = Desired.RUN
        self.settings: RunSettings | None = None
        self.acked = 0
        self._attempt = attempt
        self._address = address
        self._outbox = OutboxReader(attempt.outbox)
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="shipper", daemon=True)
        self._retry_seconds = 0.0
        self._next_heartbeat = 0.0

    @classmethod
    def from_environment(cls, attempt: AttemptDir) -> Self:
        """As the launcher set it up; without a URL nothing is shipped and the run goes its way."""
        url = os.environ.get("TRAINYARD_REPORT_URL")
        if not url:
            return cls(attempt, None)
        file = os.environ.get("TRAINYARD_SERVICE_FILE")
        identity, token = os.environ["TRAINYARD_ATTEMPT_ID"], os.environ["TRAINYARD_ATTEMPT_TOKEN"]
        return cls(attempt, ReportEndpoint(url, identity, token, Path(file) if file else None))

    def start(self) -> None:
        """Begin to ship."""
        if self._address is not None:
            self._thread.start()

    def finish(self, report: ExitReport) -> None:
        """Ship the rest and the report, trying for at most DELIVERY_SECONDS."""
        if self._address is None:
            return
        self._stopping.set()
        self._thread.join(REQUEST_SECONDS * 2)
        deadline = time.monotonic() + DELIVERY_SECONDS
        body = report.model_dump_json().encode()
        while time.monotonic() < deadline:
            if self._with_backoff(lambda: self._drain() and self._post("exit", body)):
                return
            time.sleep(self._retry_seconds)

    def _run(self) -> None:
        while not self._stopping.is_set():
            self._with_backoff(self._upload_or_heartbeat)
            self._stopping.wait(self._retry_seconds or POLL_SECONDS)

    def _with_backoff(self, work: Callable[[], object]) -> bool:
        """Do some of the work; on failure wait longer each time, with jitter, so that agents come one by one."""
        try:
            work()
        except Unreachable as trouble:
            if not self._retry_seconds:
                print(f"agent: {trouble}; training goes on, the report is kept", flush=True)
            grown = min(MAX_RETRY_SECONDS, max(FIRST_RETRY_SECONDS, self._retry_seconds * 2))
            self._retry_seconds = grown * random.uniform(0.75, 1.0)  # noqa: S311 - jitter, not a secret
            return False
        self._retry_seconds = 0.0
        return True

    def _upload_or_heartbeat(self) -> None:
        if not self._upload() and time.monotonic() >= self._next_heartbeat:
            step = self._attempt.read_step()
            self._post("heartbeat", json.dumps({"step": step, "last_seq": self._outbox.seq}).encode())

    def _drain(self) -> bool:
        while self._upload():
            pass
        return True

    def _upload(self) -> bool:
        """Ship the next lines; False where there is none. What is not acknowledged is read again."""
        self._outbox.seek_after(self.acked)
        lines = self._outbox.read(BATCH_LINES)
        if not lines:
            return False
        before = self.acked
        self._post("events", json.dumps({"events": lines}).encode())
        if self.acked <= before:
            raise Unreachable(f"events: line {before + 1} was not acknowledged")
        return True

    def _post(self, what: str, body: bytes) -> bool:
        assert self._address is not None
        answer = self._address.post(what, body)
        try:
            self.acked, self.desired = int(answer["acked"]), Desired(answer["desired"])
            said = answer.get("settings")
            self.settings = RunSettings.model_validate(said) if said is not None else self.settings
        except (KeyError, ValueError) as error:
            raise Unreachable(f"{what}: the answer is no acknowledgement: {error}") from error
        self._next_heartbeat = time.monotonic() + HEARTBEAT_SECONDS
        return True
