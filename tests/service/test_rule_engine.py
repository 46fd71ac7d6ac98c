"""Alert rules on jobs' metrics in the database: each alert once, also after restarts and changes of the leader."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.fakes.launcher import FakeAttempt
from tests.service.harness import ServiceHarness
from tests.service.receiver import DEADLINE, Got, Receiver, receiving
from tests.service.test_webhooks import deliveries, register, send
from trainyard.contract.status import Reason
from trainyard.service.webhooks.http_client import WebhookClient
from trainyard.service.webhooks.rule_engine import (
    MAX_GAP_SECONDS,
    POLL_SECONDS,
    RECENT,
    SAVE_SECONDS,
    RuleEngine,
)
from trainyard.service.webhooks.sender import Sender

GUIDE = Path(__file__).parents[2] / "docs" / "guides" / "webhooks.md"
NONFINITE = {"kind": "nonfinite"}


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with receiving() as made:
        yield made


class Ticks:
    """A monotonic clock that goes when it is told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Watched:
    """A rig whose sender has a clock that the test moves, and whose next lives go on where it stopped."""

    def __init__(self, rig: ServiceHarness) -> None:
        self.rig = rig
        self.ticks = Ticks()
        self.again()

    def again(self) -> None:
        """As after a restart: what was in memory is gone."""
        client = WebhookClient(self.rig.settings.webhook_networks)
        self.sender = Sender(self.rig.database, client, clock=self.rig.clock, monotonic=self.ticks)

    def look(self, seconds: float = POLL_SECONDS + 1) -> None:
        """Time passes, and it looks and sends."""
        self.rig.clock.forward(seconds)
        self.ticks.now += seconds
        while self.sender.round():
            assert self.sender.deliver_until_idle(DEADLINE)


@pytest.fixture
def watched(any_rig: ServiceHarness) -> Watched:
    return Watched(any_rig)


def told(receiver: Receiver) -> list[tuple[str, int]]:
    rules = [got.payload for got in receiver.got if got.type.startswith("rule.")]
    return [(payload["type"], payload["data"]["event"]["data"]["step"]) for payload in rules]


def points(rig: ServiceHarness, attempt: FakeAttempt, first: int, *losses: float, **fields: Any) -> None:
    for number, loss in enumerate(losses):
        attempt.metric(first + number, loss=loss, **fields)
    rig.ship(attempt)


def test_a_loss_that_is_not_finite_is_told_once_and_stands_among_the_events(
    watched: Watched, receiver: Receiver
) -> None:
    rig, nan = watched.rig, float("nan")
    webhook = register(rig, receiver.url, events=[], rules=[NONFINITE])
    register(rig, receiver.url, events=[], labels={"no": "job"}, rules=[NONFINITE])
    job_id, attempt = rig.running()
    points(rig, attempt, 1, 3.0, nan, nan)
    watched.look()
    watched.look()
    points(rig, attempt, 4, nan)
    watched.look()
    assert told(receiver) == [("rule.nonfinite", 2)]
    points(rig, attempt, 5, 3.0, nan)
    watched.look()
    assert told(receiver) == [("rule.nonfinite", 2), ("rule.nonfinite", 6)]
    events = [event for event in rig.data(job_id, "events") if event["kind"] == "rule"]
    assert [event["message"] for event in events] == [f"the loss is not finite at step {step}" for step in (2, 6)]
    assert events[0]["data"]["webhook_id"] == webhook["id"]
    assert receiver.got[0].payload["data"]["event"] == events[0]


@pytest.mark.parametrize("kept", [True, False])
def test_a_restart_neither_repeats_nor_misses(watched: Watched, receiver: Receiver, kept: bool) -> None:
    """Whether what was read had been written down since, or is read once more."""
    rig, nan = watched.rig, float("nan")
    register(rig, receiver.url, events=[], rules=[NONFINITE, {"kind": "eval_loss_below", "value": 2.5}])
    _, attempt = rig.running()
    points(rig, attempt, 1, 3.0, nan, 3.0)
    watched.look()
    points(rig, attempt, 4, 3.0, 3.0, eval_loss=2.4)
    watched.look(SAVE_SECONDS + POLL_SECONDS if kept else POLL_SECONDS + 1)
    watched.again()
    points(rig, attempt, 6, 3.0, eval_loss=2.3)
    watched.look()
    points(rig, attempt, 7, nan)
    watched.look()
    assert sorted(told(receiver)) == [("rule.eval_loss_below", 4), ("rule.nonfinite", 2), ("rule.nonfinite", 7)]


def test_a_job_that_comes_and_goes_between_two_looks(watched: Watched, receiver: Receiver) -> None:
    rig = watched.rig
    register(rig, receiver.url, events=[], rules=[NONFINITE])
    watched.look()
    job_id, attempt = rig.running()
    points(rig, attempt, 1, 3.0, float("nan"))
    rig.exit(attempt, "failed", Reason.DIVERGED, step=2)
    watched.look()
    watched.look(RECENT.total_seconds() + 60)
    watched.look()
    assert told(receiver) == [("rule.nonfinite", 2)]
    assert rig.status(job_id) == "failed"


def test_a_job_that_goes_on_later_is_watched_again(watched: Watched, receiver: Receiver) -> None:
    rig = watched.rig
    register(rig, receiver.url, events=[], rules=[{"kind": "eval_loss_below", "value": 2.5}])
    job_id, attempt = rig.running()
    points(rig, attempt, 1, 3.0, eval_loss=2.6)
    rig.post_action(job_id, "pause")
    rig.exit(attempt, "stopped", Reason.USER, step=1)
    watched.look()
    watched.look(RECENT.total_seconds() + 60)
    rig.post_action(job_id, "resume")
    attempt = rig.next_attempt(job_id, 2, start_step=1)
    points(rig, attempt, 2, 3.0, eval_loss=2.4)
    watched.look()
    assert told(receiver) == [("rule.eval_loss_below", 2)]


