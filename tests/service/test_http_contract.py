"""The OpenAPI document is complete and correct, and malformed requests are rejected as such."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests.service.harness import ServiceHarness
from tests.service.needs import NEEDS
from trainyard.contract.parsing import ALIASES
from trainyard.contract.units import UNITS
from trainyard.service.metrics import store
from trainyard.service.schemas import (
    Bucket,
    Metric,
    MetricPage,
    ProblemDetails,
)

ROOT = Path(__file__).parents[2]
BODILESS = ("pause", "cancel", "kill", "save", "rotate", "test", "redeliver")
GROUP_SCHEMAS = {
    "": "JobSpec",
    "model": "ModelConfig",
    "data": "DataSpec",
    "training": "TrainingSpec",
    "checkpoint": "CheckpointSpec",
    "reporting": "ReportingSpec",
    "limits": "LimitsSpec",
    "resources": "ResourcesSpec",
    "timeouts": "Timeouts",
}


def operations(rig: ServiceHarness) -> list[tuple[str, str, dict[str, Any]]]:
    paths = rig.app.openapi()["paths"]
    return [(method, path, operation) for path, found in paths.items() for method, operation in found.items()]


def test_every_operation_says_what_it_answers(rig: ServiceHarness) -> None:
    names = []
    for method, path, operation in operations(rig):
        where = f"{method} {path}"
        names.append(operation["operationId"])
        assert operation.get("description"), where
        good = {status: found for status, found in operation["responses"].items() if status[0] in "2"}
        assert good, where
        for status, found in good.items():
            assert status == "204" or found["content"], where
            for described in found.get("content", {}).values():
                assert described.get("schema"), where
        for status in ("401", "403", "503", "default"):
            shape = "application/json" if path.startswith("/v1/") else "application/problem+json"
            assert shape in operation["responses"][status]["content"], where
        assert ("404" in operation["responses"]) == ("{" in path or path == "/v1/completions"), where
        if method in ("post", "patch") and path.rpartition("/")[2] not in BODILESS:
            assert "requestBody" in operation, where
    assert len(names) == len(set(names))


def test_every_reference_in_the_document_is_there_and_used(rig: ServiceHarness) -> None:
    document = rig.app.openapi()
    text = json.dumps(document)
    named = set(re.findall(r'"#/components/schemas/([^"]+)"', text))
    assert named <= set(document["components"]["schemas"])
    assert set(document["components"]["schemas"]) - named == set()


def test_every_setting_is_described_for_those_who_fill_in_a_form(rig: ServiceHarness) -> None:
    schemas = rig.app.openapi()["components"]["schemas"]
    groups = {group: schemas[name] for group, name in GROUP_SCHEMAS.items()}
    leaves = {leaf: found for group in groups.values() for leaf, found in group["properties"].items()}
    assert [leaf for leaf, found in leaves.items() if "$ref" not in found and not found.get("description")] == []
    assert {leaf: found["x-unit"] for leaf, found in leaves.items() if "x-unit" in found} == UNITS
    aliases = {alias: leaf for leaf, found in leaves.items() for alias in found.get("x-aliases", ())}
    assert aliases == {alias: leaf for alias, (_, leaf) in ALIASES.items()}
    assert [group for group, found in groups.items() if not found["description"]] == []


def test_rows_of_the_curve_are_what_the_document_says(rig: ServiceHarness) -> None:
    assert set(Metric.model_fields) == {*store.FIELDS, "job_id"}
    job_id, attempt = rig.running()
    for step in range(1, 9):
        attempt.metric(step, loss=None if step == 3 else 1.0)
    rig.ship(attempt)
    for params, kind in (({}, Metric), ({"max_points": 4}, Bucket), ({"fields": "loss"}, Metric)):
        answer = rig.get(f"/jobs/{job_id}/metrics", **params)
        assert MetricPage.model_validate(answer).data
        for row in answer["data"]:
            assert set(row) <= set(kind.model_fields)


def test_changes_are_described_by_the_job_spec(rig: ServiceHarness) -> None:
    document = rig.app.openapi()
    paths, schemas = document["paths"], document["components"]["schemas"]
    patch = paths["/jobs/{job_id}"]["patch"]["requestBody"]["content"]["application/json"]["schema"]
    patch = schemas[patch["$ref"].rpartition("/")[2]]
    assert {"name", "labels", "priority", "save_interval"} <= set(patch["properties"])
    assert patch["additionalProperties"] is False
    resume = paths["/jobs/{job_id}/resume"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    resume = schemas[resume["$ref"].rpartition("/")[2]]
    assert set(resume["properties"]) == {
        "epochs",
        "max_steps",
        "max_tokens",
        "max_minutes",
        "target_loss",
        "gradient_checkpointing",
        "resources",
        "step",
        "save_dir",
        "schedule",
    }


# What an API is sent


def code_of(answer: Any, status: int) -> str:
    """The code of an error, also in OpenAI's shape."""
    if not answer.request.url.path.startswith("/v1/"):
        return problem(answer, status).code
    assert answer.status_code == status, answer.text[:300]
    return str(answer.json()["error"]["code"])


