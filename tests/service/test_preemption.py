"""Preemption: which attempts make room for a job of higher priority, which do not, and what the jobs show."""

import random
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import pytest

from tests.fakes.launcher import FakeAttempt
from tests.service.conftest import MakeHarness
from tests.service.harness import ServiceHarness, path_of
from tests.service.test_plan import NOW, gpus, job
from trainyard.contract.status import Desired, JobStatus, Reason
from trainyard.service.devices.inventory import Device, cpu_slots
from trainyard.service.jobs.repository import EventDraft
from trainyard.service.launch.base import AttemptRef
from trainyard.service.scheduler.plan import Preempt, Start, plan
from trainyard.service.scheduler.preemption import PreemptionBudget
from trainyard.service.scheduler.snapshot import LiveAttempt, QueuedJob, Snapshot


def holder(
    job_id: str, *devices: str, priority: int = 0, age: float = 60.0, desired: Desired = Desired.RUN, **rest: Any
) -> LiveAttempt:
    """An attempt that runs and has been heard just now."""
    fields: dict[str, Any] = {"running": True, "made_progress": True, **rest}
    return LiveAttempt(
        f"att_{job_id}",
        AttemptRef(job_id, 1),
        desired,
        True,
        NOW,
        NOW,
        inspected_at=NOW,
        notified=desired,
        priority=priority,
        devices=devices,
        created_at=NOW - timedelta(seconds=age),
        **fields,
    )


def snapshot(*live: LiveAttempt, queued: list[QueuedJob], devices: tuple[Device, ...] = cpu_slots(4)) -> Snapshot:
    leases = {device: attempt.name.job_id for attempt in live for device in attempt.devices}
    return Snapshot(queued=queued, live=live, leases=leases, devices=devices, preempts=True)


def victims(seen: Snapshot) -> dict[str, str]:
    return {a.attempt.name.job_id: a.job_id for a in plan(seen, NOW).actions if isinstance(a, Preempt)}


FULL = (holder("low", "cpu:0", "cpu:1"), holder("mid", "cpu:2", priority=3), holder("top", "cpu:3", priority=9))


@pytest.mark.parametrize(
    ("ranks", "priority", "expected"),
    [
        (1, 0, {}),
        (1, 1, {"low": "front"}),
        (2, 5, {"low": "front"}),
        (3, 5, {"low": "front", "mid": "front"}),
        # Not enough even with all of them: nobody is stopped for nothing.
        (4, 5, {}),
        (4, 10, {"low": "front", "mid": "front", "top": "front"}),
        (1, 3, {"low": "front"}),
    ],
)
def test_the_least_important_make_room_and_no_more_than_needed(
    ranks: int, priority: int, expected: dict[str, str]
) -> None:
    assert victims(snapshot(*FULL, queued=[job("front", ranks, priority=priority)])) == expected


@pytest.mark.parametrize(
    ("spared", "why"),
    [
        ({"made_progress": False}, "it has made no step since it began: it would be stopped again and again"),
        ({"running": False}, "it is starting"),
        ({"preemptible": False}, "its spec says no"),
        ({"priority": 5}, "it is as important"),
    ],
)
def test_who_is_spared(spared: dict[str, Any], why: str) -> None:
    only = holder("low", "cpu:0", **spared)
    assert victims(snapshot(only, queued=[job("front", priority=5)], devices=cpu_slots(1))) == {}, why


def test_no_preemption_if_it_is_switched_off() -> None:
    seen = snapshot(*FULL, queued=[job("front", priority=10)])
    assert victims(Snapshot(seen.queued, seen.live, leases=seen.leases, devices=seen.devices)) == {}


def test_of_the_same_priority_the_youngest_goes_first() -> None:
    old, young = holder("old", "cpu:0", age=900), holder("young", "cpu:1", age=30)
    assert victims(snapshot(old, young, queued=[job("front", priority=1)], devices=cpu_slots(2))) == {"young": "front"}


def test_a_small_one_is_spared_where_a_larger_one_is_needed_anyway() -> None:
    small, large = holder("small", "cpu:0", age=1), holder("large", "cpu:1", "cpu:2", "cpu:3", age=99)
    assert victims(snapshot(small, large, queued=[job("front", 3, priority=1)])) == {"large": "front"}