def test_what_was_there_before_the_rule_is_not_told(watched: Watched, receiver: Receiver) -> None:
    rig, nan = watched.rig, float("nan")
    _, attempt = rig.running()
    points(rig, attempt, 1, 3.0, nan)
    webhook = register(rig, receiver.url, events=[])
    watched.look()
    rig.client.patch(f"/webhooks/{webhook['id']}", json={"rules": [NONFINITE]})
    watched.look()
    watched.again()
    points(rig, attempt, 3, 3.0, nan)
    watched.look()
    assert told(receiver) == [("rule.nonfinite", 4)]


def test_no_progress(watched: Watched, receiver: Receiver) -> None:
    rig = watched.rig
    register(rig, receiver.url, events=[], rules=[{"kind": "no_progress", "minutes": 10}])
    job_id, attempt = rig.running()
    attempt.metric(1, at=rig.clock().isoformat())
    rig.ship(attempt)
    for _ in range(11):
        watched.look(50)
        rig.heartbeat(attempt, 1)
    assert told(receiver) == [], "nine minutes and ten seconds"
    for _ in range(3):
        watched.look(50)
        rig.heartbeat(attempt, 1)
    assert told(receiver) == [("rule.no_progress", 1)], "a heartbeat is no progress"
    attempt.metric(2, at=rig.clock().isoformat())
    rig.ship(attempt)
    for _ in range(14):
        watched.look(50)
    assert told(receiver) == [("rule.no_progress", 1), ("rule.no_progress", 2)]
    rig.post_action(job_id, "pause")
    for _ in range(14):
        watched.look(50)
    assert len(told(receiver)) == 2, "who was asked to stop need not get on"


def test_a_server_that_slept_an_hour_blames_nobody(watched: Watched, receiver: Receiver) -> None:
    """Agents could not report either. It counts from its waking."""
    rig = watched.rig
    register(rig, receiver.url, events=[], rules=[{"kind": "no_progress", "minutes": 10}])
    _, attempt = rig.running()
    points(rig, attempt, 1, 3.0)
    watched.look()
    watched.look(3600)
    assert told(receiver) == []
    assert MAX_GAP_SECONDS < 600
    for _ in range(13):
        watched.look(50)
    assert told(receiver) == [("rule.no_progress", 1)]


def test_two_rules_of_one_kind(watched: Watched, receiver: Receiver) -> None:
    rig = watched.rig
    rules = [{"kind": "eval_loss_below", "value": value} for value in (3.0, 2.0)]
    register(rig, receiver.url, events=[], rules=rules)
    _, attempt = rig.running()
    for step, value in enumerate((3.5, 2.9, 2.5, 1.9), 1):
        points(rig, attempt, step, 3.0, eval_loss=value)
        watched.look()
    assert told(receiver) == [("rule.eval_loss_below", 2), ("rule.eval_loss_below", 4)]


def test_deleting_the_webhook_or_the_job_under_it(watched: Watched, receiver: Receiver) -> None:
    rig = watched.rig
    webhook = register(rig, receiver.url, events=[], rules=[NONFINITE])
    job_id, attempt = rig.running()
    points(rig, attempt, 1, 3.0)
    watched.look()
    rig.exit(attempt, "failed", Reason.DIVERGED, step=2)
    assert rig.client.delete(f"/jobs/{job_id}").status_code == 204
    watched.look()
    _, attempt = rig.running()
    points(rig, attempt, 1, 3.0)
    watched.look()
    assert rig.client.delete(f"/webhooks/{webhook['id']}").status_code == 204
    points(rig, attempt, 2, float("nan"))
    watched.look()
    assert told(receiver) == []


def test_looking_costs_nothing_where_there_are_no_rules(
    any_rig: ServiceHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    register(any_rig, "https://example.com")
    any_rig.running()
    monkeypatch.setattr(RuleEngine, "_evaluate_job", None)
    any_rig.sender._rule_engine.poll()


def test_the_snippet_of_the_guide_verifies_what_is_sent(rig: ServiceHarness, receiver: Receiver) -> None:
    [snippet] = re.findall(r"```python\n(.*?)```", GUIDE.read_text(), re.DOTALL)
    names: dict[str, Any] = {}
    exec(snippet, names)
    webhook = register(rig, receiver.url, events=["job.created"])
    rig.submit()
    send(rig)
    [got] = receiver.got
    names["verify"](webhook["secret"], got.headers, got.body)
    sent = int(got.headers["webhook-timestamp"])
    for wrong in (
        Got(got.path, got.headers, got.body + b" "),
        Got(got.path, {**got.headers, "webhook-id": "evt_0"}, got.body),
        Got(got.path, {**got.headers, "webhook-timestamp": str(sent - 1)}, got.body),
        Got(got.path, {**got.headers, "webhook-timestamp": str(sent - 1000)}, got.body),
    ):
        with pytest.raises(ValueError, match=r"signed|old"):
            names["verify"](webhook["secret"], wrong.headers, wrong.body)
    with pytest.raises(ValueError, match="signed"):
        names["verify"]("whsec_" + "A" * 44, got.headers, got.body)
    assert deliveries(rig, webhook)[0]["state"] == "delivered"
