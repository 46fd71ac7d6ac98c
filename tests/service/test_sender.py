"""The sender retries failures, is not held up by a slow receiver, and sends only on the leader."""

import contextlib
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from sqlalchemy import select
from sqlalchemy.pool import QueuePool

from tests.faults.service_home import until
from tests.service.conftest import MakeHarness
from tests.service.harness import ServiceHarness
from tests.service.receiver import DEADLINE, Receiver, receiving, status
from tests.service.test_webhooks import deliveries, register, send
from trainyard.contract.failpoints import armed
from trainyard.service.db.models import DeliveryRow
from trainyard.service.leadership import LEASE_SECONDS, LeaderLease
from trainyard.service.webhooks.http_client import SEND_SECONDS, DeliveryResult, WebhookClient
from trainyard.service.webhooks.retry_policy import (
    DISABLE_AFTER,
    GIVE_UP_AFTER,
    MAX_CONCURRENT,
    MAX_SECONDS,
    MAX_SENDING,
    MAX_SHARED,
    MAX_SLOW,
    MIN_SECONDS,
    NextDelivery,
    RetryDecision,
    after_failure,
    backoff,
    pick,
)
from trainyard.service.webhooks.sender import GRACE_SECONDS, Sender

NOW = datetime(2026, 1, 1, tzinfo=UTC)


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with receiving() as made:
        yield made


def wait_for_slow_receivers(rig: ServiceHarness) -> None:
    """Let the sender wait as long as a receiver delays its answers: on a busy host SEND_SECONDS may be too few."""
    rig.sender._client = WebhookClient(rig.settings.webhook_networks, seconds=DEADLINE)


def no(status_code: int | None = 500, retry_after: float | None = None) -> DeliveryResult:
    return DeliveryResult(status_code, None, 0.1, retry_after=retry_after)


def test_pauses_grow_to_a_limit_and_are_spread_out() -> None:
    whole = [backoff(n, 0.0) for n in range(1, 14)]
    assert whole[:4] == [MIN_SECONDS * 2**n for n in range(4)]
    assert whole[-1] == MAX_SECONDS
    assert backoff(10_000, 0.0) == MAX_SECONDS
    assert backoff(3, 0.999) == pytest.approx(whole[2] / 2, rel=0.01)


def test_what_follows_from_a_failure() -> None:
    def verdict(
        answer: DeliveryResult, age: timedelta = timedelta(), failing: timedelta = timedelta()
    ) -> RetryDecision:
        return after_failure(answer, 1, NOW - age, NOW - failing, NOW, 0.0)

    assert verdict(no()) == RetryDecision(NOW + timedelta(seconds=MIN_SECONDS))
    assert verdict(no(429, retry_after=90)) == RetryDecision(NOW + timedelta(seconds=90))
    assert verdict(no(429, retry_after=10**6)) == RetryDecision(NOW + timedelta(seconds=MAX_SECONDS))
    assert verdict(no(), age=GIVE_UP_AFTER) == RetryDecision(None)
    assert verdict(no(410)).disable is not None
    assert verdict(no(), failing=DISABLE_AFTER).disable is not None
    assert verdict(no(None), failing=DISABLE_AFTER / 2).disable is None


def test_a_receiver_gets_a_few_at_once_and_one_that_is_away_one() -> None:
    heads = [NextDelivery(number, "a", 0) for number in range(10)] + [NextDelivery(20 + n, "b", 9) for n in range(3)]
    assert [h.number for h in pick(heads, {})] == [0, 20, 1, 2, 3]
    assert [h.number for h in pick(heads, {0: "a", 1: "a", 2: "a", 20: "b"})] == [3]
    assert MAX_CONCURRENT == 4


