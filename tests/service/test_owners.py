"""Owners: a token of scope `submit` changes its own jobs, forks any job, and reads everything."""

from fastapi.routing import APIRoute

from tests.service.conftest import MakeHarness
from tests.service.harness import ServiceHarness
from tests.service.test_auth import bearer, created
from tests.service.test_checkpoints import saved
from trainyard.service.api.ownership import require_own_job
from trainyard.service.app import ROUTES

MAY_BE_OF_OTHERS = {
    "/jobs/{job_id}/fork",
    "/jobs/{job_id}/fork/plan",
    "/jobs/{job_id}/checkpoints/{step}/generate",
    "/jobs/{job_id}/checkpoints/{step}/evaluate",
}
"""Routes below a job that do not change it."""


def test_every_route_that_changes_a_job_checks_its_owner() -> None:
    routes = [route for route in ROUTES if isinstance(route, APIRoute)]
    changing = [
        route
        for route in routes
        if route.path.startswith("/jobs/{job_id}")
        and "GET" not in (route.methods or ())
        and "HEAD" not in (route.methods or ())
    ]
    assert len(changing) > 8
    unchecked = {
        route.path
        for route in changing
        if require_own_job not in {dependency.dependency for dependency in route.dependencies}
    }
    assert unchecked == MAY_BE_OF_OTHERS


def test_a_job_of_another_owner_is_not_changed(any_rig: ServiceHarness) -> None:
    alice, bob = (created(any_rig, name, scope="submit") for name in ("alice", "bob"))
    operator = created(any_rig, "operator", scope="operate")
    job = any_rig.client.post("/jobs", json=any_rig.spec(), headers=bearer(alice)).json()
    assert job["owner"] == "alice"
    path = f"/jobs/{job['id']}"
    requests = [
        ("PATCH", "", {"name": "mine"}),
        ("DELETE", "", None),
        *(("POST", f"/{action}", None) for action in ("pause", "resume", "save", "cancel", "kill")),
        ("DELETE", "/checkpoints/1", None),
        ("POST", "/checkpoints/1/export", {"format": "minimind"}),
    ]
    for method, below, body in requests:
        answer = any_rig.client.request(method, path + below, json=body, headers=bearer(bob))
        assert (answer.status_code, answer.json()["code"]) == (403, "forbidden"), (method, below)
        assert answer.json()["detail"] == (
            "The job belongs to alice. The token bob has the scope submit, which changes only its own jobs. "
            "Use a token with the scope operate, or fork the job: a fork is bob's."
        )
    assert any_rig.client.get(path, headers=bearer(bob)).json() == job, "reading is for all, and nothing was changed"
    assert any_rig.client.patch(path, json={"name": "theirs"}, headers=bearer(operator)).status_code == 200
    assert any_rig.client.post(f"{path}/pause", headers=bearer(alice)).status_code == 202
    missing = any_rig.client.post("/jobs/job_aaaaaaaaaa/pause", headers=bearer(bob))
    assert missing.status_code == 404


def test_a_fork_belongs_to_the_token_that_forked(any_rig: ServiceHarness) -> None:
    bob = created(any_rig, "bob", scope="submit", max_jobs=1)
    job_id, _ = saved(any_rig, 400, training={"max_steps": 1000})
    fork = any_rig.client.post(f"/jobs/{job_id}/fork", json={}, headers=bearer(bob))
    assert fork.status_code == 201, fork.text
    assert (fork.json()["owner"], any_rig.job(job_id)["owner"]) == ("bob", "local")
    assert any_rig.client.post(f"/jobs/{job_id}/fork", json={}, headers=bearer(bob)).status_code == 429, (
        "it counts for bob"
    )
    assert any_rig.client.post(f"/jobs/{fork.json()['id']}/cancel", headers=bearer(bob)).status_code == 202


def test_jobs_are_listed_by_owner(any_rig: ServiceHarness) -> None:
    alice = created(any_rig, "alice", scope="submit")
    hers = any_rig.client.post("/jobs", json=any_rig.spec(), headers=bearer(alice)).json()["id"]
    local = any_rig.submit()
    assert [job["id"] for job in any_rig.get("/jobs", owner="alice")["data"]] == [hers]
    assert [job["id"] for job in any_rig.get("/jobs", owner="local")["data"]] == [local]
    assert any_rig.get("/jobs", owner="bob")["data"] == []


def test_webhooks_need_operate(make_rig: MakeHarness, any_url: str) -> None:
    rig = make_rig(any_url)
    token = created(rig, "ci", scope="submit")
    answer = rig.client.get("/webhooks", headers=bearer(token))
    assert answer.json()["detail"] == "This needs the scope operate; the token ci has submit."


def test_an_admin_gives_a_job_to_another_owner(any_rig: ServiceHarness) -> None:
    alice, bob = (created(any_rig, name, scope="submit") for name in ("alice", "bob"))
    operator, admin = (created(any_rig, f"with-{scope}", scope=scope) for scope in ("operate", "admin"))
    created(any_rig, "gone", scope="submit")
    any_rig.client.delete("/tokens/gone")
    job = any_rig.client.post("/jobs", json=any_rig.spec(), headers=bearer(alice)).json()
    path = f"/jobs/{job['id']}"
    for token in (alice, operator):
        answer = any_rig.client.patch(path, json={"owner": "bob", "name": "x"}, headers=bearer(token))
        assert (answer.status_code, answer.json()["code"]) == (403, "forbidden")
        assert answer.json()["detail"] == "Only a token of the scope admin changes the owner of a job."
    for name in ("nobody", "gone", "", "carol"):
        answer = any_rig.client.patch(path, json={"owner": name}, headers=bearer(admin))
        assert answer.status_code == 422
        assert answer.json()["errors"] == [
            {"pointer": "/owner", "message": "no token that is not revoked has this name"}
        ]
    assert any_rig.client.patch(path, json={"owner": None}, headers=bearer(admin)).status_code == 422
    assert any_rig.job(job["id"])["name"] == job["name"]
    given = any_rig.client.patch(path, json={"owner": "bob"}, headers=bearer(admin))
    assert (given.status_code, given.json()["owner"]) == (200, "bob")
    assert any_rig.client.post(f"{path}/pause", headers=bearer(alice)).status_code == 403
    assert any_rig.client.post(f"{path}/pause", headers=bearer(bob)).status_code == 202
    events = any_rig.data(job["id"], "events")
    assert events[0]["actor"] == "alice", "who submitted it is kept"
    [changed] = [event for event in events if event["kind"] == "changed"]
    assert (changed["actor"], changed["message"]) == ("with-admin", "changed owner; the owner was alice and is bob")
    assert [one["id"] for one in any_rig.get("/jobs", owner="bob")["data"]] == [job["id"]]
    assert any_rig.get("/jobs", owner="alice")["data"] == []
    assert any_rig.client.patch(path, json={"owner": "local"}).json()["owner"] == "local"
