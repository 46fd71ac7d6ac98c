"""Named tokens: their scopes, their life from creation to revocation, and the actor in events."""

import asyncio
import contextlib
import json
import re
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import pytest
from fastapi import APIRouter
from fastapi.routing import APIRoute
from sqlalchemy import event, select
from sqlalchemy.exc import OperationalError

from tests.fakes.launcher import FakeAttempt
from tests.service.conftest import MakeHarness
from tests.service.harness import ServiceHarness
from tests.service.live_server import Reader, served
from tests.service.needs import ATTEMPT, NEEDS, OPEN
from trainyard.contract.scopes import Scope
from trainyard.service.api import middleware
from trainyard.service.api.responses import ServiceRoute
from trainyard.service.app import ROUTERS, create_app
from trainyard.service.auth import authenticator
from trainyard.service.auth.authenticator import Authenticator
from trainyard.service.auth.permissions import ADMIN, READ, scopes_of
from trainyard.service.auth.principal import RESERVED, Principal
from trainyard.service.clock import utc_now
from trainyard.service.db.models import TokenRow
from trainyard.service.errors import DatabaseUnavailable, Unauthorized

ADMIN_TOKEN = "the-operator's-own"
WHEN = "2026-01-01T00:00:00Z"


@pytest.fixture
def guarded(make_rig: MakeHarness, any_url: str) -> ServiceHarness:
    """A service that wants a token; its client has the operator's."""
    rig = make_rig(any_url, token=ADMIN_TOKEN)
    rig.client.headers["Authorization"] = f"Bearer {ADMIN_TOKEN}"
    return rig