def problem(answer: Any, *statuses: int) -> ProblemDetails:
    assert answer.status_code in statuses, (answer.status_code, answer.text[:300])
    assert answer.headers["content-type"] == "application/problem+json"
    found = ProblemDetails.model_validate(answer.json())
    assert found.status == answer.status_code
    assert found.request_id == answer.headers["x-request-id"]
    return found


@pytest.mark.parametrize(
    ("query", "messages"),
    [
        ("statu=queued", {"/query/statu": "is not a parameter; did you mean status?"}),
        ("LIMIT=1&limt=1", {"/query/LIMIT": None, "/query/limt": "is not a parameter; did you mean limit?"}),
        ("_=1&limit=0", {"/query/_": None, "/query/limit": "should be greater than or equal to 1"}),
        ("status[]=queued", {"/query/status[]": "is not a parameter; did you mean status?"}),
    ],
)
def test_an_unknown_query_parameter_is_named(rig: ServiceHarness, query: str, messages: dict[str, str | None]) -> None:
    found = problem(rig.client.get(f"/jobs?{query}"), 422)
    assert {error.pointer for error in found.errors} == set(messages)
    for error in found.errors:
        wanted = messages[error.pointer]
        listed = (
            "those here are after, discarded, fields, group, label, limit, name, order, owner, parent, search, status"
        )
        assert error.message == wanted or (wanted is None and listed in error.message)


def test_no_call_ignores_a_query_parameter(rig: ServiceHarness) -> None:
    for method, path in NEEDS:
        answer = rig.client.request(method, re.sub(r"\{\w+\}", "1", path) + "?verbose=1", json=rig.spec())
        if path.startswith("/v1/"):
            assert "query/verbose" in answer.json()["error"]["message"]
            continue
        assert "/query/verbose" in {error.pointer for error in problem(answer, 422).errors}, (method, path)
    assert rig.get("/jobs")["data"] == []


def test_every_list_takes_the_parameters_that_clients_page_with(rig: ServiceHarness) -> None:
    """The Python client of 0.1 sends `limit` to all of them."""
    job_id = rig.submit()
    lists = [path for (method, path) in NEEDS if method == "GET" and is_list(rig, path)]
    assert len(lists) > 8
    for path in lists:
        address = re.sub(r"\{job_id\}", job_id, path)
        assert rig.client.get(f"{address}?limit=100").status_code == 200, path
    first, second = rig.get("/devices")["data"]
    page = rig.get("/devices", limit=1)
    assert (page["data"], page["has_more"]) == ([first], True)
    page = rig.get("/devices", limit=1, after=first["id"])
    assert (page["data"], page["has_more"]) == ([second], False)
    problem(rig.client.get("/devices?after=cuda:7"), 422)


def is_list(rig: ServiceHarness, path: str) -> bool:
    """Return whether the call answers with a page of things that have an id, outside of a webhook."""
    found = rig.app.openapi()["paths"].get(path, {}).get("get", {}).get("responses", {}).get("200", {})
    schema = json.dumps(found.get("content", {}).get("application/json", {}))
    return "Page_" in schema and "{webhook_id}" not in path


def test_a_summary_of_a_job_has_no_spec(rig: ServiceHarness) -> None:
    job_id, _ = rig.running(name="one")
    [full] = rig.get("/jobs")["data"]
    [light] = rig.get("/jobs", fields="summary")["data"]
    assert set(full) - set(light) == {"spec", "plan", "allowed_actions", "weights_path"}
    assert {name: full[name] for name in light if name != "summary"} == {
        name: light[name] for name in light if name != "summary"
    }
    assert full == {**rig.job(job_id), "summary": full["summary"]}
    problem(rig.client.get("/jobs?fields=loss"), 422)


