"""Time to the first step on two nodes: `POST /jobs` against `sbatch` by hand, on the same spec and cluster."""

import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx2

from benchmarks import launch
from benchmarks.corpus import write_docstrings
from benchmarks.running import served, until
from tests.slurm.cluster import Cluster, skip_reason
from trainyard.contract.rundir import RunDir

ROUNDS = 5
NODES = 2
LIMIT_SECONDS = 2.0

SCRIPT = """#!/bin/bash
#SBATCH --nodes=2 --ntasks-per-node=1 --output={folder}/slurm.log
srun --kill-on-bad-exit=1 --wait=0 bash -c 'exec "$@" --rdzv-conf=is_host=$((SLURM_PROCID == 0)) \
  --rdzv-endpoint=$SLURM_LAUNCH_NODE_IPADDR:{port} --local-addr=$SLURM_LAUNCH_NODE_IPADDR \
  -m trainyard.worker {folder}' torchrun \
  {python} -m torch.distributed.run --nnodes=2 --nproc-per-node=1 --rdzv-backend=c10d --rdzv-id={port}
"""


def by_hand(cluster: Cluster, folder: Path, spec: dict[str, Any], number: int) -> float:
    """Return the seconds from sbatch to the end of the first step."""
    run = RunDir(folder)
    folder.mkdir()
    run.spec.write_text(json.dumps(spec))
    script = folder / "job.sh"
    script.write_text(SCRIPT.format(folder=folder, port=23000 + number, python=sys.executable))
    began = time.perf_counter()
    cluster.run("sbatch", str(script))
    until(lambda: run.attempt(1).read_step())
    took = time.perf_counter() - began
    until(lambda: set(cluster.states().values()) == {"IDLE"})
    return took


def by_service(client: httpx2.Client, cluster: Cluster, home: Path, spec: dict[str, Any]) -> float:
    took = launch.by_service(client, home, spec)
    until(lambda: set(cluster.states().values()) == {"IDLE"})
    return took


def main() -> None:
    """Alternate the two, so that a slow minute of the machine hits both."""
    missing = skip_reason()
    if missing is not None:
        print(f"skipped: {missing}")
        return
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        (root / "slurm").mkdir()
        cluster = Cluster(root / "slurm")
        try:
            cluster.start()
            os.environ.update(cluster.environment)
            _compare(cluster, root)
        finally:
            cluster.stop()


def _compare(cluster: Cluster, root: Path) -> None:
    write_docstrings(root / "corpus.jsonl", 200)
    plain, home = launch.small_spec(root / "corpus.jsonl"), root / "home"
    plain["resources"] = {"device": "cpu"}
    on_slurm = {**plain, "resources": {"device": "cpu", "launcher": "slurm", "nnodes": NODES}}
    hand, service = [], []
    with served(home, root, TRAINYARD_SLURM="on") as running, httpx2.Client(base_url=running.url, timeout=10) as client:
        until(lambda: client.get("/ready").status_code == 200)
        for number in range(ROUNDS + 1):
            pair = by_hand(cluster, root / f"hand-{number}", plain, number), by_service(client, cluster, home, on_slurm)
            if number:  # the first round warms the disk cache and tokenizes the corpus
                hand.append(pair[0])
                service.append(pair[1])
    difference = statistics.median(a - b for a, b in zip(service, hand, strict=True))
    print(f"sbatch by hand      {statistics.median(hand):6.2f} s to the first step on two nodes (median of {ROUNDS})")
    print(f"POST /jobs          {statistics.median(service):6.2f} s")
    print(f"difference          {difference:+6.2f} s (median of pairs; goal: at most +{LIMIT_SECONDS} s)")
