"""64 clients with 100 requests a second while both cores train: their latency, and the slowdown of training."""

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.corpus import write_docstrings
from benchmarks.load.clients import CLIENTS, PER_SECOND
from benchmarks.load.tables import Figure, quantile
from benchmarks.load.wire_bytes import Wire
from benchmarks.running import Served, cpu_seconds, served, until
from trainyard.contract.processes import find_by_marker
from trainyard.contract.rundir import RunDir

WINDOW_SECONDS = 20.0
ROUNDS = 3


def measure() -> Iterator[Figure]:
    """Alternate windows with and without clients, so that a slow minute of the machine hits both."""
    with tempfile.TemporaryDirectory() as folder:
        corpus, home = Path(folder) / "corpus.jsonl", Path(folder) / "home"
        write_docstrings(corpus, 2000)
        with served(home, Path(folder), TRAINYARD_CPU_SLOTS="2") as service, Wire(service.url) as wire:
            job_id = wire.json("POST", "/jobs", spec(corpus))["id"]
            attempt = RunDir(home / "runs" / job_id).attempt(1)
            until(lambda: (attempt.read_step() or 0) > 20, 300)
            yield from _rounds(service, job_id, str(corpus), lambda: attempt.read_step() or 0)
            wire.json("POST", f"/jobs/{job_id}/kill")
            until(lambda: wire.json("GET", f"/jobs/{job_id}")["status"] == "cancelled")


def _rounds(service: Served, job_id: str, corpus: str, step: Any) -> Iterator[Figure]:
    kinds = {kind: Load() for kind in ("", "polls")}
    alone: list[Window] = []
    for _ in range(ROUNDS):
        alone.append(_window(job_id, step, lambda: time.sleep(WINDOW_SECONDS)))
        for kind, load in kinds.items():
            before = service.cpu_seconds
            work = partial(_run_clients, service.url, job_id, corpus, kind, load)
            load.windows.append(_window(job_id, step, work))
            load.service_seconds += service.cpu_seconds - before
    for kind, load in kinds.items():
        label = f"{CLIENTS} clients, {PER_SECOND} requests/s{', polling with tags' if kind else ''}"
        yield from _figures(label, load, alone)


def _figures(label: str, load: "Load", alone: "list[Window]") -> Iterator[Figure]:
    yield Figure(f"{label}: read, p50", 1000 * quantile(load.took["read"], 0.5), "ms")
    yield Figure(f"{label}: read, p99", 1000 * quantile(load.took["read"], 0.99), "ms", 100)
    yield Figure(f"{label}: write, p99", 1000 * quantile(load.took["write"], 0.99), "ms", 250)
    pairs = list(zip(alone, load.windows, strict=True))
    slower = 1 - statistics.median(loaded.steps_per_second / before.steps_per_second for before, loaded in pairs)
    yield Figure(f"{label}: training is slower by", 100 * slower, "%", 10)
    more = statistics.median(loaded.cpu_per_step / before.cpu_per_step for before, loaded in pairs) - 1
    yield Figure(f"{label}: more CPU time of the ranks per step", 100 * more, "%")
    seconds = ROUNDS * WINDOW_SECONDS
    yield Figure(f"{label}: of the cores the service takes", 100 * load.service_seconds / seconds / 2, "%")
    yield Figure(f"{label}: of the cores the clients take", 100 * load.client_seconds / seconds / 2, "%")


@dataclass(frozen=True)
class Window:
    """Training during one window."""

    steps_per_second: float
    cpu_per_step: float


@dataclass
class Load:
    """What one kind of clients measured and took, over all rounds."""

    windows: list[Window] = field(default_factory=list)
    took: dict[str, list[float]] = field(default_factory=lambda: {"read": [0.0], "write": [0.0]})
    service_seconds: float = 0.0
    client_seconds: float = 0.0


def _run_clients(url: str, job_id: str, corpus: str, kind: str, load: Load) -> None:
    command = [sys.executable, "-m", "benchmarks.load.clients", url, job_id, corpus, str(WINDOW_SECONDS)]
    done = subprocess.run([*command, *kind.split()], check=True, capture_output=True, text=True)
    result = json.loads(done.stdout)
    load.client_seconds += float(result.pop("client_cpu"))
    for name, values in result.items():
        load.took[name] += values


def _window(job_id: str, step: Any, wait: Any) -> Window:
    """Measure from the end of one step to the end of another."""
    begin, began = _next_step(step)
    spent = _cpu_seconds(job_id)
    wait()
    end, ended = _next_step(step)
    return Window((end - begin) / (ended - began), (_cpu_seconds(job_id) - spent) / (end - begin))


def _cpu_seconds(job_id: str) -> float:
    """Return the processor seconds of all processes of the job's first attempt so far."""
    return sum(cpu_seconds(process.pid) for process in find_by_marker(f"{job_id}/1"))


def _next_step(step: Any) -> tuple[int, float]:
    before: int = step()
    until(lambda: step() > before)
    return step(), time.monotonic()


def spec(corpus: Path) -> dict[str, Any]:
    """Return a spec of two ranks that keep both cores busy until they are stopped."""
    return {
        "model": {"hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2},
        "data": {"data_path": str(corpus), "max_seq_len": 128},
        "training": {"max_steps": 1_000_000, "batch_size": 8, "accumulation_steps": 1, "dtype": "float32"},
        "checkpoint": {"save_interval": 1_000_000},
        "reporting": {"log_interval": 10},
        "resources": {"device": "cpu", "nproc_per_node": 2},
    }
