"""Start the service, and the worker by hand, for the benchmarks."""

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2

from trainyard.contract.rundir import RunDir


def until(condition: Callable[[], Any], seconds: float = 120.0) -> Any:
    """Poll ``condition`` every 2 ms; return its first true value. Raises TimeoutError."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        if time.monotonic() > deadline:
            raise TimeoutError(f"the condition was not true within {seconds:g} s")
        time.sleep(0.002)
    return value


@contextlib.contextmanager
def service(home: Path, *roots: Path) -> Iterator[httpx2.Client]:
    """Start a service on a free port, as `served` does; yield a client once it is ready."""
    with served(home, *roots) as running:
        with httpx2.Client(base_url=running.url, timeout=10) as client:
            until(lambda: client.get("/ready").status_code == 200)
            yield client


def cpu_seconds(pid: int) -> float:
    """Return the processor seconds of a process so far, those in the kernel included."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Served:
    """A running service."""

    url: str
    process: "subprocess.Popen[bytes]"

    @property
    def cpu_seconds(self) -> float:
        """Processor seconds of its process so far."""
        return cpu_seconds(self.process.pid)

    @property
    def memory_bytes(self) -> int:
        """Private resident bytes of its process."""
        lines = Path(f"/proc/{self.process.pid}/smaps_rollup").read_text().splitlines()
        return 1024 * sum(int(line.split()[1]) for line in lines if line.startswith("Private_"))


@contextlib.contextmanager
def served(home: Path, *roots: Path, arguments: Sequence[str] = (), **environment: str) -> Iterator[Served]:
    """Start a service on a free port in ``home``, which may have been used before; end it when the block exits."""
    home.mkdir(parents=True, exist_ok=True)
    own = {"TRAINYARD_HOME": str(home), "TRAINYARD_DATA_ROOTS": ":".join(map(str, roots))}
    begin = (home / "service.log").stat().st_size if (home / "service.log").exists() else 0
    with (home / "service.log").open("ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "trainyard.service", "--port", "0", *arguments],
            env={**os.environ, **own, **environment},
            stdout=log,
            stderr=log,
        )
    try:
        yield Served(until(lambda: _address(home / "service.log", begin)), process)
    finally:
        process.terminate()
        process.wait(30)


def _address(log: Path, begin: int) -> str | None:
    # From the log after ``begin``: service.json is written only by a service that schedules.
    lines = log.read_bytes()[begin:].decode(errors="replace").splitlines()
    return next((line.split()[-1] for line in lines if line.startswith("Trainyard is ready at ")), None)


def worker_points(root: Path, name: str, spec: dict[str, Any], **environment: str) -> list[dict[str, Any]]:
    """Run the worker on ``spec`` below ``root``; return its metric events. All runs share the tokenized corpus."""
    return [event for event in worker_events(root, name, spec, **environment) if event["kind"] == "metric"]


def worker_events(root: Path, name: str, spec: dict[str, Any], **environment: str) -> list[dict[str, Any]]:
    """Return all events of such a run."""
    run = RunDir(root / name)
    run.path.mkdir()
    run.spec.write_text(json.dumps(spec))
    own = {"TRAINYARD_CORPUS_CACHE": str(root / "cache")}
    subprocess.run(
        [sys.executable, "-m", "trainyard.worker", str(run.path)],
        check=True,
        capture_output=True,
        env={**os.environ, **own, **environment},
    )
    return [json.loads(line) for line in run.attempt(1).outbox.read_text().splitlines()]


def torchrun(run_dir: Path, ranks: int) -> "subprocess.Popen[bytes]":
    """Start the worker with torchrun, as a person would."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    return subprocess.Popen(
        [*command, "-m", "trainyard.worker", str(run_dir)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
