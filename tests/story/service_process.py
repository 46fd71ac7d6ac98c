"""A real service on a free port, which a test may kill and start again, and a real corpus."""

import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import httpx2

from trainyard.contract.rundir import read_json

RANKS = 2
REQUEST_SECONDS = 60.0
END_SECONDS = 120.0
FIRST_PORT = 12_000
EPHEMERAL_PORTS = Path("/proc/sys/net/ipv4/ip_local_port_range")
_numbers = itertools.count()


def free_port() -> int:
    """Return a free port that the kernel gives only to a program that asks for it.

    A service that is started again needs its port again. One of those that the kernel gives out, to connections too,
    may belong to another program by then.
    """
    ports = range(FIRST_PORT, int(EPHEMERAL_PORTS.read_text().split()[0]))
    for _ in ports:
        # Other processes of a test run begin elsewhere.
        port = ports[(os.getpid() * 97 + next(_numbers)) % len(ports)]
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def until(condition: Callable[[], Any], seconds: float = 240.0) -> Any:
    """The first true value of ``condition``; fails the test after ``seconds``."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, "the condition did not come true in time"
        time.sleep(0.05)
    return value


class Served:
    """A service process in a home of its own. ``command`` and ``path`` (its PYTHONPATH): those of another release."""

    def __init__(
        self,
        home: Path,
        roots: list[Path],
        port: int = 0,
        command: Sequence[str] = (sys.executable, "-m", "trainyard.service"),
        path: Path | None = None,
        slots: int = RANKS,
    ) -> None:
        self.home = home
        self.roots = roots
        self.command = command
        self.path = path
        self.port = port or free_port()
        self.slots = slots
        self.process: subprocess.Popen[bytes] | None = None
        home.mkdir(parents=True, exist_ok=True)

    def start(self) -> None:
        (self.home / "service.json").unlink(missing_ok=True)
        environment = {
            **os.environ,
            "TRAINYARD_HOME": str(self.home),
            "TRAINYARD_DATA_ROOTS": ":".join(map(str, self.roots)),
            "TRAINYARD_CPU_SLOTS": str(self.slots),
            **({"PYTHONPATH": str(self.path)} if self.path is not None else {}),
        }
        with (self.home / "service.log").open("ab") as log:
            command = [*self.command, "--port", str(self.port)]
            self.process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, cwd=self.path)
        self.url = until(lambda: (read_json(self.home / "service.json") or {}).get("url"))
        until(self._ready)

    def _ready(self) -> bool:
        try:
            return self.get("/ready").status_code == 200
        except httpx2.TransportError:
            return False

    def kill(self) -> None:
        assert self.process is not None
        self.process.send_signal(signal.SIGKILL)
        self.process.wait(END_SECONDS)

    def stop(self) -> None:
        assert self.process is not None
        self.process.terminate()
        self.process.wait(END_SECONDS)

    def get(self, path: str) -> httpx2.Response:
        return httpx2.get(self.url + path, timeout=REQUEST_SECONDS)

    def post(self, path: str, body: object = None) -> httpx2.Response:
        return httpx2.post(self.url + path, json=body, timeout=REQUEST_SECONDS)

    def job(self, job_id: str) -> dict[str, Any]:
        answer: dict[str, Any] = self.get(f"/jobs/{job_id}").json()
        return answer

    def step(self, job_id: str) -> int:
        return int(self.job(job_id)["progress"]["step"] or 0)

    def submit(self, spec: object) -> str:
        answer = self.post("/jobs", spec)
        assert answer.status_code == 201, answer.text
        return str(answer.json()["id"])

    def wait(self, job_id: str, *statuses: str, seconds: float = 240.0) -> dict[str, Any]:
        def reached() -> dict[str, Any] | None:
            job = self.job(job_id)
            hopeless = job["status"] in ("failed", "cancelled") and job["status"] not in statuses
            assert not hopeless, json.dumps(job, indent=1)
            return job if job["status"] in statuses else None

        found: dict[str, Any] = until(reached, seconds)
        return found

    def metrics(self, job_id: str) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = []
        while True:
            after = rows[-1]["step"] if rows else 0
            page = self.get(f"/jobs/{job_id}/metrics?limit=1000&after_step={after}").json()
            rows += page["data"]
            if not page["has_more"]:
                return rows
