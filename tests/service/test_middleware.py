"""Errors, authentication and malformed requests: never a 5xx, and never an echo of the input."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from fastapi.routing import APIRoute
from sqlalchemy.exc import OperationalError

from tests.service.conftest import MakeHarness
from tests.service.harness import ServiceHarness
from trainyard.service.app import ROUTES
from trainyard.service.errors import ServiceError, from_exception

CANARY = "canary-91c2"


def problem(answer: Any, status: int, code: str) -> dict[str, Any]:
    assert answer.status_code == status, answer.text[:500]
    assert answer.headers["content-type"] == "application/problem+json"
    body: dict[str, Any] = answer.json()
    assert {"type", "title", "status", "code", "detail", "request_id"} <= set(body)
    assert (body["status"], body["code"]) == (status, code)
    assert answer.headers["x-request-id"] == body["request_id"]
    return body


def test_every_no_is_a_problem(rig: ServiceHarness) -> None:
    problem(rig.client.get("/nowhere"), 404, "not_found")
    problem(rig.client.get(f"/{CANARY}/x"), 404, "not_found")
    refused = rig.client.put("/jobs")
    problem(refused, 405, "method_not_allowed")
    assert refused.headers["allow"] == "GET, POST"
    assert rig.client.put("/jobs/job_aaaa").headers["allow"] == "DELETE, GET, PATCH"
    assert rig.client.get("/jobs/job_aaaa/pause").headers["allow"] == "POST"
    problem(rig.client.get("/jobs", params={"limit": "x"}), 422, "invalid_request")
    problem(rig.client.get("/jobs/job_aaaa"), 404, "job_not_found")
    problem(
        rig.client.post("/jobs", content="{}", headers={"Content-Type": "text/plain"}), 415, "unsupported_media_type"
    )


def test_what_nobody_expected_is_a_500_that_tells_nothing(rig: ServiceHarness, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        raise RuntimeError(CANARY)

    monkeypatch.setattr(rig.database, "connection", broken)
    body = problem(rig.client.get("/jobs"), 500, "internal_error")
    assert CANARY not in json.dumps(body)


def test_a_database_that_is_away_is_a_503(rig: ServiceHarness, monkeypatch: pytest.MonkeyPatch) -> None:
    def away() -> None:
        raise OperationalError("SELECT 1", {}, Exception("gone"))

    monkeypatch.setattr(rig.database, "connection", away)
    answer = rig.client.get("/jobs")
    problem(answer, 503, "database_unavailable")
    assert answer.headers["retry-after"] == "1"


def test_every_error_has_a_message_of_its_own() -> None:
    def all_below(kind: type[ServiceError]) -> list[type[ServiceError]]:
        return [kind, *(found for below in kind.__subclasses__() for found in all_below(below))]

    kinds = [
        kind
        for kind in all_below(ServiceError)
        if kind.__module__ == "trainyard.service.errors" and kind.__name__ != "Refused"
    ]
    assert len(kinds) > 15
    for kind in kinds:
        assert kind().detail.endswith("."), kind
        assert 400 <= kind.status < 600
    codes = [kind.code for kind in kinds if kind is not ServiceError]
    assert len(codes) == len(set(codes))
    assert from_exception(ValueError("x")).status == 500


def test_request_ids(rig: ServiceHarness) -> None:
    assert rig.client.get("/health", headers={"X-Request-ID": "abc-1"}).headers["x-request-id"] == "abc-1"
    for bad in ("a b", "x" * 200, "a;b", ""):
        made = rig.client.get("/health", headers={"X-Request-ID": bad}).headers["x-request-id"]
        assert made.startswith("req_")


def test_a_token_guards_everything_but_the_pulse(make_rig: MakeHarness, sqlite_url: str) -> None:
    rig = make_rig(sqlite_url, token="sesame")
    for path in ("/jobs", "/devices", "/version", "/metrics", "/openapi.json", "/nowhere"):
        answer = rig.client.get(path)
        problem(answer, 401, "unauthorized")
        assert answer.headers["www-authenticate"] == "Bearer"
        for wrong in (b"Bearer wrong", b"Basic sesame", b"sesame", b"Bearer", "Bearer sesam\xe9".encode()):
            assert rig.client.get(path, headers=[(b"Authorization", wrong)]).status_code == 401
    assert rig.client.get("/health").status_code == 200
    assert rig.client.get("/ready").status_code == 503
    for header in ("Bearer sesame", "bearer sesame"):
        assert rig.client.get("/jobs", headers={"Authorization": header}).status_code == 200
    answer = rig.client.post("/internal/attempts/att_x/heartbeat", json={}, headers={"Authorization": "Bearer sesame"})
    assert answer.status_code == 401, "the user's token is not an attempt's"
    rig.close()


def test_foreign_hosts(rig: ServiceHarness) -> None:
    for host in ("evil.example", "127.0.0.1.evil.example", "", "[", "0.0.0.0:8000", "localhost.evil:80"):
        problem(rig.client.get("/jobs", headers={"Host": host}), 403, "foreign_host")
    for host in ("localhost:8000", "LOCALHOST", "127.0.0.1:1", "[::1]:8000"):
        assert rig.client.get("/jobs", headers={"Host": host}).status_code == 200


def test_foreign_origins(rig: ServiceHarness) -> None:
    for origin in ("http://evil.example", "null", "http://127.0.0.1:9999", "http://127.0.0.1", "["):
        for verb in ("POST", "PATCH", "DELETE", "PUT"):
            answer = rig.client.request(verb, "/jobs", json=rig.spec(), headers={"Origin": origin})
            problem(answer, 403, "foreign_origin")
        assert rig.client.get("/jobs", headers={"Origin": origin}).status_code == 200
    assert rig.client.post("/jobs", json=rig.spec(), headers={"Origin": "http://127.0.0.1:8000"}).status_code == 201
    assert rig.client.get("/jobs", headers={"Sec-Fetch-Site": "same-origin"}).status_code == 200
    assert "access-control-allow-origin" not in rig.client.get("/jobs", headers={"Origin": "http://a.b"}).headers


def test_pages_of_other_sites_only_link_here(rig: ServiceHarness) -> None:
    """A browser names the site that makes a request, also with GET and EventSource, which send no Origin."""
    job_id = rig.submit()
    cross = {"Sec-Fetch-Site": "cross-site"}
    for mode in ("cors", "no-cors", "navigate"):
        for path in ("/jobs", f"/jobs/{job_id}/metrics/stream", f"/jobs/{job_id}/logs", "/openapi.json", "/devices"):
            problem(rig.client.get(path, headers={**cross, "Sec-Fetch-Mode": mode}), 403, "foreign_origin")
    problem(rig.client.delete(f"/jobs/{job_id}", headers=cross), 403, "foreign_origin")
    link = {**cross, "Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "document", "Accept": "text/html"}
    assert rig.client.get(f"/jobs/{job_id}", headers=link).headers["content-type"].startswith("text/html")
    problem(rig.client.get(f"/jobs/{job_id}", headers={**link, "Sec-Fetch-Dest": "iframe"}), 403, "foreign_origin")


def test_every_route_and_verb_refuses_pages_of_other_sites(rig: ServiceHarness) -> None:
    """Before the route is looked up, so that none can be left out: streams, reports and health checks too."""
    asked = 0
    for route in ROUTES:
        assert isinstance(route, APIRoute)
        path = re.sub(r"{\w+(:path)?}", "x", route.path)
        for verb in ("GET", "HEAD", "OPTIONS", "POST", "PUT", "PATCH", "DELETE"):
            answer = rig.client.request(verb, path, headers={"Sec-Fetch-Site": "cross-site"})
            assert answer.status_code == 403, (verb, path)
            asked += 1
    assert asked >= 7 * 60


def test_bodies_over_the_limit(rig: ServiceHarness) -> None:
    large = b'{"name": "' + b"x" * (1 << 20) + b'"}'
    headers = {"Content-Type": "application/json"}
    problem(rig.client.post("/jobs", content=large, headers=headers), 413, "body_too_large")
    chunked = (large[i : i + 65536] for i in range(0, len(large), 65536))
    problem(rig.client.post("/jobs", content=chunked, headers=headers), 413, "body_too_large")
    for length in ("-1", "x", "9" * 40):
        answer = rig.client.post("/jobs", content=b"{}", headers={**headers, "Content-Length": length})
        assert answer.status_code == 413


BODIES: list[bytes] = [
    b"",
    b" ",
    b"{",
    b"nonsense",
    b"\xff\xfe\x00",
    b'"\xff"',
    b"[" * 100_000,
    b'{"a":' * 50_000 + b"1" + b"}" * 50_000,
    b"9" * 5000,
    b'{"training": {"epochs": ' + b"9" * 5000 + b"}}",
    b'{"training": {"learning_rate": NaN}}',
    b'{"training": {"learning_rate": Infinity, "grad_clip": -Infinity}}',
    b'{"training": {"learning_rate": 1e999}}',
    b'{"name": "\\ud800"}',
    b'{"\\ud800": 1}',
    b'{"model": {"\\ud800": 1}}',
    b'{"labels": {"\\ud800": "\\u0000"}}',
    b'{"data": {"data_path": "a\\u0000b"}}',
    b'{"data": {"data_path": "\\ud800"}}',
    b'{"data": {"data_path": ""}}',
    b'{"data": {"tokenizer_path": "a\\u0000b"}}',
    b'{"data": null}',
    b'{"data": []}',
    b'{"data": {"data_path": {"data_path": 1}}}',
    b'{"data": {}, "data": {}}',
    b'{"model": {"hidden_size": 9223372036854775808}}',
    b'{"model": {"hidden_size": -1, "num_attention_heads": 0}}',
    b'{"model": {"hidden_size": true, "num_hidden_layers": 1.5}}',
    b'{"training": {"betas": [1], "seed": "nan"}}',
    b'{"training": {"betas": [0.9, 0.999, 1]}}',
    b'{"reporting": {"sample_prompts": ["\\u0000", "\\ud800"]}}',
    b'{"checkpoint": {"save_dir": "/../../../x", "save_weight": "../../x"}}',
    b'{"checkpoint": {"save_weight": "--flag"}}',
    b'{"resources": {"timeouts": {"stop": -1, "x": 1}}}',
    b'{"name": "$(reboot)\\n"}',
    b'{"name": ["' + CANARY.encode() + b'"]}',
    '{"name": "\u202eabc"}'.encode(),
    b'{"version": 2}',
    b'{"1": 1, "": 2, "a/b~c": 3}',
]


@pytest.mark.parametrize("index", range(len(BODIES)))
def test_nasty_bodies(any_rig: ServiceHarness, index: int) -> None:
    headers = {"Content-Type": "application/json", "Idempotency-Key": "k"}
    job_id = any_rig.submit()
    for method, path in (
        ("POST", "/jobs"),
        ("PATCH", f"/jobs/{job_id}"),
        ("POST", f"/jobs/{job_id}/resume"),
        ("POST", f"/jobs/{job_id}/pause"),
        ("POST", "/internal/attempts/a/events"),
    ):
        answer = any_rig.client.request(method, path, content=BODIES[index], headers=headers)
        assert answer.status_code < 500, (method, path, answer.text)
        assert CANARY not in answer.text
        if method == "POST" and path == "/jobs":
            assert answer.status_code == 422


def test_a_prompt_may_hold_anything_that_json_holds(any_rig: ServiceHarness) -> None:
    prompts = ["nul \0", "\u2028", "\U0001f600", "\x1b[31m"]
    job = any_rig.job(any_rig.submit(reporting={"sample_prompts": prompts}, labels={"k'\"\\": "v%_"}))
    assert job["spec"]["reporting"]["sample_prompts"] == prompts
    assert [j["id"] for j in any_rig.get("/jobs", label="k'\"\\=v%_")["data"]] == [job["id"]]


PATHS = [
    "/jobs/..%2f..%2fetc%2fpasswd",
    "/jobs/%252e%252e%252f",
    "/jobs/%00",
    "/jobs/job_aaaa%00",
    "/jobs/%ff",
    "/jobs/%ED%A0%80",
    "/jobs/" + "a" * 20_000,
    "/jobs/job_aaaa/logs?rank=../../x",
    "/jobs/job_aaaa/logs?offset=9223372036854775808",
    "/jobs/job_aaaa/logs?tail=-1",
    "/jobs/job_aaaa/metrics?after_step=9223372036854775808",
    "/jobs/job_aaaa/metrics?after_step=1e400",
    "/jobs/job_aaaa/metrics?fields=%00",
    "/jobs/job_aaaa/metrics?max_points=0",
    "/jobs/job_aaaa/metrics?ema_half_life=nan&max_points=5",
    "/jobs/job_aaaa/checkpoints?after=%00",
    "/jobs?status=%00",
    "/jobs?label=%ED%A0%80=1",
    "/jobs?name=%ff%fe",
    "/jobs?limit=1&limit=2",
    "//jobs",
    "/internal/attempts/%00/events",
    "/..",
]


@pytest.mark.parametrize("path", PATHS)
def test_nasty_paths(any_rig: ServiceHarness, path: str) -> None:
    for method in ("GET", "POST", "PATCH", "DELETE", "OPTIONS", "HEAD", "TRACE"):
        answer = any_rig.client.request(method, path)
        assert answer.status_code < 500, (method, answer.text)
        assert answer.headers["x-request-id"]


def test_secrets_are_in_no_log(make_rig: MakeHarness, sqlite_url: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG")
    rig = make_rig(sqlite_url, token=CANARY)
    rig.client.headers["Authorization"] = f"Bearer {CANARY}"
    _, attempt = rig.running()
    rig.exit(attempt, "completed", step=1)
    assert CANARY not in caplog.text
    assert attempt.launch.token not in caplog.text
    assert CANARY not in repr(rig.settings)
    database = Path(rig.url.removeprefix("sqlite:///")).read_bytes()
    assert attempt.launch.token.encode() not in database
    rig.close()