def test_what_stops_anyway_is_waited_for() -> None:
    leaving = holder("leaving", "cpu:0", desired=Desired.CANCEL)
    low = holder("low", "cpu:1")
    seen = snapshot(leaving, low, queued=[job("front", priority=1)], devices=cpu_slots(2))
    decided = plan(seen, NOW)
    assert decided.actions == ()
    assert decided.waiting == {"front": "1 CPU slot; 0 of 2 free; leaving makes room"}


def test_what_was_promised_to_one_is_not_promised_to_the_next() -> None:
    leaving, low = holder("leaving", "cpu:0", desired=Desired.PAUSE), holder("low", "cpu:1")
    queue = [job("first", priority=2), job("second", priority=1)]
    assert victims(snapshot(leaving, low, queued=queue, devices=cpu_slots(2))) == {"low": "second"}


def test_a_device_that_is_being_freed_preempts_no_other_job() -> None:
    """The attempt has ended and its process is still seen: one look later the device is free."""
    low = holder("low", "cuda:1")
    devices = (Device("cuda:0", "cuda", processes=(9,)), Device("cuda:1", "cuda", processes=(8,)))
    seen = snapshot(low, queued=[job("front", device="cuda", priority=1)], devices=devices)
    assert victims(seen) == {}
    assert plan(seen, NOW).waiting == {"front": "1 GPU; 0 of 2 free; its devices are being freed"}
    stranger = (Device("cuda:0", "cuda", processes=(9,), strangers=(9,)), devices[1])
    assert victims(snapshot(low, queued=list(seen.queued), devices=stranger)) == {"low": "front"}


def test_free_devices_are_kept_for_the_one_that_room_is_made_for() -> None:
    """Else the job behind it takes them, is the next to make room, and so on."""
    low = holder("low", "cpu:0")
    queue = [job("front", 2, priority=5), job("behind", 1)]
    decided = plan(snapshot(low, queued=queue, devices=cpu_slots(2)), NOW)
    assert [type(action) for action in decided.actions] == [Preempt]
    assert decided.waiting == {
        "front": "2 CPU slots; 1 of 2 free; low makes room",
        "behind": "1 CPU slot; 0 of 2 free",
    }


def test_no_preemption_for_a_job_after_one_that_waits_for_more() -> None:
    low, top = holder("low", "cpu:0"), holder("top", "cpu:1", priority=9)
    queue = [job("front", 2, priority=5, age=400), job("behind", 1, priority=4)]
    assert victims(snapshot(low, top, queued=queue, devices=cpu_slots(2))) == {}
    other = [queue[0], job("elsewhere", device="cuda", priority=4)]
    on_gpu = holder("gpu", "cuda:0")
    assert victims(snapshot(low, top, on_gpu, queued=other, devices=(*cpu_slots(2), *gpus(1)))) == {"gpu": "elsewhere"}


def test_a_named_device_is_freed_of_the_one_that_has_it() -> None:
    a, b = holder("a", "cuda:0"), holder("b", "cuda:1", age=1)
    assert victims(snapshot(a, b, queued=[job("front", device="cuda:0", priority=1)], devices=gpus(2))) == {
        "a": "front"
    }


def random_snapshot(dice: random.Random) -> Snapshot:
    total = dice.randint(1, 8)
    free = [f"cpu:{i}" for i in range(total)]
    live: list[LiveAttempt] = []
    while free and dice.random() < 0.8:
        taken = [free.pop() for _ in range(dice.randint(1, len(free)))]
        desired = dice.choice((Desired.RUN, Desired.RUN, Desired.RUN, Desired.PAUSE))
        spared = {"made_progress": dice.random() < 0.8, "preemptible": dice.random() < 0.8}
        name, priority = f"run_{len(live)}", dice.randint(0, 3)
        live.append(holder(name, *taken, priority=priority, age=dice.random(), desired=desired, **spared))
    queued = [job(f"q{n}", dice.randint(1, total), priority=dice.randint(0, 4)) for n in range(dice.randint(0, 4))]
    return snapshot(*live, queued=queued, devices=cpu_slots(total))


