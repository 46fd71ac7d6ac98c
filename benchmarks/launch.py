"""Time to the first step: `POST /jobs` against `torchrun -m trainyard.worker` by hand, on the same spec."""

import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx2

from benchmarks.corpus import write_docstrings
from benchmarks.running import service, torchrun, until
from trainyard.contract.rundir import RunDir

ROUNDS = 5
RANKS = 2
LIMIT_SECONDS = 0.5


def small_spec(corpus: Path) -> dict[str, Any]:
    """Return a spec so small that the run is almost only its start."""
    return {
        "model": {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2},
        "data": {"data_path": str(corpus), "max_seq_len": 64},
        "training": {"max_steps": 3, "batch_size": 2, "accumulation_steps": 1},
        "reporting": {"log_interval": 1},
        "resources": {"device": "cpu", "nproc_per_node": RANKS},
    }


def by_hand(run: RunDir, spec: dict[str, Any]) -> float:
    """Return the seconds from the command to the end of the first step."""
    run.path.mkdir(parents=True)
    run.spec.write_text(json.dumps(spec))
    began = time.perf_counter()
    process = torchrun(run.path, RANKS)
    until(lambda: run.attempt(1).read_step())
    took = time.perf_counter() - began
    process.wait(60)
    return took


def by_service(client: httpx2.Client, home: Path, spec: dict[str, Any]) -> float:
    began = time.perf_counter()
    response = client.post("/jobs", json=spec)
    response.raise_for_status()
    job = response.json()["id"]
    until(lambda: RunDir(home / "runs" / job).attempt(1).read_step())
    took = time.perf_counter() - began
    until(lambda: client.get(f"/jobs/{job}").json()["status"] == "succeeded")
    return took


def main() -> None:
    """Alternate the two, so that a slow minute of the machine affects both."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_docstrings(root / "corpus.jsonl", 200)
        small, home = small_spec(root / "corpus.jsonl"), root / "home"
        hand, served = [], []
        with service(home, root) as client:
            for number in range(ROUNDS + 1):
                pair = by_hand(RunDir(root / f"hand-{number}"), small), by_service(client, home, small)
                if number:  # the first round warms the disk cache and tokenizes the corpus
                    hand.append(pair[0])
                    served.append(pair[1])
    difference = statistics.median(a - b for a, b in zip(served, hand, strict=True))
    print(f"torchrun by hand    {statistics.median(hand):6.2f} s to the first step (median of {ROUNDS})")
    print(f"POST /jobs          {statistics.median(served):6.2f} s")
    print(f"difference          {difference:+6.2f} s (median of pairs; goal: at most +{LIMIT_SECONDS} s)")
