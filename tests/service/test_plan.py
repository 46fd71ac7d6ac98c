"""plan(snapshot, now): pure, so that every case is one line of input."""

import random
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from tests.work import count_calls
from trainyard.contract.status import Desired
from trainyard.service.devices.inventory import Device, cpu_slots
from trainyard.service.launch.base import AttemptRef
from trainyard.service.scheduler.plan import (
    BACKFILL_PATIENCE,
    Inspect,
    Kill,
    NotifyStop,
    Reclaim,
    Restart,
    Start,
    plan,
)
from trainyard.service.scheduler.snapshot import LiveAttempt, QueuedJob, Snapshot
from trainyard.service.timing import Timing

NOW = datetime(2026, 1, 1, 12, tzinfo=UTC)


def gpus(count: int, busy: tuple[int, ...] = ()) -> tuple[Device, ...]:
    return tuple(Device(f"cuda:{i}", "cuda", processes=(99,) if i in busy else ()) for i in range(count))


def job(name: str, ranks: int = 1, device: str = "cpu", priority: int = 0, age: float = 0.0) -> QueuedJob:
    return QueuedJob(name, name, device, ranks, priority, NOW - timedelta(seconds=age), int(1e6 - age))


def live(
    desired: Desired = Desired.RUN, heard: float | None = 0.5, looked: float | None = 0.5, **rest: Any
) -> LiveAttempt:
    ago = {None: None}
    times = [ago.get(x) if x is None else NOW - timedelta(seconds=x) for x in (heard, looked)]
    asked = NOW - timedelta(seconds=rest.pop("asked", 0.0))
    return LiveAttempt("a", AttemptRef("job_a", 1), desired, True, asked, times[0], times[1], **rest)


def starts(snapshot: Snapshot) -> dict[str, tuple[str, ...]]:
    return {a.job_id: a.devices for a in plan(snapshot, NOW).actions if isinstance(a, Start)}


def test_priority_then_age() -> None:
    queue = [job("young", age=1), job("old", age=9), job("urgent", priority=5)]
    assert list(starts(Snapshot(queued=queue, devices=cpu_slots(2)))) == ["urgent", "old"]


def test_a_device_has_one_holder() -> None:
    queue = [job("a", 2), job("b", 1)]
    found = starts(Snapshot(queued=queue, devices=cpu_slots(4), leases={"cpu:1": "other"}))
    assert found == {"a": ("cpu:0", "cpu:2"), "b": ("cpu:3",)}


def test_what_does_not_fit_is_overtaken_by_what_does() -> None:
    snapshot = Snapshot(
        queued=[job("big", 2, age=10), job("small", age=1)], devices=cpu_slots(2), leases={"cpu:0": "x"}
    )
    decided = plan(snapshot, NOW)
    assert starts(snapshot) == {"small": ("cpu:1",)}
    assert decided.waiting == {"big": "2 CPU slots; 1 of 2 free"}


def test_what_has_waited_long_is_not_overtaken_any_more() -> None:
    old = BACKFILL_PATIENCE.total_seconds() + 1
    snapshot = Snapshot(
        queued=[job("big", 2, age=old), job("small", age=1)], devices=cpu_slots(2), leases={"cpu:0": "x"}
    )
    assert starts(snapshot) == {}
    assert starts(Snapshot(queued=snapshot.queued, devices=cpu_slots(2))) == {"big": ("cpu:0", "cpu:1")}


@pytest.mark.parametrize("lent", [(), ("cuda:0",)])
@pytest.mark.parametrize("preempts", [False, True])
def test_no_device_is_reserved_for_a_job_that_cannot_fit(preempts: bool, lent: tuple[str, ...]) -> None:
    """A GPU has failed since its submission, or the service was restarted with fewer CPU slots."""
    old = BACKFILL_PATIENCE.total_seconds() + 1
    devices = (*gpus(2), Device("cuda:2", "cuda", xid_errors=(79,)), *cpu_slots(2))
    queue = [
        job("gpus", 3, "cuda", age=old, priority=1),
        job("slots", 3, "cpu", age=old, priority=1),
        job("small", 1, "cuda", age=2),
        job("on cpu", 1, "cpu", age=1),
    ]
    snapshot = Snapshot(queued=queue, devices=devices, preempts=preempts, lent=frozenset(lent))
    assert starts(snapshot) == {"small": ("cuda:1" if lent else "cuda:0",), "on cpu": ("cpu:0",)}
    assert not [action for action in plan(snapshot, NOW).actions if isinstance(action, Reclaim)]