def test_ten_thousand_situations() -> None:
    """Room that is made suffices; nobody in it could be left out; nobody is asked twice or by an equal."""
    asked = 0
    for seed in range(10_000):
        seen = random_snapshot(random.Random(seed))
        free = {device.id for device in seen.devices} - set(seen.leases)
        by_job = {queued.id: queued for queued in seen.queued}
        decided = plan(seen, NOW).actions
        coming = {d for a in seen.live if a.desired is not Desired.RUN for d in a.devices}
        free -= {device for action in decided if isinstance(action, Start) for device in action.devices}
        chosen = [action.attempt for action in decided if isinstance(action, Preempt)]
        assert len(chosen) == len(set(chosen)), seed
        for action in decided:
            if isinstance(action, Preempt):
                asked += 1
                wanting = by_job[action.job_id]
                assert action.attempt.priority < wanting.priority, seed
                freed = [d for a in chosen for d in a.devices]
                assert len(free) + len(coming) + len(freed) >= wanting.ranks, seed
                mine = [a for a in decided if isinstance(a, Preempt) and a.job_id == wanting.id]
                others = sum(len(a.attempt.devices) for a in mine if a is not action)
                assert others < wanting.ranks, seed
    assert asked > 1000


def test_victims_are_named_in_the_reason() -> None:
    seen = snapshot(*FULL, queued=[])
    room = PreemptionBudget(seen).find_victims(job("front", 4, priority=10), "cpu", 0)
    assert str(room) == "low, mid and top make room"


# With a whole service.


@pytest.fixture
def rig(make_rig: MakeHarness, any_url: str) -> Iterator[ServiceHarness]:
    made = make_rig(any_url, preempts=True)
    yield made
    made.client.__exit__(None, None, None)


def started(rig: ServiceHarness, step: int, **resources: Any) -> tuple[str, FakeAttempt]:
    job_id, attempt = rig.running(resources={"nproc_per_node": 2, **resources})
    if step:
        attempt.metric(step)
        rig.ship(attempt)
    return job_id, attempt


def test_pause_requeue_resume(rig: ServiceHarness) -> None:
    low, attempt = started(rig, 3)
    front = rig.submit(resources={"priority": 5})
    rig.reconcile()
    job = rig.job(low)
    assert (job["status"], job["desired"], job["reason"]) == ("pausing", "pause", "preempted")
    assert job["summary"] == "Saving and pausing at step 3 to make room for a job of higher priority."
    assert rig.heartbeat(attempt)["desired"] == "pause"
    assert attempt.stop_asked == 1, "the ranks hear it before the agent does"
    waiting = rig.job(front)
    assert waiting["queue"] == {"position": 1, "waiting_for": f"1 CPU slot; 0 of 2 free; {low} makes room"}
    assert any(e["kind"] == "preempts" and low in e["message"] for e in rig.data(front, "events"))
    rig.exit(attempt, "stopped", Reason.USER, step=4, message="saved and stopped at step 4")
    job = rig.job(low)
    assert (job["status"], job["desired"], job["reason"]) == ("queued", "run", "preempted")
    assert job["message"] == f"saved and stopped at step 4, to make room for {front}; it resumes automatically"
    rig.reconcile()
    assert rig.status(front) is JobStatus.STARTING
    assert rig.job(low)["summary"] == (
        "Paused at step 4 to make room for a job of higher priority; resumes automatically. "
        "Waiting for 2 CPU slots; 1 of 2 free. Position 1."
    )
    rig.exit(rig.launcher.of(front), "completed", step=10)
    second = rig.next_attempt(low, 2, start_step=4)
    rig.exit(second, "completed", step=10)
    assert path_of(rig.data(low, "events")) == [
        *("starting", "running", "pausing", "paused", "queued", "starting", "running", "succeeded")
    ]
    attempts = rig.data(low, "attempts")
    assert [(a["trigger"], a["outcome"], a["reason"]) for a in attempts] == [
        ("submit", "stopped", "preempted"),
        ("preemption", "completed", None),
    ]


def test_a_job_that_was_resumed_is_left_alone_until_it_has_made_a_step(rig: ServiceHarness) -> None:
    low, attempt = started(rig, 3)
    for number in (2, 3):
        front = rig.submit(resources={"priority": 5, "nproc_per_node": 2})
        rig.reconcile()
        rig.exit(attempt, "stopped", Reason.USER, step=3)
        rig.exit(rig.next_attempt(front, 1), "completed", step=10)
        attempt = rig.next_attempt(low, number, start_step=3)
        again = rig.submit(resources={"priority": 5, "nproc_per_node": 2})
        for _ in range(3):
            rig.reconcile()
            rig.heartbeat(attempt, 3)
        assert rig.status(low) is JobStatus.RUNNING
        assert rig.job(again)["queue"]["waiting_for"] == "2 CPU slots; 0 of 2 free"
        rig.post_action(again, "cancel")
        attempt.metric(4)
        rig.ship(attempt)


