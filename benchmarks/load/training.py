"""64 clients with 100 requests a second while both cores train: their latency, and the slowdown of training."""

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.corpus import write_docstrings
from benchmarks.load.clients import CLIENTS, PER_SECOND
from benchmarks.load.tables import Figure, quantile
from benchmarks.load.wire_bytes import Wire
from benchmarks.running import Served, served, until
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
    alone, loaded, took = [], [], {"read": [0.0], "write": [0.0]}
    spent = client_seconds = 0.0
    for _ in range(ROUNDS):
        alone.append(_speed(step, lambda: time.sleep(WINDOW_SECONDS)))
        before = service.cpu_seconds
        loaded.append(_speed(step, lambda: _run_clients(service.url, job_id, corpus, took)))
        spent += service.cpu_seconds - before
        client_seconds += took.pop("client_cpu")[0]
    label = f"{CLIENTS} clients, {PER_SECOND} requests/s, both cores train"
    yield Figure(f"{label}: read, p50", 1000 * quantile(took["read"], 0.5), "ms")
    yield Figure(f"{label}: read, p99", 1000 * quantile(took["read"], 0.99), "ms", 100)
    yield Figure(f"{label}: write, p99", 1000 * quantile(took["write"], 0.99), "ms", 250)
    slower = 1 - statistics.median(b / a for a, b in zip(alone, loaded, strict=True))
    yield Figure("training is slower meanwhile by", 100 * slower, "%", 10)
    seconds = ROUNDS * WINDOW_SECONDS
    yield Figure("of the cores the service takes", 100 * spent / seconds / 2, "%")
    yield Figure("of the cores the clients themselves take", 100 * client_seconds / seconds / 2, "%")


def _run_clients(url: str, job_id: str, corpus: str, took: dict[str, list[float]]) -> None:
    command = [sys.executable, "-m", "benchmarks.load.clients", url, job_id, corpus, str(WINDOW_SECONDS)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    result = json.loads(done.stdout)
    took["client_cpu"] = [float(result.pop("client_cpu"))]
    for kind, values in result.items():
        took[kind] += values


def _speed(step: Any, wait: Any) -> float:
    """Return steps a second, from the end of one step to the end of another."""
    begin, began = _next_step(step)
    wait()
    end, ended = _next_step(step)
    return (end - begin) / (ended - began)


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
