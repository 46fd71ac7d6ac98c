"""The tail of a log of 20 GB, most of it a hole: time and memory of the request."""

import time
from collections.abc import Iterator

from benchmarks.load import live
from benchmarks.load.tables import Figure, quantile
from benchmarks.load.wire_bytes import Wire
from benchmarks.running import served
from trainyard.contract.rundir import RunDir

BYTES = 20 << 30
REQUESTS = 40


def measure() -> Iterator[Figure]:
    with live.home_with_jobs(1) as (home, [agent]):
        job_id = agent.job_id
        log = RunDir(home / "runs" / job_id).attempt(1).rank_log(0)
        log.parent.mkdir(parents=True)
        with log.open("wb") as file:
            file.truncate(BYTES)
            file.seek(BYTES)
            file.write(b"".join(b"step %d: loss 2.0\n" % step for step in range(100_000)))
        took = []
        with served(home, home.parent, arguments=["--no-scheduler"]) as service, Wire(service.url) as wire:
            path = f"/jobs/{job_id}/logs?tail=100"
            assert "step 99999" in wire.json("GET", path)["data"]
            before = service.memory_bytes
            for _ in range(REQUESTS):
                begin = time.perf_counter()
                assert wire.json("GET", path)["data"].count("\n") == 100
                took.append(1000 * (time.perf_counter() - begin))
            grown = service.memory_bytes - before
    yield Figure("the tail of a 20 GB log: median", quantile(took, 0.5), "ms", 50)
    yield Figure(f"the tail of a 20 GB log: worst of {REQUESTS}", max(took), "ms")
    yield Figure("memory that they add", grown / (1 << 20), "MiB", 8)