JSON = {"Content-Type": "application/json"}
BODIES = {
    "deep": b"[" * 100_000,
    "deep objects": b'{"a":' * 50_000 + b"1" + b"}" * 50_000,
    "NaN": b'{"training": {"learning_rate": NaN}}',
    "infinity": b'{"training": {"learning_rate": -Infinity}}',
    "1e999": b'{"training": {"learning_rate": 1e999}}',
    "5,000 digits": b'{"training": {"seed": ' + b"9" * 5000 + b"}}",
    "NUL in a value": b'{"name": "a\\u0000b"}',
    "NUL in a key": b'{"a\\u0000b": 1}',
    "surrogate in a value": b'{"name": "\\ud800"}',
    "surrogate in a key": b'{"\\udfff": {"\\ud800": 1}}',
    "no UTF-8": b'{"name": "\xff\xfe"}',
    "UTF-16": '{"name": "x"}'.encode("utf-16"),
    "cut": b'{"name": "x',
    "twice": b'{"name": "x", "name": "y"}',
    "a list": b"[]",
    "a number": b"1",
    "null": b"null",
    "nothing": b"",
}


@pytest.mark.parametrize("name", BODIES)
def test_bodies_that_are_no_spec(any_rig: ServiceHarness, name: str) -> None:
    job_id = any_rig.submit()
    before = any_rig.job(job_id)
    for path in ("/jobs", "/jobs/plan"):
        found = problem(any_rig.client.post(path, content=BODIES[name], headers=JSON), 422)
        assert "9999" not in found.detail
    forked = any_rig.client.post(f"/jobs/{job_id}/fork", content=BODIES[name], headers=JSON)
    problem(forked, 409, 422)
    if name not in ("null", "nothing"):
        problem(any_rig.client.patch(f"/jobs/{job_id}", content=BODIES[name], headers=JSON), 409, 422)
        problem(any_rig.client.post(f"/jobs/{job_id}/resume", content=BODIES[name], headers=JSON), 409, 422)
    assert any_rig.job(job_id) == before


def test_a_body_is_json_whatever_reads_it(rig: ServiceHarness) -> None:
    job_id = rig.submit()
    for path, body in (("/jobs", rig.spec()), ("/tokens", {"name": "ci"}), ("/jobs/plan", rig.spec())):
        content = json.dumps(body).encode()
        refused = rig.client.post(path, content=content, headers={"Content-Type": "text/plain"})
        assert problem(refused, 415).code == "unsupported_media_type"
        assert rig.client.post(path, content=content).is_success, "no Content-Type at all"
        typed = {"Content-Type": "application/merge-patch+json; charset=utf-8"}
        assert rig.client.post(path, content=content, headers=typed).status_code != 415
    for content in (b"", b" \n", b"null", b"{}"):
        assert rig.client.patch(f"/jobs/{job_id}", content=content, headers=JSON).status_code == 200
        assert rig.client.post(f"/jobs/{rig.submit()}/cancel", content=content, headers=JSON).status_code == 202
        assert problem(rig.client.post("/tokens", content=content, headers=JSON), 422).code == "invalid_request"
    twice = rig.client.patch(f"/jobs/{job_id}", content=b'{"name": "x", "name": "y"}', headers=JSON)
    assert problem(twice, 422).code == "invalid_json"


NUMBERS = ["-1", "9223372036854775808", "18446744073709551616", "1" * 400, "NaN", "1e3", "0x10", "1.5", "", "٣", "a\0"]
QUERIES = ["/jobs?limit", "/jobs/{}/metrics?after_step", "/jobs/{}/metrics?limit", "/jobs/{}/metrics?attempt",
           "/jobs/{}/metrics?max_points", "/jobs/{}/logs?offset", "/jobs/{}/logs?limit", "/jobs/{}/logs?attempt",
           "/jobs/{}/logs?tail", "/jobs/{}/logs/lines?first", "/jobs/{}/logs/lines?count", "/jobs/{}/logs/search?limit",
           "/jobs/{}/events?limit", "/jobs/{}/metrics/stream?after_step"]  # fmt: skip


