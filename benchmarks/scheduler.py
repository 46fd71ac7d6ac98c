"""The scheduler's plan of 10,000 queued jobs on 1,000 devices, half of which are leased."""

import random
import statistics
import time
from datetime import UTC, datetime, timedelta

from trainyard.service.devices.inventory import Device
from trainyard.service.scheduler.plan import Start, plan
from trainyard.service.scheduler.snapshot import QueuedJob, Snapshot

JOBS = 10_000
DEVICES = 1_000
ROUNDS = 15
LIMIT_MILLISECONDS = 50
NOW = datetime(2026, 1, 1, tzinfo=UTC)


def crowded_snapshot(seed: int) -> Snapshot:
    """Return a queue of all sizes, priorities and ages; every second device is leased."""
    dice = random.Random(seed)
    jobs = [
        QueuedJob(
            id=f"job_{number}",
            name=f"job {number}",
            device="cuda",
            ranks=dice.choice((1, 1, 2, 4, 8)),
            priority=dice.randrange(-2, 3),
            queued_at=NOW - timedelta(seconds=dice.randrange(600)),
            number=number,
        )
        for number in range(JOBS)
    ]
    devices = tuple(Device(f"cuda:{number}", "cuda") for number in range(DEVICES))
    leases = {device.id: "another" for device in devices[::2]}
    return Snapshot(queued=jobs, leases=leases, devices=devices)


def main() -> None:
    snapshot = crowded_snapshot(1)
    took, decided = [], plan(snapshot, NOW)
    for _ in range(ROUNDS):
        began = time.thread_time()
        decided = plan(snapshot, NOW)
        took.append((time.thread_time() - began) * 1000)
    starts = sum(isinstance(action, Start) for action in decided.actions)
    print(f"{JOBS:,} queued jobs on {DEVICES:,} devices: {starts} start, {len(decided.waiting):,} wait")
    print(
        f"plan                {statistics.median(took):6.1f} ms (worst {max(took):.1f}; goal: {LIMIT_MILLISECONDS} ms)"
    )
