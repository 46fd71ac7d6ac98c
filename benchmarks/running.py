"""Starting the service and a run by hand, for measurements."""

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2

from contract.rundir import RunDir, read_json


def until(condition: Callable[[], Any], seconds: float = 120.0) -> Any:
    """The first true value of ``condition``, looked at every 2 ms. Raises TimeoutError."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        if time.monotonic() > deadline:
            raise TimeoutError("waited in vain")
        time.sleep(0.002)
    return value


@contextlib.contextmanager
def service(home: Path, *roots: Path) -> Iterator[httpx2.Client]:
    """A service of its own on a free port, and a client of it; ended on the way out."""
    home.mkdir(parents=True)
    environment = {**os.environ, "TRAINYARD_HOME": str(home), "TRAINYARD_DATA_ROOTS": ":".join(map(str, roots))}
    with (home / "service.log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "service", "--port", "0"], env=environment, stdout=log, stderr=log
        )
    try:
        record = until(lambda: read_json(home / "service.json"))
        with httpx2.Client(base_url=record["url"], timeout=10) as client:
            until(lambda: client.get("/ready").status_code == 200)
            yield client
    finally:
        process.terminate()
        process.wait(30)


def worker_points(root: Path, name: str, spec: dict[str, Any]) -> list[dict[str, Any]]:
    """Run ``spec`` by hand below ``root`` and read back its metric points; a corpus is tokenized once for all runs."""
    run = RunDir(root / name)
    run.path.mkdir()
    run.spec.write_text(json.dumps(spec))
    environment = {**os.environ, "TRAINYARD_CORPUS_CACHE": str(root / "cache")}
    subprocess.run([sys.executable, "-m", "worker", str(run.path)], check=True, capture_output=True, env=environment)
    lines = [json.loads(line) for line in run.attempt(1).outbox.read_text().splitlines()]
    return [line for line in lines if line["kind"] == "metric"]


def torchrun(run_dir: Path, ranks: int) -> "subprocess.Popen[bytes]":
    """The worker by hand, as a person would start it."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    return subprocess.Popen(
        [*command, "-m", "worker", str(run_dir)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