@pytest.mark.parametrize("query", QUERIES)
def test_numbers_of_any_kind_in_a_query(any_rig: ServiceHarness, query: str) -> None:
    job_id = any_rig.submit()
    path, _, name = query.format(job_id).partition("?")
    for number in NUMBERS:
        problem(any_rig.client.get(path, params={name: number}), 422)
    for what in ("events", "samples", "checkpoints", "attempts"):
        for number in NUMBERS:
            answer = any_rig.client.get(f"/jobs/{job_id}/{what}", params={"after": number})
            assert answer.status_code in (200, 422), (what, number, answer.text[:200])


TRAVERSALS = [
    "..",
    "../..",
    "%2e%2e",
    "%2e%2e%2f%2e%2e%2fetc%2fpasswd",
    "%252e%252e%252fetc%252fpasswd",
    "..%5c..",
    "%00",
    "job_%0a",
    "job_a/../job_b",
    "%c0%ae%c0%ae",
    "%ff",
    "job_" + "a" * 2000,
]


@pytest.mark.parametrize("piece", TRAVERSALS)
def test_addresses_that_climb_or_lie(any_rig: ServiceHarness, piece: str) -> None:
    job_id = any_rig.submit()
    paths = [
        f"/jobs/{piece}",
        f"/jobs/{piece}/logs",
        f"/jobs/{piece}/metrics",
        f"/jobs/{job_id}/checkpoints/{piece}/files/x",
        f"/jobs/{job_id}/checkpoints/1/files/{piece}",
        f"/jobs/{job_id}/{piece}",
    ]
    for path in paths:
        answer = any_rig.client.get(path, follow_redirects=False)
        assert answer.status_code in (200, 307, 404, 405, 422), (path, answer.status_code, answer.text[:200])
        assert "root:" not in answer.text
    problem(any_rig.client.delete(f"/jobs/{piece}"), 404, 405, 422)
    for rank in (piece, "-1", "0/../1", "9" * 30):
        problem(any_rig.client.get(f"/jobs/{job_id}/logs", params={"rank": rank}), 404, 422)


NAMES = [
    "--flag",
    "$(touch x)",
    "`id`",
    "'; DROP TABLE jobs; --",
    "<script>alert(1)</script>",
    "a" * 10_000,
    "ab\r\nSet-Cookie: x=1",
    "\u202eright to left",
    "a\nb",
    "\x1b[31m",
    "日本語",
    "../../etc",
    " ",
    "",
]


@pytest.mark.parametrize("name", NAMES)
def test_names_are_refused_or_kept_as_they_are(any_rig: ServiceHarness, name: str) -> None:
    answer = any_rig.client.post("/jobs", json=any_rig.spec(name=name, labels={"k": name[:50]}))
    if answer.status_code == 201:
        job_id = answer.json()["id"]
        assert answer.json()["name"] == name
        found = any_rig.get("/jobs", name=name)["data"]
        assert [job["id"] for job in found] == [job_id]
        any_rig.reconcile()
        assert any_rig.launcher.of(job_id).launch.name.job_id == job_id, "ids are ours, and paths are made of ids"
    else:
        assert {mistake.pointer.split("/")[1] for mistake in problem(answer, 422).errors} <= {"name", "labels"}
    for path in ("/jobs", "/"):
        assert "Set-Cookie" not in any_rig.client.get(path, params={"name": name} if path == "/jobs" else {}).headers


FOREIGN = [
    ("Host", "evil.example"),
    ("Host", "127.0.0.1.evil.example"),
    ("Host", ""),
    ("Origin", "https://evil.example"),
    ("Origin", "null"),
]


@pytest.mark.parametrize("header", FOREIGN, ids=lambda header: f"{header[0]} {header[1]}")
def test_foreign_hosts_and_origins_on_every_verb(rig: ServiceHarness, header: tuple[str, str]) -> None:
    job_id = rig.submit()
    for method, path, _ in operations(rig):
        if header[0] == "Host" or method != "get":
            address = re.sub(r"\{\w+\}", "1", path.replace("{job_id}", job_id))
            found = rig.client.request(method, address, headers=dict([header]), json={} if method != "get" else None)
            assert code_of(found, 403) == f"foreign_{header[0].lower()}", (method, path)
    assert rig.status(job_id) == "queued"