def test_a_reservation_keeps_only_its_own_kind_of_device() -> None:
    old = BACKFILL_PATIENCE.total_seconds() + 1
    queue = [job("big", 2, "cuda", age=old), job("small", 1, "cuda"), job("cpu", 1, "cpu")]
    snapshot = Snapshot(queued=queue, devices=(*gpus(2), *cpu_slots(1)), leases={"cuda:0": "x"})
    assert starts(snapshot) == {"cpu": ("cpu:0",)}


def test_no_job_starves_under_a_stream_of_small_jobs() -> None:
    """Small jobs come without end and each runs a minute; the big one starts within its patience and one such run."""
    leases: dict[str, str] = {}
    ends: dict[str, datetime] = {}
    started: datetime | None = None
    big = QueuedJob("big", "big", "cpu", 4, 0, NOW, 0)
    queue = [big]
    for tick in range(60):
        now = NOW + timedelta(seconds=20 * tick)
        for device in [d for d, at in ends.items() if at <= now]:
            del leases[device], ends[device]
        queue += [QueuedJob(f"s{tick}.{i}", "s", "cpu", 1, 0, now, 10 + tick * 4 + i) for i in range(4)]
        for action in plan(Snapshot(queued=queue, devices=cpu_slots(4), leases=leases), now).actions:
            assert isinstance(action, Start)
            queue = [q for q in queue if q.id != action.job_id]
            leases |= dict.fromkeys(action.devices, action.job_id)
            ends |= dict.fromkeys(action.devices, now + timedelta(seconds=60))
            started = now if action.job_id == "big" else started
    assert started is not None
    assert started - NOW <= BACKFILL_PATIENCE + timedelta(seconds=100)


def test_auto_takes_cuda_where_there_is_some() -> None:
    assert starts(Snapshot(queued=[job("a", device="auto")], devices=(*gpus(1), *cpu_slots(1)))) == {"a": ("cuda:0",)}
    assert starts(Snapshot(queued=[job("a", device="auto")], devices=cpu_slots(1))) == {"a": ("cpu:0",)}


def test_a_device_with_a_strangers_process_is_not_free() -> None:
    snapshot = Snapshot(queued=[job("a", device="cuda")], devices=gpus(2, busy=(0,)))
    assert starts(snapshot) == {"a": ("cuda:1",)}
    both = Snapshot(queued=[job("a", device="cuda")], devices=gpus(2, busy=(0, 1)))
    assert plan(both, NOW).waiting == {"a": "1 GPU; 0 of 2 free"}


def test_a_named_device_is_waited_for() -> None:
    queue = [job("a", device="cuda:1"), job("b", device="cuda")]
    assert starts(Snapshot(queued=queue, devices=gpus(2))) == {"a": ("cuda:1",), "b": ("cuda:0",)}
    held = Snapshot(queued=queue, devices=gpus(2), leases={"cuda:1": "job_x"})
    assert plan(held, NOW).waiting == {"a": "cuda:1, which job_x has"}


def test_never_more_than_there_is() -> None:
    seed = 7
    dice = random.Random(seed)
    for _ in range(200):
        devices = (*gpus(dice.randrange(4)), *cpu_slots(dice.randrange(1, 5)))
        leases = {d.id: "x" for d in devices if dice.random() < 0.3}
        queue = [
            job(f"j{i}", dice.randrange(1, 4), dice.choice(["auto", "cpu", "cuda"]), dice.randrange(3))
            for i in range(8)
        ]
        given = [
            d
            for devices_of in starts(Snapshot(queued=queue, devices=devices, leases=leases)).values()
            for d in devices_of
        ]
        assert len(given) == len(set(given)), f"seed {seed}"
        assert not set(given) & set(leases), f"seed {seed}"


