"""Webhooks by the API: created, changed, tested, and received by a real server."""

from typing import Any

import pytest

from tests.service.harness import ServiceHarness
from tests.service.receiver import DEADLINE, Receiver, receiving, status, verified
from trainyard.contract.status import Reason


@pytest.fixture
def receiver() -> Any:
    with receiving() as made:
        yield made


def register(rig: ServiceHarness, url: str, expect: int = 201, **fields: Any) -> dict[str, Any]:
    answer = rig.client.post("/webhooks", json={"url": url, **fields})
    assert answer.status_code == expect, answer.text[:500]
    found: dict[str, Any] = answer.json()
    return found


def send(rig: ServiceHarness) -> None:
    """Run rounds until nothing is due. The clock stands meanwhile, so what failed is not due again."""
    with rig.clock.standing():
        while rig.sender.round():
            assert rig.sender.deliver_until_idle(DEADLINE)


def deliveries(rig: ServiceHarness, webhook: dict[str, Any], **params: Any) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = rig.get(f"/webhooks/{webhook['id']}/deliveries", **params)["data"]
    return found


def test_a_job_is_told_from_birth_to_death_in_order_and_signed(any_rig: ServiceHarness, receiver: Receiver) -> None:
    webhook = register(any_rig, receiver.url)
    job_id, attempt = any_rig.running()
    attempt.metric(1)
    any_rig.exit(attempt, "crashed", Reason.DATA_INVALID, step=1, message="line 7 is no JSON")
    send(any_rig)
    types = [got.type for got in receiver.got]
    assert types == ["job.starting", "job.running", "job.failed"]
    assert all(verified(webhook["secret"], got) for got in receiver.got)
    assert not verified(webhook["secret"], type(receiver.got[0])("/", receiver.got[0].headers, b"{}"))
    last = receiver.got[-1].payload
    job, event = any_rig.job(job_id), any_rig.data(job_id, "events")[-1]
    assert last["data"]["event"] in any_rig.data(job_id, "events")
    assert last["id"] == f"evt_{event['id']}_{job_id.removeprefix('job_')}" == receiver.got[-1].id
    assert last["data"]["webhook_id"] == webhook["id"]
    told = last["data"]["job"]
    assert told["error"] == job["error"]
    assert told["error"] is not None, "the failure card is the API's"
    assert {name: job[name] for name in told} == told, (job, event)


def test_ids_of_events_are_not_reused_after_a_job_was_deleted(any_rig: ServiceHarness, receiver: Receiver) -> None:
    """Receivers ignore an id that they know, and SQLite reuses the numbers of deleted rows."""
    register(any_rig, receiver.url, events=["*"])
    for _ in range(3):
        job_id = any_rig.submit()
        any_rig.post_action(job_id, "cancel")
        assert any_rig.client.delete(f"/jobs/{job_id}").status_code == 204
    send(any_rig)
    ids = [got.id for got in receiver.got]
    assert len(ids) == 6
    assert len(set(ids)) == 6, ids


def test_the_log_of_deliveries(any_rig: ServiceHarness, receiver: Receiver) -> None:
    webhook = register(any_rig, receiver.url, events=["job.created"])
    any_rig.submit()
    [waits] = deliveries(any_rig, webhook)
    assert (waits["state"], waits["attempts"], waits["tries"], waits["type"]) == ("pending", 0, [], "job.created")
    receiver.answer = status(200, "thanks\x00\u2028")
    send(any_rig)
    [done] = deliveries(any_rig, webhook, state="delivered")
    assert done["id"] == waits["id"]
    assert done["next_attempt_at"] is None
    [tried] = done["tries"]
    assert tried["status"] == 200
    assert tried["response"] == "thanks  "
    assert tried["error"] is None
    assert 0 < tried["seconds"] < DEADLINE
    one = any_rig.get(f"/webhooks/{webhook['id']}/deliveries/{done['id']}")
    assert one["payload"] == receiver.got[0].payload
    assert deliveries(any_rig, webhook, state="pending") == []
    assert any_rig.get(f"/webhooks/{webhook['id']}")["succeeded_at"] is not None
    missing = any_rig.get(f"/webhooks/{webhook['id']}/deliveries/999999", expect=404)
    assert missing["code"] == "delivery_not_found"