def test_every_receiver_gets_its_first_delivery_before_another_gets_its_second() -> None:
    busy = {number: "abcd"[number // 4] for number in range(16)}
    assert len(busy) == MAX_SHARED
    heads = [NextDelivery(100 + n, name, 0) for n, name in enumerate("abcde" * 4)]
    assert [h.webhook_id for h in pick(heads, busy)] == ["e"]
    many = {1000 + n: f"first-{n}" for n in range(MAX_SENDING - 1)}
    assert [h.webhook_id for h in pick([*heads, NextDelivery(999, "f", 0)], many)] == ["a"]
    assert pick(heads, {**many, 5000: "x"}) == []


def test_slow_receivers_leave_places_for_quick_ones() -> None:
    slow = {f"slow-{n}" for n in range(1000)}
    heads = [NextDelivery(n, name, 0) for n, name in enumerate([*sorted(slow), "quick"])]
    sent = pick(heads, {}, slow)
    assert sent[-1].webhook_id == "quick"
    assert len(sent) == MAX_SLOW + 1 < MAX_SENDING
    assert pick(heads, {h.number: h.webhook_id for h in sent}, slow) == []


def test_what_fails_is_tried_again_later_under_the_same_id(any_rig: ServiceHarness, receiver: Receiver) -> None:
    webhook = register(any_rig, receiver.url, events=["job.created"])
    receiver.answer = status(500, "broken")
    any_rig.submit()
    with any_rig.clock.standing():
        send(any_rig)
        assert len(receiver.got) == 1
        [waits] = deliveries(any_rig, webhook)
        assert (waits["state"], waits["attempts"], waits["tries"][0]["response"]) == ("pending", 1, "broken")
        any_rig.clock.forward(MIN_SECONDS / 2 - 1)
        send(any_rig)
        assert len(receiver.got) == 1, "not before its time"
    any_rig.clock.forward(MIN_SECONDS)
    receiver.answer = status(204)
    send(any_rig)
    first, second = receiver.got
    assert (first.id, first.body) == (second.id, second.body)
    assert int(second.headers["webhook-timestamp"]) > int(first.headers["webhook-timestamp"])
    [done] = deliveries(any_rig, webhook)
    assert (done["state"], [one["status"] for one in done["tries"]]) == ("delivered", [500, 204])


def test_a_job_waits_for_its_own_past_and_for_no_other_job(any_rig: ServiceHarness, receiver: Receiver) -> None:
    register(any_rig, receiver.url, events=["*"])
    sick, well = any_rig.submit(name="sick"), any_rig.submit(name="well")
    failing = status(500)

    def answer(one: Receiver, handler: Any, got: Any) -> None:
        (failing if got.payload["data"]["job"]["id"] == sick else status(204))(one, handler, got)

    receiver.answer = answer
    for job_id in (sick, well):
        any_rig.post_action(job_id, "cancel")
    send(any_rig)
    told = [(got.payload["data"]["job"]["name"], got.type) for got in receiver.got]
    assert [kind for name, kind in told if name == "well"] == ["job.created", "job.cancelled"]
    assert [kind for name, kind in told if name == "sick"] == ["job.created"]
    receiver.answer = status(204)
    any_rig.clock.forward(60)
    send(any_rig)
    assert [got.type for got in receiver.got[-2:]] == ["job.created", "job.cancelled"]


def test_a_receiver_that_is_away_is_asked_less_and_less_and_then_never(rig: ServiceHarness, receiver: Receiver) -> None:
    webhook = register(rig, receiver.url, events=["job.created"])
    receiver.answer = status(503)
    rig.submit()
    for number in range(400):
        send(rig)
        if not rig.get(f"/webhooks/{webhook['id']}")["enabled"]:
            break
        rig.clock.forward(MAX_SECONDS / 2)
        if number % 20 == 19:
            rig.submit()
    shown = rig.get(f"/webhooks/{webhook['id']}")
    assert not shown["enabled"]
    assert "3 days" in shown["disabled_reason"]
    assert 30 < len(receiver.got) < 100, "once an hour or so"
    assert {d["state"] for d in deliveries(rig, webhook, limit=100)} >= {"failed"}
    said = len(receiver.got)
    rig.submit()
    rig.clock.forward(MAX_SECONDS)
    send(rig)
    assert len(receiver.got) == said
    again = rig.client.patch(f"/webhooks/{webhook['id']}", json={"enabled": True}).json()
    assert (again["enabled"], again["disabled_reason"], again["failures"]) == (True, None, 0)
    receiver.answer = status(204)
    rig.submit()
    send(rig)
    assert deliveries(rig, webhook)[0]["state"] == "delivered"


def test_410_means_never_again(rig: ServiceHarness, receiver: Receiver) -> None:
    webhook = register(rig, receiver.url, events=["*"])
    receiver.answer = status(410)
    rig.submit()
    rig.submit()
    send(rig)
    assert rig.get(f"/webhooks/{webhook['id']}")["disabled_reason"] == "the receiver answered 410 Gone"


def test_one_that_waits_is_sent_at_once_when_asked_to(any_rig: ServiceHarness, receiver: Receiver) -> None:
    webhook = register(any_rig, receiver.url, events=["job.created"])
    receiver.answer = status(500)
    any_rig.submit()
    for _ in range(4):
        send(any_rig)
        any_rig.clock.forward(60)
    receiver.answer = status(204)
    [waits] = deliveries(any_rig, webhook)
    any_rig.client.post(f"/webhooks/{webhook['id']}/deliveries/{waits['id']}/redeliver")
    send(any_rig)
    assert deliveries(any_rig, webhook)[0]["state"] == "delivered"


def test_a_receiver_that_does_not_answer_holds_up_nobody(any_rig: ServiceHarness, receiver: Receiver) -> None:
    """The scheduler goes on, and so do other receivers, also while every connection of one hangs."""
    wait_for_slow_receivers(any_rig)
    with receiving() as slow:
        slow.hold.clear()
        register(any_rig, slow.url, events=["*"])
        register(any_rig, receiver.url, events=["job.created"])
        jobs = [any_rig.submit() for _ in range(8)]
        assert any_rig.sender.round() == 2 * MAX_CONCURRENT
        slow.wait(MAX_CONCURRENT)
        receiver.wait(MAX_CONCURRENT)
        pool = any_rig.database.engine.pool
        assert isinstance(pool, QueuePool)
        until(lambda: pool.checkedout() == 0, what="no transaction is open while something is sent")
        any_rig.reconcile()
        for job_id in jobs:
            any_rig.post_action(job_id, "cancel")
        deadline = time.monotonic() + DEADLINE
        while len(receiver.got) < len(jobs):
            assert time.monotonic() < deadline
            any_rig.sender.round()
            time.sleep(0.01)
        assert len(slow.got) == MAX_CONCURRENT
        slow.hold.set()
        assert any_rig.sender.deliver_until_idle(DEADLINE)


def test_four_slow_receivers_do_not_delay_a_quick_one(any_rig: ServiceHarness, receiver: Receiver) -> None:
    """In 0.1 they took all places, and the quick one got nothing until they had answered."""
    wait_for_slow_receivers(any_rig)
    with contextlib.ExitStack() as stack:
        slow = [stack.enter_context(receiving()) for _ in range(4)]
        for one in slow:
            one.hold.clear()
            register(any_rig, one.url, events=["*"])
        jobs = [any_rig.submit() for _ in range(4)]
        any_rig.sender.round()
        for one in slow:
            one.wait(MAX_CONCURRENT)
        register(any_rig, receiver.url, events=["*"])
        for job_id in jobs:
            any_rig.post_action(job_id, "cancel")
        deadline = time.monotonic() + DEADLINE
        while len(receiver.got) < len(jobs):
            assert time.monotonic() < deadline
            any_rig.sender.round()
            time.sleep(0.01)
        assert [len(one.got) for one in slow] == [MAX_CONCURRENT] * 4
        for one in slow:
            one.hold.set()
        assert any_rig.sender.deliver_until_idle(DEADLINE)


def test_a_webhook_that_is_deleted_while_it_is_sent(any_rig: ServiceHarness, receiver: Receiver) -> None:
    webhook = register(any_rig, receiver.url, events=["*"])
    receiver.hold.clear()
    job_id = any_rig.submit()
    assert any_rig.sender.round() == 1
    receiver.wait(1)
    assert any_rig.client.delete(f"/webhooks/{webhook['id']}").status_code == 204
    receiver.hold.set()
    assert any_rig.sender.deliver_until_idle(DEADLINE)
    any_rig.post_action(job_id, "cancel")
    send(any_rig)
    assert len(receiver.got) == 1


class Ticks:
    """A monotonic clock that the test moves."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_what_a_killed_server_was_sending_is_sent_again(any_rig: ServiceHarness, receiver: Receiver) -> None:
    """Killed between the receiver's yes and writing it down: claimed, and nobody knows what came of it."""
    webhook = register(any_rig, receiver.url, events=["job.created"])
    any_rig.submit()
    with any_rig.database.write() as session:
        row = session.scalars(select(DeliveryRow)).one()
        row.claimed_by, row.attempts = "a server that was killed", 1
    ticks = Ticks()
    ours = Sender(
        any_rig.database, WebhookClient(any_rig.settings.webhook_networks), clock=any_rig.clock, monotonic=ticks
    )
    assert ours.round() == 0, "it may still be sending"
    ticks.now += SEND_SECONDS + GRACE_SECONDS + 1
    assert ours.round() == 1
    assert ours.deliver_until_idle(DEADLINE)
    [done] = deliveries(any_rig, webhook)
    assert (done["state"], done["attempts"]) == ("delivered", 2)
    assert len(receiver.got) == 1


def test_of_several_servers_the_leader_sends_and_each_thing_once(any_rig: ServiceHarness, receiver: Receiver) -> None:
    """Three senders at once on one database; each in turn is the leader."""
    ticks = Ticks()
    leases = [LeaderLease(any_rig.database, ticks) for _ in range(3)]
    client = WebhookClient(any_rig.settings.webhook_networks)
    senders = [Sender(any_rig.database, client, lease, any_rig.clock, ticks) for lease in leases]
    register(any_rig, receiver.url, events=["job.created"])
    for leader in (0, 1, 2):
        assert leases[leader].renew()
        for _ in range(5):
            any_rig.submit()
        begun = [0, 0, 0]
        for _ in range(10):
            for index, sender in enumerate(senders):
                begun[index] += sender.round()
                assert sender.deliver_until_idle(DEADLINE)
        assert [count > 0 for count in begun] == [index == leader for index in range(3)]
        leases[leader].release()
    ids = [got.id for got in receiver.got]
    assert len(ids) == len(set(ids)) == 15


def test_a_leader_that_slept_sends_nothing_when_it_wakes(any_rig: ServiceHarness, receiver: Receiver) -> None:
    ticks = Ticks()
    lease = LeaderLease(any_rig.database, ticks)
    sender = Sender(any_rig.database, WebhookClient(any_rig.settings.webhook_networks), lease, any_rig.clock, ticks)
    webhook = register(any_rig, receiver.url, events=["job.created"])
    assert lease.renew()
    any_rig.submit()

    def sleep() -> None:
        ticks.now += LEASE_SECONDS + 1  # stopped right after the claim, and woken past its lease

    with armed("webhooks.claimed", sleep):
        assert sender.round() == 1
        assert sender.deliver_until_idle(DEADLINE)
    assert receiver.got == []
    other = LeaderLease(any_rig.database, ticks)
    lease.release()
    assert other.renew()
    heir = Sender(any_rig.database, WebhookClient(any_rig.settings.webhook_networks), other, any_rig.clock, ticks)
    assert heir.round() == 0
    ticks.now += SEND_SECONDS + GRACE_SECONDS + 1
    assert other.renew()
    assert heir.round() == 1
    assert heir.deliver_until_idle(DEADLINE)
    assert deliveries(any_rig, webhook)[0]["state"] == "delivered"


def test_a_server_that_is_restarted_goes_on(make_rig: MakeHarness, any_url: str, receiver: Receiver) -> None:
    """With the threads that a real server has."""
    rig = make_rig(any_url, scheduling=True)
    register(rig, receiver.url, events=["job.created", "job.cancelled"], labels={"of": "interest"})
    receiver.answer = status(500)
    # The clock stands: what failed is not tried again before the restart.
    with rig.clock.standing(rig.clock() + timedelta(minutes=5)):
        rig.submit(resources={"nproc_per_node": 2})
        job_id = rig.submit(resources={"nproc_per_node": 2}, labels={"of": "interest"})
        receiver.wait(1)
        rig.post_action(job_id, "cancel")
        rig.close()
    assert len(receiver.got) == 1
    receiver.answer = status(204)
    again = make_rig(any_url, scheduling=True, clock=rig.clock)
    rig.clock.forward(600)
    got = receiver.wait(3)
    assert [one.type for one in got][:3] == ["job.created", "job.created", "job.cancelled"]
    again.close()


def test_what_ended_long_ago_is_forgotten(any_rig: ServiceHarness, receiver: Receiver) -> None:
    webhook = register(any_rig, receiver.url, events=["job.created"])
    job_id = any_rig.submit()
    of_one = register(any_rig, receiver.url, events=["job.cancelled"], job_id=job_id)
    send(any_rig)
    any_rig.post_action(job_id, "cancel")
    assert any_rig.client.delete(f"/jobs/{job_id}").status_code == 204
    any_rig.sender._swept_at = float("-inf")
    send(any_rig)
    any_rig.get(f"/webhooks/{of_one['id']}")
    assert [got.type for got in receiver.got] == ["job.created", "job.cancelled"], "it is told although the job is gone"
    any_rig.sender._swept_at = float("-inf")
    send(any_rig)
    any_rig.get(f"/webhooks/{of_one['id']}", expect=404)
    assert len(deliveries(any_rig, webhook)) == 1
    any_rig.clock.forward(31 * 86400)
    any_rig.sender._swept_at = float("-inf")
    send(any_rig)
    assert deliveries(any_rig, webhook) == []


def test_ten_threads_change_jobs_and_nothing_is_lost_or_out_of_order(
    any_rig: ServiceHarness, receiver: Receiver
) -> None:
    register(any_rig, receiver.url, events=["*"])
    stop = threading.Event()

    def keep_sending() -> None:
        while not stop.is_set():
            any_rig.sender.round()
            stop.wait(0.005)

    sending = threading.Thread(target=keep_sending)
    sending.start()

    def live(_: int) -> None:
        for _ in range(2):
            job_id = any_rig.submit(resources={"nproc_per_node": 2})
            for verb in ("pause", "resume", "cancel"):
                any_rig.post_action(job_id, verb)

    threads = [threading.Thread(target=live, args=(n,)) for n in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    receiver.wait(5 * 2 * 4)
    stop.set()
    sending.join()
    assert any_rig.sender.deliver_until_idle(DEADLINE)
    by_job: dict[str, list[str]] = {}
    for got in receiver.got:
        by_job.setdefault(got.payload["data"]["job"]["id"], []).append(got.type)
    assert len(by_job) == 10
    for types in by_job.values():
        assert types == ["job.created", "job.paused", "job.queued", "job.cancelled"]
