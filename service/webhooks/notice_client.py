"""Send notices to URLs of Apprise's kinds, through a process that loads Apprise once and forks for each of them."""

import contextlib
import itertools
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from typing import Any

from trainyard.service.launch.environment import IMPORT_ROOT
from trainyard.service.ssrf import Network
from trainyard.service.webhooks.http_client import SEND_SECONDS, DeliveryResult
from trainyard.service.webhooks.notices import Notice

PROGRAM = (sys.executable, "-P", "-m", "trainyard.service.webhooks.notice_process")
"""-P: without it a folder `apprise/` in the working directory would be imported instead."""

START_SECONDS = 60.0
"""For the process to load Apprise's plugins: two seconds, and more on a host whose CPUs are busy."""

STOP_SECONDS = 2.0
ENVIRONMENT = ("LANG", "LC_ALL", "PATH", "REQUESTS_CA_BUNDLE", "TZ")
"""All that the process inherits: no proxy, and none of the service's secrets."""

Answer = dict[str, Any]


class NoticeClient:
    """Sends notices. ``public_url``: where readers reach the service."""

    def __init__(
        self,
        allowed: Sequence[Network] = (),
        public_url: str | None = None,
        process: "NoticeProcess | None" = None,
        seconds: float = SEND_SECONDS,
    ) -> None:
        self._allowed = allowed
        self._process = process or NoticeProcess()
        self._send_seconds = seconds
        self.public_url = public_url

    @property
    def seconds(self) -> float:
        """The longest time that `send` takes."""
        return START_SECONDS + self._send_seconds

    def validation_error(self, url: str) -> str | None:
        """Return why the URL is rejected, or None if it is valid. Nothing is sent and no name is resolved."""
        answer = self._ask(url)
        if answer is None:
            return "could not be checked, because Apprise did not start in time; try again"
        error: str | None = answer["error"]
        return error

    def send(self, url: str, notice: Notice) -> DeliveryResult:
        """Send the notice and return the result. Does not raise if the receiver or the network fails."""
        begin = time.monotonic()
        answer = self._ask(url, notice=vars(notice), seconds=self._send_seconds)
        if answer is None:
            return DeliveryResult(None, "Apprise ended without a result", time.monotonic() - begin, succeeded=False)
        return DeliveryResult(**answer)

    def close(self) -> None:
        """End the process. Notices that are being sent fail."""
        self._process.close()

    def _ask(self, url: str, **more: Any) -> Answer | None:
        networks = [str(network) for network in self._allowed]
        return self._process.ask({"url": url, "networks": networks, **more}, self.seconds)


class NoticeProcess:
    """Runs `notice_process`, from the first request on. It ends if the service ends, also if that is killed."""

    def __init__(self, program: Sequence[str] = PROGRAM) -> None:
        self._program = program
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()
        self._numbers = itertools.count(1)
        self._pending: dict[int, Future[Answer | None]] = {}

    @property
    def pid(self) -> int | None:
        """Its process id while it runs."""
        return self._process.pid if self._process is not None else None

    def ask(self, request: Mapping[str, Any], seconds: float) -> Answer | None:
        """Return the answer, or None if there is none within ``seconds`` or the process ended."""
        number, answer = next(self._numbers), Future[Answer | None]()
        # The URL goes through a pipe: arguments and variables of a process can be read by others.
        line = json.dumps({**request, "id": number}).encode() + b"\n"
        with self._lock:
            self._pending[number] = answer
            sent = self._write(line) or self._write(line)  # the process may have been killed since the last notice
        try:
            return answer.result(seconds) if sent else None
        except TimeoutError:
            return None
        finally:
            self._pending.pop(number, None)

    def close(self) -> None:
        """End the process, and what it is doing."""
        with self._lock:
            process, self._process = self._process, None
        if process is not None and process.stdin is not None:
            with contextlib.suppress(OSError):
                process.stdin.close()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(STOP_SECONDS)
            process.kill()

    def _write(self, line: bytes) -> bool:
        try:
            if self._process is None:
                self._process = self._start()
            assert self._process.stdin is not None
            self._process.stdin.write(line)
            self._process.stdin.flush()
        except OSError:
            self._process = None
            return False
        return True

    def _start(self) -> subprocess.Popen[bytes]:
        environment = {name: os.environ[name] for name in ENVIRONMENT if name in os.environ}
        process = subprocess.Popen(
            self._program,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**environment, "PYTHONPATH": IMPORT_ROOT},
            start_new_session=True,  # Ctrl+C ends the service, which then closes the pipe
        )
        threading.Thread(target=self._read, args=(process,), name="notices", daemon=True).start()
        return process

    def _read(self, process: subprocess.Popen[bytes]) -> None:
        assert process.stdout is not None
        with process.stdout as lines:
            for line in lines:
                answer = json.loads(line)
                waiting = self._pending.pop(answer.pop("id"), None)
                if waiting is not None:
                    waiting.set_result(answer)
        process.wait()
        if process.stdin is not None:
            with contextlib.suppress(OSError):
                process.stdin.close()
        with self._lock:
            if self._process not in (None, process):
                return  # what is pending now is asked of its successor
            self._process = None
            orphans = [self._pending.pop(number) for number in list(self._pending)]
        for orphan in orphans:
            orphan.set_result(None)
