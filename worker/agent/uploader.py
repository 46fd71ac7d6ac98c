"""Uploads the outbox to the service and receives the desired state, in a thread: a slow service delays nothing."""

import http.client
import json
import os
import random
import threading
import time
import urllib.parse
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from trainyard.contract.attempt_proof import ANSWER_HEADER, RequestProof, key_of
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
"""How long a finished agent retries; after that the service reads the same data from the run directory."""


class Unreachable(Exception):
    """The service did not answer, or its answer is not an acknowledgement."""


@dataclass(frozen=True)
class ReportEndpoint:
    """The service's URL, the attempt's id and token, and the file to which a restarted service writes its new URL."""

    url: str
    attempt_id: str
    token: str
    service_file: Path | None

    def current_url(self) -> str:
        """Return the URL of the running service, or the one the agent was started with."""
        try:
            record = read_json(self.service_file) if self.service_file is not None else None
        except (OSError, ValueError):
            record = None
        return str(record["url"]) if isinstance(record, dict) and "url" in record else self.url

    def post(self, resource: str, body: bytes) -> dict[str, Any]:
        """Send one request with a timeout; return the answer. Raises Unreachable, also if another program answers."""
        url = urllib.parse.urlsplit(self.current_url())
        kind = http.client.HTTPSConnection if url.scheme == "https" else http.client.HTTPConnection
        connection = kind(url.hostname or "127.0.0.1", url.port, timeout=REQUEST_SECONDS)
        proof = RequestProof.of(self.token, f"{self.attempt_id}/{resource}", body)
        headers = {"Authorization": proof.header, "Content-Type": "application/json"}
        try:
            path = f"{url.path.rstrip('/')}/internal/attempts/{self.attempt_id}/{resource}"
            connection.request("POST", path, body, headers)
            response = connection.getresponse()
            content = response.read(1 << 20)
            if response.status != http.client.OK:
                raise Unreachable(f"{resource}: the service answered {response.status} {content[:200]!r}")
            if not proof.is_answered_by(key_of(self.token), response.getheader(ANSWER_HEADER), content):
                # Another program may listen on the port of a service that has ended.
                raise Unreachable(f"{resource}: the answer from {url.netloc} is not from the service of this run")
            return dict(json.loads(content))
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise Unreachable(f"{resource}: {type(error).__name__}: {error}") from error
        finally:
            connection.close()


@dataclass(frozen=True)
class _Batch:
    """A request with the lines after line ``after_seq``."""

    after_seq: int
    body: bytes


class EventUploader:
    """Uploads one attempt's lines in order until `finish`. ``desired`` and ``settings`` are the service's last answer.

    Without an endpoint it uploads nothing.
    """

    def __init__(
        self, attempt: AttemptDir, endpoint: ReportEndpoint | None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.desired = Desired.RUN
        self.settings: RunSettings | None = None
        self.acked = 0
        self._attempt = attempt
        self._endpoint = endpoint
        self._clock = clock
        self._outbox = OutboxReader(attempt.outbox)
        self._batch: _Batch | None = None
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="uploader", daemon=True)
        self._retry_seconds = 0.0
        self._next_heartbeat = 0.0

    @classmethod
    def from_environment(cls, attempt: AttemptDir) -> Self:
        """Read the launcher's variables; without a URL nothing is uploaded."""
        url = os.environ.get("TRAINYARD_REPORT_URL")
        if not url:
            return cls(attempt, None)
        file = os.environ.get("TRAINYARD_SERVICE_FILE")
        identity, token = os.environ["TRAINYARD_ATTEMPT_ID"], os.environ["TRAINYARD_ATTEMPT_TOKEN"]
        return cls(attempt, ReportEndpoint(url, identity, token, Path(file) if file else None))

    def start(self) -> None:
        if self._endpoint is not None:
            self._thread.start()

    def finish(self, report: ExitReport) -> None:
        """Upload the rest and the report, retrying for at most DELIVERY_SECONDS."""
        if self._endpoint is None:
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
            self._stopping.wait(self.poll())

    def poll(self) -> float:
        """Upload the next lines, or send a heartbeat if one is due; return the seconds until the next call."""
        self._with_backoff(self._upload_or_heartbeat)
        return self._retry_seconds or POLL_SECONDS

    def _with_backoff(self, work: Callable[[], object]) -> bool:
        """Call ``work``. If it cannot reach the service or the disk, double ``_retry_seconds`` and return False."""
        try:
            work()
        except (Unreachable, OSError) as error:
            if not self._retry_seconds:
                print(f"agent: {error}; training continues, the report is kept", flush=True)
            # With jitter, so that the agents of many runs do not retry at the same moment.
            grown = min(MAX_RETRY_SECONDS, max(FIRST_RETRY_SECONDS, self._retry_seconds * 2))
            self._retry_seconds = grown * random.uniform(0.75, 1.0)  # noqa: S311 - jitter, not a secret
            return False
        self._retry_seconds = 0.0
        return True

    def _upload_or_heartbeat(self) -> None:
        try:
            if self._upload():
                return
        except OSError:
            # The outbox cannot be read. The response to a heartbeat has the service's requests, such as a stop.
            self._send_heartbeat()
            raise
        if self._clock() >= self._next_heartbeat:
            self._send_heartbeat()

    def _send_heartbeat(self) -> None:
        step = None
        with suppress(OSError):
            step = self._attempt.read_step()
        self._post("heartbeat", json.dumps({"step": step, "last_seq": self._outbox.seq}).encode())

    def _drain(self) -> bool:
        while self._upload():
            pass
        return True

    def _upload(self) -> bool:
        """Upload the next lines; return False if there are none. Lines that were not acknowledged are sent again."""
        before = self.acked
        # A retry sends the same bytes and reads no file, so an hour without a service costs what a second does.
        if self._batch is None or self._batch.after_seq != before:
            self._batch = self._next_batch()
        if self._batch is None:
            return False
        self._post("events", self._batch.body)
        if self.acked <= before:
            raise Unreachable(f"events: line {before + 1} was not acknowledged")
        return True

    def _next_batch(self) -> _Batch | None:
        self._outbox.seek_after(self.acked)
        lines = self._outbox.read(BATCH_LINES)
        return _Batch(self.acked, json.dumps({"events": lines}).encode()) if lines else None

    def _post(self, resource: str, body: bytes) -> bool:
        assert self._endpoint is not None
        answer = self._endpoint.post(resource, body)
        try:
            self.acked, self.desired = int(answer["acked"]), Desired(answer["desired"])
            settings = answer.get("settings")
            self.settings = RunSettings.model_validate(settings) if settings is not None else self.settings
        except (KeyError, ValueError) as error:
            raise Unreachable(f"{resource}: the answer is no acknowledgement: {error}") from error
        self._next_heartbeat = self._clock() + HEARTBEAT_SECONDS
        return True