def bearer(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


def created(rig: ServiceHarness, name: str = "ci", **asked: Any) -> str:
    answer = rig.client.post("/tokens", json={"name": name, **asked})
    assert answer.status_code == 201, answer.text
    token: str = answer.json()["token"]
    return token


def listed(rig: ServiceHarness) -> dict[str, dict[str, Any]]:
    return {found["name"]: found for found in rig.get("/tokens")["data"]}


def status(rig: ServiceHarness, token: str, path: str = "/jobs") -> int:
    code: int = rig.client.get(path, headers=bearer(token)).status_code
    return code


# Scopes


def filled(path: str) -> str:
    return re.sub(r"\{\w+\}", "1", path)


def all_routes(routes: Iterable[Any]) -> Iterator[Any]:
    """Newer versions of the framework keep what was included as a router of its own."""
    for route in routes:
        inner = getattr(route, "original_router", None)
        yield from all_routes(inner.routes) if inner is not None else [route]


def test_the_table_has_every_route_and_no_other(rig: ServiceHarness) -> None:
    there = list(all_routes(rig.app.routes))
    ours = [route for route in there if isinstance(route, APIRoute)]
    assert {(method, route.path) for route in ours for method in route.methods or ()} == set(NEEDS)
    assert scopes_of(ours) == NEEDS
    assert [route.path for route in there if not isinstance(route, APIRoute)] == [], "the framework's own pages"


def test_each_route_asks_for_its_scope(make_rig: MakeHarness, sqlite_url: str) -> None:
    rig = make_rig(sqlite_url, token=ADMIN_TOKEN)
    rig.client.headers["Authorization"] = f"Bearer {ADMIN_TOKEN}"
    tokens = {scope: created(rig, f"of-{scope}", scope=scope) for scope in Scope}
    del rig.client.headers["Authorization"]
    for (method, path), need in NEEDS.items():
        if path.endswith("/stream"):
            path = path.replace("{job_id}", "job_aaaa")
        nobody = rig.client.request(method, filled(path))
        assert (nobody.status_code == 401) == (need != OPEN), (method, path)
        for scope, token in tokens.items():
            answer = rig.client.request(method, filled(path), headers=bearer(token))
            if need == ATTEMPT:
                assert answer.status_code == 401, "a user's token reports nothing"
            elif need != OPEN:
                allowed = scope.covers(Scope(need))
                assert (answer.status_code == 403) == (not allowed), (method, path, scope, answer.text)
                said = {} if allowed else answer.json()
                assert allowed or (said["error"] if path.startswith("/v1/") else said)["code"] == "forbidden"
                assert answer.status_code != 401


def forgotten() -> str:
    return "secret"


def test_a_route_without_a_scope_cannot_be_added(guarded: ServiceHarness) -> None:
    router = APIRouter(route_class=ServiceRoute)
    for add in (guarded.app.get, router.get):
        with pytest.raises(RuntimeError, match="must declare one scope"):
            add("/forgotten")(forgotten)
    assert guarded.client.get("/forgotten").status_code == 404


def test_an_app_with_a_route_without_a_scope_cannot_be_built(
    rig: ServiceHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also if its router has the framework's own class of routes."""
    module = SimpleNamespace(router=APIRouter())
    module.router.get("/forgotten")(forgotten)
    monkeypatch.setattr("trainyard.service.app.ROUTERS", (*ROUTERS, module))
    with pytest.raises(RuntimeError, match="must declare one scope"):
        create_app(rig.app.state.app_state)


def test_a_route_with_two_scopes_cannot_be_added() -> None:
    """The reader of the route would have to work out which of them counts."""
    router = APIRouter(route_class=ServiceRoute, dependencies=[READ])
    with pytest.raises(RuntimeError, match="must declare one scope"):
        router.get("/twice", dependencies=[ADMIN])(forgotten)


def test_a_scope_is_checked_before_the_body_is_judged(guarded: ServiceHarness) -> None:
    token = created(guarded, "reader")
    for path in ("/tokens", "/webhooks", "/jobs", f"/jobs/{guarded.submit()}/resume"):
        for content in (b"{", b"[]", b'{"a": 1, "a": 2}'):
            answer = guarded.client.post(path, content=content, headers=bearer(token))
            assert answer.status_code == 403, path


def test_what_a_scope_says(guarded: ServiceHarness) -> None:
    token = created(guarded, "reader")
    answer = guarded.client.post("/jobs", json=guarded.spec(), headers=bearer(token))
    assert answer.status_code == 403
    assert answer.json()["detail"] == "This needs the scope submit; the token reader has read."
    assert [one.covers(other) for one in Scope for other in Scope] == [
        *(1, 0, 0, 0),
        *(1, 1, 0, 0),
        *(1, 1, 1, 0),
        *(1, 1, 1, 1),
    ]


# The life of a token


def test_a_secret_is_shown_once_and_kept_nowhere(guarded: ServiceHarness, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG")
    token = created(guarded, "ci", scope="submit", max_jobs=2, max_devices=4, expires_in=3600)
    assert re.fullmatch(r"ty_[a-z2-7]{12}_[A-Za-z0-9_-]{43}", token)
    shown = listed(guarded)["ci"]
    assert (shown["scope"], shown["max_jobs"], shown["max_devices"]) == ("submit", 2, 4)
    assert (shown["created_by"], shown["jobs"], shown["last_used_at"]) == ("admin", 0, None)
    assert shown["expires_at"] > shown["created_at"]
    assert status(guarded, token) == 200
    secret = token.rpartition("_")[2]
    with guarded.database.read() as session:
        row = session.scalars(select(TokenRow)).one()
        assert not any(secret in str(value) for value in vars(row).values())
        assert len(row.sha256) == 64
    text = json.dumps(guarded.get("/tokens"))
    assert secret not in text
    assert row.sha256 not in text
    assert secret not in caplog.text


def test_a_changed_or_cut_token_is_nobody_s(guarded: ServiceHarness) -> None:
    token = created(guarded)
    other = created(guarded, "other")
    swapped = "_".join([*token.split("_")[:2], other.split("_", 2)[2]])
    for wrong in (token[:-1], token + "a", swapped, token.upper(), "ty_", "ty_aaaaaaaaaaaa_" + "a" * 43, ""):
        assert status(guarded, wrong) == 401, wrong
    assert status(guarded, token) == 200


def test_rotation_with_and_without_an_overlap(guarded: ServiceHarness, monkeypatch: pytest.MonkeyPatch) -> None:
    first = created(guarded)
    assert status(guarded, first) == 200
    answer = guarded.client.post("/tokens/ci/rotate", json={"overlap": 600})
    second = answer.json()["token"]
    assert answer.json()["previous_until"] is not None
    assert [status(guarded, token) for token in (first, second)] == [200, 200]
    ahead = [timedelta(seconds=601)]
    monkeypatch.setattr(authenticator, "utc_now", lambda: utc_now() + ahead[0])
    late = guarded.client.get("/jobs", headers=bearer(first))
    assert (late.status_code, late.json()["detail"]) == (401, "The token was replaced by another one.")
    assert status(guarded, second) == 200
    ahead[0] = timedelta()
    third = guarded.client.post("/tokens/ci/rotate").json()["token"]
    assert [status(guarded, token) for token in (first, second, third)] == [401, 401, 200]
    assert listed(guarded)["ci"]["rotated_at"] is not None


def test_expiry_and_a_longer_life_by_rotation(guarded: ServiceHarness, monkeypatch: pytest.MonkeyPatch) -> None:
    token = created(guarded, expires_in=60)
    end = datetime.fromisoformat(listed(guarded)["ci"]["expires_at"])
    now = [end - timedelta(seconds=1)]
    monkeypatch.setattr(authenticator, "utc_now", lambda: now[0])
    assert status(guarded, token) == 200
    now[0] = end + timedelta(seconds=1)
    late = guarded.client.get("/jobs", headers=bearer(token))
    assert (late.status_code, late.json()["detail"]) == (401, "The token has expired.")
    renewed = guarded.client.post("/tokens/ci/rotate", json={"expires_in": 3600}).json()["token"]
    assert status(guarded, renewed) == 200


def test_revocation_holds_at_once_and_for_good(guarded: ServiceHarness) -> None:
    token = created(guarded, scope="admin")
    assert status(guarded, token) == 200
    for _ in range(2):
        assert guarded.client.delete("/tokens/ci").status_code == 204
    refused = guarded.client.get("/jobs", headers=bearer(token))
    assert (refused.status_code, refused.json()["detail"]) == (401, "The token was revoked.")
    assert listed(guarded)["ci"]["revoked_at"] is not None
    assert guarded.client.post("/tokens/ci/rotate").json()["code"] == "token_revoked"
    again = guarded.client.post("/tokens", json={"name": "ci"})
    assert (again.status_code, again.json()["code"]) == (409, "token_name_taken")


def caller(gate: Authenticator, token: str) -> Principal:
    # On a thread of its own: a test of the browser may have left a loop running on this one.
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(lambda: asyncio.run(gate.authenticate(token))).result()


def test_another_server_hears_of_it_in_its_time(guarded: ServiceHarness, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(authenticator, "CACHE_SECONDS", 3600.0)
    token = created(guarded)
    elsewhere = Authenticator(guarded.settings, guarded.database)
    assert caller(elsewhere, token).name == "ci"
    guarded.client.delete("/tokens/ci")
    assert caller(elsewhere, token).name == "ci", "it looked a moment ago"
    monkeypatch.setattr(authenticator, "CACHE_SECONDS", 0.0)
    with pytest.raises(Unauthorized, match="revoked"):
        caller(elsewhere, token)


def test_uses_are_written_now_and_then(guarded: ServiceHarness, monkeypatch: pytest.MonkeyPatch) -> None:
    token = created(guarded)
    written: list[str] = []

    def note(_c: object, _x: object, statement: str, *_: object) -> None:
        if statement.startswith("UPDATE tokens"):
            written.append(statement)

    event.listen(guarded.database.engine, "before_cursor_execute", note)
    for _ in range(5):
        assert status(guarded, token) == 200
    assert len(written) == 1
    first = listed(guarded)["ci"]["last_used_at"]
    assert first is not None
    monkeypatch.setattr(authenticator, "utc_now", lambda: utc_now() + authenticator.LAST_USED_INTERVAL)
    monkeypatch.setattr(authenticator, "CACHE_SECONDS", 0.0)
    for _ in range(3):
        assert status(guarded, token) == 200
    assert len(written) == 2
    assert listed(guarded)["ci"]["last_used_at"] > first


def test_a_read_is_answered_while_no_one_can_write(guarded: ServiceHarness, monkeypatch: pytest.MonkeyPatch) -> None:
    """The time of use cannot be written. Each request tried to write it, and failed with 503."""
    monkeypatch.setattr(authenticator, "CACHE_SECONDS", 0.0)
    token = created(guarded)
    tried: list[str] = []

    def refuse() -> NoReturn:
        tried.append("write")
        raise DatabaseUnavailable()

    with monkeypatch.context() as patched:
        patched.setattr(guarded.database, "write", refuse)
        assert [status(guarded, token) for _ in range(3)] == [200, 200, 200]
    assert tried == ["write"], "only one request waits for the database"
    assert listed(guarded)["ci"]["last_used_at"] is None
    monkeypatch.setattr(authenticator, "utc_now", lambda: utc_now() + authenticator.LAST_USED_INTERVAL)
    assert status(guarded, token) == 200
    assert listed(guarded)["ci"]["last_used_at"] is not None


NO_TOKENS: list[Any] = [
    None,
    {},
    [],
    {"name": ""},
    {"name": "-x"},
    {"name": "a b"},
    {"name": "a\n"},
    {"name": "a" * 65},
    {"name": 1},
    {"name": "x", "scope": "root"},
    {"name": "x", "expires_in": 0},
    {"name": "x", "expires_in": "60"},
    {"name": "x", "expires_in": 2**63},
    {"name": "x", "max_jobs": -1},
    {"name": "x", "max_jobs": True},
    {"name": "x", "max_devices": 2**63},
    {"name": "x", "sha256": "0" * 64},
]


def test_what_is_no_token(guarded: ServiceHarness) -> None:
    for body in NO_TOKENS:
        answer = guarded.client.post("/tokens", json=body)
        assert (answer.status_code, answer.json()["code"]) == (422, "invalid_request"), body
    assert listed(guarded) == {}


def test_names_that_mean_something_else_are_not_given(guarded: ServiceHarness) -> None:
    for name in sorted(RESERVED):
        assert guarded.client.post("/tokens", json={"name": name.title()}).status_code == 409
    for path in ("/tokens/nobody-knows", "/tokens/%00", "/tokens/" + "x" * 200):
        for method, verb in (("POST", "/rotate"), ("DELETE", ""), ("PATCH", "")):
            answer = guarded.client.request(method, path + verb, json={} if method != "DELETE" else None)
            assert answer.status_code in (404, 422), (method, path, answer.text)


def events_after_revocation(guarded: ServiceHarness, attempt: FakeAttempt, reader: Reader) -> list[str]:
    """Revoke the token, report another point, and return the events that the stream still has."""
    guarded.client.delete("/tokens/ci")
    attempt.metric(2)
    guarded.ship(attempt)
    return [event["event"] for event in reader.iterator]


def test_a_stream_ends_with_the_token_that_opened_it(guarded: ServiceHarness, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(middleware, "TOKEN_RECHECK_SECONDS", 0.0)
    token = created(guarded)
    job_id, attempt = guarded.running()
    with served(guarded) as address:
        path = f"/jobs/{job_id}/metrics/stream"
        reader = Reader(address, path, Authorization=f"Bearer {token}")
        attempt.metric(1)
        guarded.ship(attempt)
        assert reader.take(1)[0]["data"]["step"] == 1
        assert events_after_revocation(guarded, attempt, reader) == [], "cut, without its last event"
        reader.close()
        with contextlib.closing(Reader(address, path, Authorization=f"Bearer {token}")) as refused:
            assert refused.status == 401


@pytest.mark.parametrize("error", [OperationalError("SELECT", {}, OSError("gone")), DatabaseUnavailable()])
def test_a_stream_waits_while_its_token_cannot_be_checked(
    guarded: ServiceHarness, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    monkeypatch.setattr(middleware, "TOKEN_RECHECK_SECONDS", 0.0)
    monkeypatch.setattr(authenticator, "CACHE_SECONDS", 0.0)
    token = created(guarded)
    job_id, attempt = guarded.running()

    def away(_: str) -> NoReturn:
        raise error

    with served(guarded) as address:
        reader = Reader(address, f"/jobs/{job_id}/metrics/stream", Authorization=f"Bearer {token}")
        with monkeypatch.context() as patched:
            patched.setattr(guarded.app.state.app_state.authenticator, "_load", away)
            attempt.metric(1)
            guarded.ship(attempt)
            assert reader.take(1)[0]["data"]["step"] == 1
        assert events_after_revocation(guarded, attempt, reader) == [], "the stream ends once its token can be checked"
        reader.close()


# A service without a token of its own


def test_where_no_token_is_needed_a_named_one_counts_all_the_same(any_rig: ServiceHarness) -> None:
    token = created(any_rig, "reader")
    assert listed(any_rig)["reader"]["created_by"] == "local"
    assert any_rig.client.post("/jobs", json=any_rig.spec()).json()["submitted_by"] == "local"
    assert any_rig.client.post("/jobs", json=any_rig.spec(), headers=bearer(token)).status_code == 403
    assert status(any_rig, token) == 200
    any_rig.client.delete("/tokens/reader")
    assert status(any_rig, token) == 401, "what was taken back opens nothing, here neither"
    assert status(any_rig, token[:-2]) == 401
    assert status(any_rig, "somebody else's") == 200, "what is no token of ours is not looked at"


# Who did it


def test_events_say_who_asked(guarded: ServiceHarness) -> None:
    alice, bob = created(guarded, "alice", scope="submit"), created(guarded, "bob", scope="operate")
    job = guarded.client.post("/jobs", json=guarded.spec(), headers=bearer(alice)).json()
    assert job["submitted_by"] == "alice"
    guarded.reconcile()
    attempt = guarded.launcher.of(job["id"])
    attempt.started(steps=10)
    guarded.ship(attempt)
    guarded.checkpoint(job["id"], attempt, 5)
    guarded.ship(attempt)

    def ask(method: str, below: str, token: str, body: Any = None) -> Any:
        answer = guarded.client.request(method, f"/jobs/{job['id']}{below}", json=body, headers=bearer(token))
        assert answer.status_code < 300, answer.text
        return answer.json() if answer.content else None

    ask("PATCH", "", bob, {"priority": 3})
    ask("POST", "/save", alice)
    ask("POST", "/pause", bob)
    guarded.exit(attempt, "stopped", step=5)
    assert ask("POST", "/resume", bob)["submitted_by"] == "alice"
    ask("POST", "/cancel", alice)
    told = [(e["kind"], e["data"].get("to"), e["actor"]) for e in guarded.data(job["id"], "events")]
    assert [found for found in told if found[2] in ("alice", "bob")] == [
        ("created", "queued", "alice"),
        ("changed", None, "bob"),
        ("save", None, "alice"),
        ("status", "pausing", "bob"),
        ("status", "queued", "bob"),
        ("status", "cancelled", "alice"),
    ]
    assert {actor for _, _, actor in told} == {"alice", "bob", "agent", "scheduler"}


# Attempts


def test_an_attempt_s_token_reports_that_attempt_and_nothing_else(guarded: ServiceHarness) -> None:
    first_job, first = guarded.running()
    _, second = guarded.running()
    named = created(guarded, scope="admin")
    routes = [path for (_, path), need in NEEDS.items() if need == ATTEMPT]
    assert len(routes) == 3
    bodies = {
        "events": {"events": [{"seq": 2, "event": "warning", "code": "x", "message": "forged"}]},
        "heartbeat": {"step": 3},
        "exit": {
            "outcome": "completed",
            "step": 1,
            "reason": None,
            "message": "",
            "last_seq": 1,
            "ended_at": "2026-01-01T00:00:00Z",
        },
    }
    before = guarded.job(first_job)
    for path in routes:
        what = path.rpartition("/")[2]
        for token in (second.launch.token, named, ADMIN_TOKEN, "", first.launch.token[:-1], first.launch.token + "x"):
            answer = guarded.report(first, what, bodies[what], token)
            assert answer.status_code == 401, (what, answer.text)
            assert answer.json()["detail"] == "The token does not belong to this attempt."
        nonsense = guarded.report(first, what, "[" * 100_000, "")
        assert nonsense.status_code == 401, "who has no token has nothing of the body read"
    assert guarded.job(first_job) == before
    for method, path in NEEDS:
        if NEEDS[method, path] not in (OPEN, ATTEMPT):
            assert status(guarded, first.launch.token, filled(path)) == 401, "it opens no user's route"
    assert guarded.report(first, "heartbeat", bodies["heartbeat"]).status_code == 200


def test_hashes_are_all_that_is_kept_of_secrets(guarded: ServiceHarness) -> None:
    token = created(guarded)
    _, attempt = guarded.running()
    if guarded.url.startswith("sqlite"):
        files = [Path(guarded.url.removeprefix("sqlite:///") + ending) for ending in ("", "-wal")]
        content = b"".join(file.read_bytes() for file in files if file.exists())
        for secret in (token, attempt.launch.token, ADMIN_TOKEN):
            assert secret.encode() not in content