@pytest.mark.parametrize(("verb", "becomes"), [("pause", JobStatus.PAUSED), ("cancel", JobStatus.CANCELLED)])
def test_the_user_s_request_comes_first(rig: ServiceHarness, verb: str, becomes: JobStatus) -> None:
    low, attempt = started(rig, 3)
    rig.submit(resources={"priority": 5})
    rig.reconcile()
    rig.post_action(low, "resume")
    assert rig.status(low) is JobStatus.PAUSING
    assert rig.post_action(low, verb)["reason"] is None
    rig.exit(attempt, "stopped", Reason.USER, step=4)
    rig.reconcile()
    job = rig.job(low)
    assert (job["status"], job["reason"]) == (becomes, "user")
    assert len(rig.launcher.starts) == 2, "what was stopped by its user is not started again"


@pytest.mark.parametrize(
    ("outcome", "reason", "seconds", "counted"),
    [("killed", Reason.USER, 5, False), ("crashed", Reason.WORKER_CRASHED, 5, True)],
)
def test_one_that_did_not_save_goes_on_from_its_last_checkpoint(
    rig: ServiceHarness, outcome: Any, reason: Reason, seconds: int, counted: bool
) -> None:
    low, attempt = started(rig, 3)
    front = rig.submit(resources={"priority": 5, "nproc_per_node": 2})
    rig.reconcile()
    rig.exit(attempt, outcome, reason, step=4)
    job = rig.job(low)
    assert (job["status"], job["reason"]) == ("interrupted", "worker_crashed" if counted else "preempted")
    assert f"restarting in {seconds} s{', 1 of 3' if counted else ''}" in job["message"]
    rig.reconcile()
    rig.clock.forward(seconds + 1)
    rig.exit(rig.next_attempt(front, 1), "completed", step=10)
    rig.next_attempt(low, 2)


def test_a_service_that_dies_in_between_forgets_nothing(make_rig: MakeHarness, any_url: str) -> None:
    first = make_rig(any_url, preempts=True)
    low, attempt = started(first, 3)
    front = first.submit(resources={"priority": 5})
    first.reconcile()
    second = first.restart()
    second.reconcile()
    second.exit(attempt, "stopped", Reason.USER, step=4)
    second.reconcile()
    assert (second.status(low), second.status(front)) == (JobStatus.QUEUED, JobStatus.STARTING)
    second.close()


def test_what_changed_between_plan_and_deed_is_seen(rig: ServiceHarness) -> None:
    low, _ = started(rig, 3)
    front = rig.submit(resources={"priority": 5})
    scheduler = rig.scheduler
    action = next(a for a in plan(scheduler._snapshot(), rig.clock()).actions if isinstance(a, Preempt))
    rig.client.patch(f"/jobs/{front}", json={"priority": 0})
    assert scheduler._executor.execute(action) is False
    assert rig.status(low) is JobStatus.RUNNING
    rig.client.patch(f"/jobs/{front}", json={"priority": 5})
    rig.post_action(front, "cancel")
    assert scheduler._executor.execute(action) is False
    rig.client.delete(f"/jobs/{front}")
    assert scheduler._executor.execute(action) is True, "look again: the job is gone"
    assert rig.status(low) is JobStatus.RUNNING


def test_a_spec_that_says_no_is_left_alone(rig: ServiceHarness) -> None:
    low, _ = started(rig, 3, preemptible=False)
    rig.submit(resources={"priority": 5})
    rig.reconcile()
    assert rig.status(low) is JobStatus.RUNNING


def test_a_spec_of_before_there_was_such_a_field_may_make_room(rig: ServiceHarness) -> None:
    from trainyard.service.jobs import repository

    low, _ = started(rig, 3)
    with rig.database.write() as session:
        row = repository.lock(session, low)
        row.spec = {**row.spec, "resources": {k: v for k, v in row.spec["resources"].items() if k != "preemptible"}}
        repository.record_event(session, row, EventDraft("changed", "an old spec"), rig.clock())
    rig.submit(resources={"priority": 5})
    rig.reconcile()
    assert rig.status(low) is JobStatus.PAUSING