def test_who_hears_what(any_rig: ServiceHarness, receiver: Receiver) -> None:
    other = any_rig.submit(name="other")
    all_of_it = register(any_rig, receiver.url, events=["*"])
    labelled = register(any_rig, receiver.url, events=["job.created"], labels={"team": "a", "kind": "x"})
    of_one = register(any_rig, receiver.url, events=["job.cancelled"], job_id=other)
    off = register(any_rig, receiver.url, events=["*"], enabled=False)
    any_rig.submit(labels={"team": "a"})
    any_rig.submit(labels={"team": "a", "kind": "x", "more": "y"})
    mine = any_rig.submit(labels={"team": "b", "kind": "x"})
    for job_id in (other, mine):
        any_rig.post_action(job_id, "cancel")
    assert len(deliveries(any_rig, all_of_it)) == 5
    assert len(deliveries(any_rig, labelled)) == 1
    assert [d["job_id"] for d in deliveries(any_rig, of_one)] == [other]
    assert deliveries(any_rig, off) == []
    assert receiver.got == []


def test_a_secret_is_shown_once_and_can_be_rotated(any_rig: ServiceHarness, receiver: Receiver) -> None:
    webhook = register(any_rig, receiver.url, events=["job.created"])
    first = webhook["secret"]
    assert first.startswith("whsec_")
    path = f"/webhooks/{webhook['id']}"
    second = any_rig.client.post(f"{path}/rotate").json()["secret"]
    assert second != first
    receiver.answer = status(200, f"you signed with {second} and {first}")
    any_rig.submit()
    send(any_rig)
    assert verified(first, receiver.got[0])
    assert verified(second, receiver.got[0])
    shown = [path, "/webhooks", f"{path}/deliveries", f"{path}/deliveries/{deliveries(any_rig, webhook)[0]['id']}"]
    for answer in [any_rig.client.get(place).text for place in shown]:
        assert first not in answer
        assert second not in answer
    patched = any_rig.client.patch(path, json={"description": "d"})
    assert "secret" not in patched.json()
    any_rig.clock.forward(25 * 3600)
    any_rig.submit()
    send(any_rig)
    assert not verified(first, receiver.got[-1])
    assert verified(second, receiver.got[-1])


def test_list_patch_and_delete(any_rig: ServiceHarness, receiver: Receiver) -> None:
    made = [register(any_rig, receiver.url, description=str(n)) for n in range(3)]
    page = any_rig.get("/webhooks", limit=2)
    assert [w["description"] for w in page["data"]] == ["2", "1"]
    assert page["has_more"]
    assert [w["id"] for w in any_rig.get("/webhooks", after=made[1]["id"])["data"]] == [made[0]["id"]]
    path = f"/webhooks/{made[0]['id']}"
    changed = any_rig.client.patch(path, json={"events": ["job.failed"], "labels": {"a": "b"}, "enabled": False}).json()
    assert (changed["events"], changed["labels"], changed["enabled"]) == (["job.failed"], {"a": "b"}, False)
    assert changed["url"] == receiver.url
    assert any_rig.get(path) == changed
    assert any_rig.client.patch(path, json={"job_id": "job_a"}).status_code == 422
    assert any_rig.client.delete(path).status_code == 204
    assert any_rig.client.delete(path).json()["code"] == "webhook_not_found"
    any_rig.get(path, expect=404)


def test_what_waits_goes_with_the_webhook(any_rig: ServiceHarness, receiver: Receiver) -> None:
    webhook = register(any_rig, receiver.url)
    any_rig.post_action(any_rig.submit(), "cancel")
    any_rig.client.delete(f"/webhooks/{webhook['id']}")
    send(any_rig)
    assert receiver.got == []


