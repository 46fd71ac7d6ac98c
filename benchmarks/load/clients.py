"""``python -m benchmarks.load.clients URL JOB CORPUS SECONDS [polls]``: 64 clients, together 100 requests a second.

With ``polls`` they send the tag of their last response, as the Python client and the dashboard do.

Requests are sent by the clock, whether earlier ones were answered or not, and their time counts from when they were
due, so that a stalled service is not spared any request. Prints the times as JSON.
"""

import json
import random
import sys
import threading
import time
from collections.abc import Callable

from benchmarks.load.wire_bytes import Wire

CLIENTS = 64
PER_SECOND = 100
WRITES = 0.1
"""Share of the requests that change something."""


def main() -> None:
    url, job_id, corpus, seconds = sys.argv[1], sys.argv[2], sys.argv[3], float(sys.argv[4])
    polls = sys.argv[5:] == ["polls"]
    took: dict[str, list[float]] = {"read": [], "write": []}
    begin = time.monotonic() + 0.2
    total = int(seconds * PER_SECOND)
    threads = [
        threading.Thread(target=client, args=(url, requests(job_id, corpus, number), number, total, begin, took, polls))
        for number in range(CLIENTS)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    print(json.dumps({**took, "client_cpu": time.process_time()}))


Request = tuple[str, str, str, object]


def requests(job_id: str, corpus: str, seed: int) -> Callable[[], Request]:
    """Return a function that draws the next request: what dashboards, `watch` and scripts send."""
    dice = random.Random(seed)
    spec = {"data": {"data_path": corpus}, "resources": {"device": "cpu"}}
    reads = (f"/jobs/{job_id}", "/jobs?limit=20", f"/jobs/{job_id}/metrics?max_points=500",
             f"/jobs/{job_id}/events?limit=50", f"/jobs/{job_id}/logs?tail=100", "/devices")  # fmt: skip
    writes: tuple[Request, ...] = (
        ("write", "POST", "/jobs", spec),
        ("write", "PATCH", f"/jobs/{job_id}", {"labels": {"looked": "at"}}),
    )

    def draw() -> Request:
        if dice.random() < WRITES:
            return dice.choice(writes)
        return "read", "GET", dice.choice(reads), None

    return draw


def client(
    url: str,
    draw: Callable[[], Request],
    number: int,
    total: int,
    begin: float,
    took: dict[str, list[float]],
    polls: bool = False,
) -> None:
    with Wire(url, polls=polls) as wire:
        for index in range(number, total, CLIENTS):
            kind, method, path, body = draw()
            due = begin + index / PER_SECOND
            time.sleep(max(0.0, due - time.monotonic()))
            wire.json(method, path, body)
            took[kind].append(time.monotonic() - due)


if __name__ == "__main__":
    main()
