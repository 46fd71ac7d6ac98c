"""One home: its service, which may die and start again, its jobs, and every process of them."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import httpx2

from tests.faults import fake_ranks
from trainyard.contract.processes import MARKER, ProcessIdentity, all_pids
from trainyard.contract.rundir import RunDir, read_json

ROOT = Path(__file__).parents[2]


def until(condition: Callable[[], Any], seconds: float = 120.0, what: str = "", every: float = 0.02) -> Any:
    """The first true value of ``condition``; fails the test after ``seconds``."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, f"it did not come true in {seconds:g} s: {what or condition}"
        time.sleep(every)
    return value


class Nursery:
    """The process from which services are forked. Several threads may use one."""

    def __init__(self) -> None:
        self._asking = threading.Lock()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.forked_service"],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )

    def service(self, **wanted: Any) -> ProcessIdentity | None:
        """Fork a service; None if it is gone already."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        with self._asking:
            self.process.stdin.write(json.dumps(wanted).encode() + b"\n")
            self.process.stdin.flush()
            return ProcessIdentity.of(int(json.loads(self.process.stdout.readline())["pid"]))

    def close(self) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        self.process.stdout.close()
        self.process.wait(60)


class Home:
    """Starts, kills and queries the service of one home. ``wanted`` goes to `forked_service` each time."""

    def __init__(self, nursery: Nursery, path: Path, slots: int = 2, **wanted: Any) -> None:
        self.nursery, self.path = nursery, path
        self.database_url = f"sqlite:///{path}/trainyard.db"
        self.wanted = wanted
        self.environment = {"TRAINYARD_CPU_SLOTS": str(slots), "TRAINYARD_DATA_ROOTS": str(path)}
        self.service: ProcessIdentity | None = None
        # A connection of its own for each request: the server may be another one each time.
        # Without certificates: they take longer to load than the service takes to answer.
        self.client = httpx2.Client(timeout=60, limits=httpx2.Limits(max_keepalive_connections=0), verify=False)
        self.server_errors: list[str] = []
        self.tolerance = 0.0
        self.patience = 120.0
        """Longest wait for a start or an end of the service, in seconds."""
        self.grace = 30.0
        """Seconds until nothing of a job that has ended may live (I2)."""
        self.damage: Callable[[Path], str | None] = fake_ranks.damage
        path.mkdir(parents=True, exist_ok=True)
        (path / "corpus.jsonl").write_text('{"text": "one"}\n')

    def start(self, ready: bool = True, **wanted: Any) -> float:
        """Start the service; returns the seconds until it was ready."""
        began = time.monotonic()
        (self.path / "service.json").unlink(missing_ok=True)
        everything = {**self.wanted, **wanted}
        self.service = self.nursery.service(home=str(self.path), environment=self.environment, **everything)
        if ready:
            with telling(lambda: self.log()[-2000:]):
                until(lambda: self.ready() or self.is_down(), self.patience, "the service is ready")
                assert not self.is_down(), "the service has ended before it was ready"
        return time.monotonic() - began

    def ready(self) -> bool:
        try:
            return self.get("/ready").status_code == 200
        except (httpx2.TransportError, TypeError):
            return False

    def signal(self, signum: signal.Signals) -> None:
        if self.service is not None:
            self.service.send(signum)

    def kill(self) -> None:
        self.signal(signal.SIGKILL)
        self.wait_down()

    def is_down(self) -> bool:
        return self.service is None or not self.service.alive()

    def wait_down(self) -> None:
        until(self.is_down, self.patience, "the service is down")

    def log(self) -> str:
        with contextlib.suppress(FileNotFoundError):
            return (self.path / "service.log").read_text()
        return ""

    @property
    def url(self) -> str:
        return str(read_json(self.path / "service.json")["url"])  # type: ignore[index]

    def get(self, path: str) -> httpx2.Response:
        return self.record(self.client.get(self.url + path))

    def post(self, path: str, body: object = None) -> httpx2.Response:
        return self.record(self.client.post(self.url + path, json=body))

    def record(self, answer: httpx2.Response) -> httpx2.Response:
        """Record server errors (I8); /ready answers 503 until the service is ready."""
        if answer.status_code >= 500 and not answer.url.path.endswith("/ready"):
            self.server_errors.append(f"{answer.request.method} {answer.url.path}: {answer.status_code} {answer.text}")
        return answer

    def spec(self, max_restarts: int = 3, **labels: str) -> dict[str, Any]:
        resources = {"device": "cpu", "nproc_per_node": int(labels.get("ranks", "2")), "max_restarts": max_restarts}
        return {"labels": labels, "data": {"data_path": str(self.path / "corpus.jsonl")}, "resources": resources}

    def submit(self, max_restarts: int = 3, **labels: str) -> str:
        answer = self.post("/jobs", self.spec(max_restarts, **labels))
        assert answer.status_code == 201, answer.text
        return str(answer.json()["id"])

    def job(self, job_id: str) -> dict[str, Any]:
        found: dict[str, Any] = self.get(f"/jobs/{job_id}").json()
        return found

    def metrics(self, job_id: str) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self.get(f"/jobs/{job_id}/metrics?limit=10000").json()["data"]
        return found

    def wait(self, job_id: str, *statuses: str, seconds: float = 180.0, every: float = 0.02) -> dict[str, Any]:
        found: dict[str, Any] = {}

        def reached() -> bool:
            with contextlib.suppress(httpx2.TransportError, TypeError):
                found.update(self.job(job_id))
            return found.get("status") in statuses

        with telling(lambda: f"{json.dumps(found, indent=1)[:3000]}\n{self.log()[-3000:]}"):
            until(reached, seconds, f"{job_id} is {statuses}", every)
        return found

    def run(self, job_id: str) -> RunDir:
        return RunDir(self.path / "runs" / job_id)

    def step(self, job_id: str, number: int = 1) -> int:
        return self.run(job_id).attempt(number).read_step() or 0

    def reach(self, job_id: str, step: int) -> None:
        """Wait until the job's first attempt is there."""
        until(lambda: self.step(job_id) >= step)

    def go_on(self, job_id: str) -> None:
        """Let the ranks of a job continue that wait at a fault ``file_at_N``."""
        (self.run(job_id).path / "go").touch()

    def processes(self, job_id: str | None = None, max_age: float = 0.0) -> list["Member"]:
        """Every living process of this home's attempts, or of one job's, as of ``max_age`` seconds ago at most."""
        return [m for m in members(max_age) if self.run(m.job).path.is_dir() and job_id in (None, m.job)]

    def named(self, job_id: str, role: str) -> list[ProcessIdentity]:
        return [member.process for member in self.processes(job_id) if member.role == role]

    def end_all(self) -> None:
        """End every process of this home."""
        self.client.close()
        self.signal(signal.SIGCONT)
        self.kill()
        for _ in range(5):
            for member in self.processes():
                member.process.send(signal.SIGKILL)