def test_after_a_restart_live_attempts_are_inspected_first() -> None:
    snapshot = Snapshot(live=[live(looked=None)], queued=[job("b")], devices=cpu_slots(2), leases={"cpu:0": "job_a"})
    actions = plan(snapshot, NOW).actions
    assert [type(a) for a in actions] == [Inspect, Start]


@pytest.mark.parametrize(
    ("attempt", "expected"),
    [
        (live(), None),
        (live(heard=6, looked=1), None),
        (live(heard=6, looked=6), Inspect),
        (live(heard=3600, looked=6), Inspect),
        (live(heard=None, looked=6), Inspect),
        (live(Desired.PAUSE), NotifyStop),
        (live(Desired.CANCEL), NotifyStop),
        (live(Desired.CANCEL, notified=Desired.PAUSE), NotifyStop),
        (live(Desired.PAUSE, notified=Desired.PAUSE), None),
        (live(Desired.KILL, asked=60), None),
        (live(Desired.KILL, heard=30, asked=1), None),
        (live(Desired.KILL, heard=30, asked=Timing().kill_grace.total_seconds() + 1), Kill),
        (live(Desired.CANCEL, heard=3600, notified=Desired.CANCEL), None),
    ],
)
def test_attending(attempt: LiveAttempt, expected: type | None) -> None:
    actions = plan(Snapshot(live=[attempt]), NOW).actions
    assert [type(a) for a in actions] == ([expected] if expected else [])


@pytest.mark.parametrize("hours", [-1, 1])
def test_a_clock_that_jumps_ends_nothing(hours: int) -> None:
    actions = plan(Snapshot(live=[live()]), NOW + timedelta(hours=hours)).actions
    assert all(isinstance(a, Inspect) for a in actions)


def test_restarts_that_are_due() -> None:
    assert plan(Snapshot(restarts_due=["j"]), NOW).actions == (Restart("j"),)


def test_ten_times_the_jobs_and_devices_are_about_ten_times_the_work() -> None:
    def many(jobs: int) -> Snapshot:
        queue = [job(f"j{i}", 1 + i % 8, "cuda", i % 3, age=i % 250) for i in range(jobs)]
        return Snapshot(queued=queue, devices=gpus(jobs // 10))

    small, large = many(1_000), many(10_000)
    decided = plan(large, NOW)
    assert len(decided.waiting) + len(decided.actions) == 10_000
    assert count_calls(lambda: plan(large, NOW)) < 12 * count_calls(lambda: plan(small, NOW))


def test_a_device_of_a_side_process_is_taken_back_only_if_a_job_needs_it() -> None:
    def planned(*queue: QueuedJob, leases: dict[str, str] | None = None) -> list[Start | Reclaim]:
        snapshot = Snapshot(queued=queue, devices=gpus(2), leases=leases or {}, lent=frozenset({"cuda:1"}))
        return [action for action in plan(snapshot, NOW).actions if isinstance(action, Start | Reclaim)]

    one, two = job("one", device="cuda"), job("two", 2, device="cuda")
    assert planned(one) == [Start("one", ("cuda:0",))], "another one is free"
    assert planned(two) == [Reclaim("cuda:1", "two")], "it starts in the next round"
    assert planned(two, job("later", device="cuda", age=-1)) == [Reclaim("cuda:1", "two")], "the free one is kept"
    assert planned(two, leases={"cuda:0": "other"}) == [], "it would not be enough"
    assert planned(one, leases={"cuda:0": "other"}) == [Reclaim("cuda:1", "one")]
    assert planned(job("named", device="cuda:1")) == [Reclaim("cuda:1", "named")]
    assert planned() == []