def test_the_test_verb_tells_at_once_what_came_of_it(any_rig: ServiceHarness, receiver: Receiver) -> None:
    webhook = register(any_rig, receiver.url, enabled=False)
    receiver.answer = status(500, "no")
    asked = any_rig.client.post(f"/webhooks/{webhook['id']}/test")
    assert asked.status_code == 202
    send(any_rig)
    [got] = receiver.got
    assert got.payload["data"] == {"webhook_id": webhook["id"], "event": None, "job": None}
    assert verified(webhook["secret"], got)
    done = any_rig.get(f"/webhooks/{webhook['id']}/deliveries/{asked.json()['id']}")
    assert (done["state"], done["type"], done["tries"][0]["status"]) == ("failed", "webhook.test", 500)
    assert any_rig.get(f"/webhooks/{webhook['id']}")["failures"] == 0, "a try by hand says nothing of the rest"


def test_a_delivery_is_sent_again_under_the_same_id(any_rig: ServiceHarness, receiver: Receiver) -> None:
    webhook = register(any_rig, receiver.url, events=["job.created"])
    any_rig.submit()
    send(any_rig)
    [done] = deliveries(any_rig, webhook)
    again = any_rig.client.post(f"/webhooks/{webhook['id']}/deliveries/{done['id']}/redeliver")
    assert again.status_code == 202
    assert (again.json()["redelivers"], again.json()["event_id"]) == (done["id"], done["event_id"])
    send(any_rig)
    first, second = receiver.got
    assert (first.id, first.body) == (second.id, second.body)
    assert any_rig.client.post(f"/webhooks/{webhook['id']}/deliveries/99999/redeliver").status_code == 404


@pytest.mark.parametrize(
    ("body", "pointer"),
    [
        ({}, "/url"),
        ({"url": "ftp://example.com"}, "/url"),
        ({"url": "https://user:pass@example.com/"}, "/url"),
        ({"url": "https://example.com/#part"}, "/url"),
        ({"url": "https://exa\nmple.com/"}, "/url"),
        ({"url": "https://example.com:99999/"}, "/url"),
        ({"url": "https://" + "a" * 3000}, "/url"),
        ({"url": "https://example.com", "events": ["job.unknown"]}, "/events/0"),
        ({"url": "https://example.com", "labels": {"a": 1}}, "/labels/a"),
        ({"url": "https://example.com", "labels": {"a": "\0"}}, "/labels/a"),
        ({"url": "https://example.com", "labels": {"\ud800": "a"}}, ""),
        ({"url": "https://example.com", "rules": [{"kind": "plateau", "steps": -1}]}, "/rules/0/steps"),
        ({"url": "https://example.com", "rules": [{"kind": "sorcery"}]}, "/rules/0/kind"),
        ({"url": "https://example.com", "rules": [{"kind": "eval_loss_below", "value": True}]}, "/rules/0/value"),
        ({"url": "https://example.com", "secret": "mine"}, "/secret"),
        ({"url": "https://example.com", "job_id": "job_aaaaaaaaaa"}, "/job_id"),
        ({"url": "https://example.com", "enabled": 1}, "/enabled"),
        ([], ""),
    ],
)
def test_mistakes_have_pointers(rig: ServiceHarness, body: object, pointer: str) -> None:
    answer = rig.report_raw("/webhooks", body)
    assert answer.status_code == 422, answer.text
    assert pointer in [found["pointer"] for found in answer.json()["errors"]], answer.text
    assert "sorcery" not in answer.text
    assert rig.get("/webhooks")["data"] == []


@pytest.mark.parametrize("job_id", ["job_\0", "job_" + "a" * 30])
def test_a_job_that_cannot_be_there(any_rig: ServiceHarness, job_id: str) -> None:
    assert register(any_rig, "https://example.com", expect=422, job_id=job_id)["code"] == "invalid_request"
    for webhook_id in ("%00", "wh_%F0%9F%90%8D", "wh_x"):
        assert any_rig.client.get(f"/webhooks/{webhook_id}").status_code == 404


def test_there_is_an_end_to_how_many(rig: ServiceHarness, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainyard.service.webhooks.store.MAX_WEBHOOKS", 2)
    register(rig, "https://example.com")
    register(rig, "https://example.com")
    assert register(rig, "https://example.com", expect=409)["code"] == "too_many_webhooks"