@contextlib.contextmanager
def telling(what: Callable[[], str]) -> Iterator[None]:
    try:
        yield
    except AssertionError:
        print(what())
        raise


def cpu_seconds(home: Home) -> float:
    """Return what the service has computed, in seconds of one core."""
    assert home.service is not None
    fields = Path(f"/proc/{home.service.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


class Member:
    """One process of an attempt. ``role``: agent, torchrun, rank (those with a RANK, their children too)."""

    def __init__(self, process: ProcessIdentity, mark: str, environment: Mapping[bytes, bytes]) -> None:
        job, _, number = mark.rpartition("/")
        self.process, self.job, self.number = process, job, int(number)
        rank = environment.get(b"RANK")
        self.rank = rank.decode() if rank is not None else None
        is_agent = b"TRAINYARD_ATTEMPT_TOKEN" in environment
        self.role = "agent" if is_agent else "torchrun" if rank is None else "rank"


SETTLED_SECONDS = 30.0
"""A process that has no mark after this time gets none: it has executed its program, also on a busy host."""

REUSE_SECONDS = 10.0
"""No pid is used again within this time: that takes as many new processes as there are pids."""


class ProcessTable:
    """The process table, read again and again. What is no part of any attempt is read once."""

    def __init__(self) -> None:
        self._reading = threading.Lock()
        self._strangers: dict[int, float] = {}
        self._members: list[Member] = []
        self._read_at = float("-inf")

    def members(self, max_age: float) -> list[Member]:
        """Return every living process that carries any attempt's mark."""
        with self._reading:
            now = time.monotonic()
            if now - self._read_at > max_age:
                self._members = list(self._read(now))
                self._read_at = now
            return self._members

    def _read(self, now: float) -> Iterator["Member"]:
        known = self._strangers if now - self._read_at < REUSE_SECONDS else {}
        self._strangers = {}
        for pid in all_pids():
            first_seen = known.get(pid, now)
            is_settled = now - first_seen >= SETTLED_SECONDS
            environment = {} if is_settled or pid == os.getpid() else environment_of(pid)
            mark = environment.get(MARKER.encode())
            if mark is None:
                self._strangers[pid] = first_seen
                continue
            process = ProcessIdentity.of(pid)
            if process is not None:
                yield Member(process, mark.decode(), environment)


TABLE = ProcessTable()


def members(max_age: float = 0.0) -> list[Member]:
    """Return every living process that carries any attempt's mark, as of ``max_age`` seconds ago at most."""
    return TABLE.members(max_age)


def environment_of(pid: int) -> dict[bytes, bytes]:
    try:
        with open(f"/proc/{pid}/environ", "rb") as file:
            entries = file.read().split(b"\0")
    except OSError:
        return {}
    return dict(entry.split(b"=", 1) for entry in entries if b"=" in entry)
