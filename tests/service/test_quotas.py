"""Quotas of named tokens: checked in the transaction that queues the job, so that two requests never share a place."""

from typing import Any

import pytest

from tests.service.conftest import MakeHarness
from tests.service.harness import ServiceHarness, in_threads
from tests.service.test_auth import bearer, created, listed
from tests.service.test_checkpoints import saved
from trainyard.contract.status import Reason
from trainyard.service.devices.inventory import cpu_slots


def submitted(rig: ServiceHarness, token: str, **groups: Any) -> str:
    answer = rig.client.post("/jobs", json=rig.spec(**groups), headers=bearer(token))
    assert answer.status_code == 201, answer.text
    job_id: str = answer.json()["id"]
    return job_id


def refused(answer: Any) -> dict[str, Any]:
    assert (answer.status_code, answer.json()["code"]) == (429, "quota_exceeded"), answer.text
    found: dict[str, Any] = answer.json()
    return found


def test_jobs_are_counted_while_they_wait_or_run(any_rig: ServiceHarness) -> None:
    token = created(any_rig, "ci", scope="submit", max_jobs=2)
    first = submitted(any_rig, token)
    any_rig.reconcile()
    second = submitted(any_rig, token)
    body = refused(any_rig.client.post("/jobs", json=any_rig.spec(), headers=bearer(token)))
    assert body["detail"] == (
        "The token ci may have 2 jobs, has 2 jobs queued or running, and this one needs 1. Wait for one "
        f"({first}, {second}) to end, pause or cancel one, or ask an admin to raise the quota."
    )
    assert body["quota"] == {"jobs": {"limit": 2, "used": 2}, "devices": {"limit": None, "used": 2}}
    assert (listed(any_rig)["ci"]["jobs"], listed(any_rig)["ci"]["devices"]) == (2, 2)
    any_rig.submit()  # others have none of it
    any_rig.post_action(second, "cancel")
    third = submitted(any_rig, token)
    any_rig.client.patch("/tokens/ci", json={"max_jobs": 3})
    submitted(any_rig, token)
    any_rig.client.patch("/tokens/ci", json={"max_jobs": None})
    submitted(any_rig, token)
    assert any_rig.job(third)["status"] == "queued"


def test_devices_are_counted_together(make_rig: MakeHarness, any_url: str) -> None:
    rig = make_rig(any_url, devices=cpu_slots(8))
    token = created(rig, "ci", scope="submit", max_devices=5)
    submitted(rig, token, resources={"nproc_per_node": 4})
    two = rig.spec(resources={"nproc_per_node": 2})
    body = refused(rig.client.post("/jobs", json=two, headers=bearer(token)))
    assert "may have 5 devices, has 4 devices queued or running, and this one needs 2" in body["detail"]
    submitted(rig, token)
    rig.client.patch("/tokens/ci", json={"max_devices": 0})
    created(rig, "small", scope="submit", max_devices=1)
    alone = rig.client.post("/tokens/small/rotate").json()["token"]
    assert "Ask for fewer devices" in refused(rig.client.post("/jobs", json=two, headers=bearer(alone)))["detail"]


def test_a_resume_takes_a_place_of_who_asks(any_rig: ServiceHarness) -> None:
    alice = created(any_rig, "alice", scope="submit", max_jobs=1)
    bob = created(any_rig, "bob", scope="operate", max_jobs=1)
    job_id = submitted(any_rig, alice)
    any_rig.post_action(job_id, "pause")
    other = submitted(any_rig, alice)
    refused(any_rig.client.post(f"/jobs/{job_id}/resume", headers=bearer(alice)))
    assert any_rig.job(job_id)["status"] == "paused", "nothing was changed"
    assert any_rig.client.post(f"/jobs/{job_id}/resume", headers=bearer(bob)).status_code == 202
    assert {name: found["jobs"] for name, found in listed(any_rig).items()} == {"alice": 1, "bob": 1}
    refused(any_rig.client.post("/jobs", json=any_rig.spec(), headers=bearer(bob)))
    assert any_rig.job(other)["submitted_by"] == "alice"


def test_a_job_that_will_start_again_keeps_its_place(any_rig: ServiceHarness) -> None:
    token = created(any_rig, "ci", scope="submit", max_jobs=1)
    job_id = submitted(any_rig, token)
    any_rig.reconcile()
    attempt = any_rig.launcher.of(job_id)
    attempt.started(steps=10)
    any_rig.exit(attempt, "crashed", Reason.WORKER_CRASHED, step=0)
    assert any_rig.job(job_id)["restart_at"] is not None
    refused(any_rig.client.post("/jobs", json=any_rig.spec(), headers=bearer(token)))
    # Its own resume is no second job.
    assert any_rig.client.post(f"/jobs/{job_id}/resume", headers=bearer(token)).status_code == 202


def test_a_fork_takes_a_place_and_a_refused_one_leaves_nothing(any_rig: ServiceHarness) -> None:
    token = created(any_rig, "ci", scope="submit", max_jobs=1)
    job_id, _ = saved(any_rig, 400, training={"max_steps": 1000})
    submitted(any_rig, token)
    there = sorted((any_rig.home / "runs").iterdir())
    refused(any_rig.client.post(f"/jobs/{job_id}/fork", json={}, headers=bearer(token)))
    assert sorted((any_rig.home / "runs").iterdir()) == there


def test_a_replay_takes_no_place(any_rig: ServiceHarness) -> None:
    token = created(any_rig, "ci", scope="submit", max_jobs=1)
    headers = {**bearer(token), "Idempotency-Key": "one"}
    answers = [any_rig.client.post("/jobs", json=any_rig.spec(), headers=headers) for _ in range(3)]
    assert [answer.status_code for answer in answers] == [201, 200, 200]


@pytest.mark.parametrize("key", [None, "the-same"])
def test_many_at_once_get_as_many_places_as_there_are(any_rig: ServiceHarness, key: str | None) -> None:
    """With one key all get the one job, although another would be too much."""
    token = created(any_rig, "ci", scope="submit", max_jobs=3 if key is None else 1)
    headers = {**bearer(token), **({"Idempotency-Key": key} if key else {})}

    def submit(_: int) -> int:
        status: int = any_rig.client.post("/jobs", json=any_rig.spec(), headers=headers).status_code
        return status

    codes = in_threads(12, submit)
    assert sorted(codes) == ([201] * 3 + [429] * 9 if key is None else [200] * 11 + [201]), codes
    assert listed(any_rig)["ci"]["jobs"] == (3 if key is None else 1)
