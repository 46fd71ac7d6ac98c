"""Responses that readers share: their tags change with every kind of write, and a change costs one computation."""

import asyncio
import itertools
import json
import re
import shutil
from collections.abc import Callable
from typing import Any

import httpx2
import pytest
from sqlalchemy import update

from tests.fakes.launcher import FakeAttempt
from tests.service.conftest import MakeHarness
from tests.service.harness import URL, ServiceHarness
from tests.service.test_query_counts import statements
from trainyard.service.api.shared_reads import MAX_TOTAL_BYTES, SharedReads, names_tag
from trainyard.service.db.engine import Database
from trainyard.service.db.models import JobRow

READERS = 1000
PATHS = ("", "/metrics", "/metrics?max_points=100", "/events", "/checkpoints", "/attempts", "/samples")
"""Below a job."""

Write = Callable[[ServiceHarness, str, FakeAttempt], Any]

_accept = itertools.count()


def reads_of(rig: ServiceHarness) -> SharedReads:
    """The shared reads of the service, on a clock that stands: only writes make a response old."""
    reads: SharedReads = rig.app.state.app_state.shared_reads
    reads.monotonic = lambda: 0.0
    return reads


def without_age(body: Any) -> Any:
    """The response without "checkpoint 5 s ago": the time passes meanwhile."""
    return json.loads(re.sub(r"checkpoint [^,]+ ago", "checkpoint ago", json.dumps(body)))


def fresh(rig: ServiceHarness, path: str) -> Any:
    """The response as it is computed now: no other request has this Accept header."""
    return rig.client.get(path, headers={"Accept": f"application/json;v={next(_accept)}"}).json()


def report_checkpoint(rig: ServiceHarness, job_id: str, attempt: FakeAttempt, step: int = 5) -> None:
    rig.checkpoint(job_id, attempt, step)
    rig.ship(attempt)


def report_metric(rig: ServiceHarness, _job_id: str, attempt: FakeAttempt) -> None:
    attempt.metric(7, loss=1.5)
    rig.ship(attempt)


def patch(**changes: Any) -> Write:
    return lambda rig, job_id, _: rig.client.patch(f"/jobs/{job_id}", json=changes).raise_for_status()


def write_elsewhere(rig: ServiceHarness, job_id: str, _attempt: FakeAttempt) -> None:
    """A change by another process, which tells this one nothing."""
    other = Database(rig.url)
    with other.write() as session:
        session.execute(update(JobRow).where(JobRow.id == job_id).values(message="written elsewhere"))
    other.close()


WRITES: dict[str, tuple[Write, tuple[str, ...]]] = {
    "metrics": (report_metric, ("", "/metrics", "/metrics?max_points=100")),
    "status": (lambda rig, job_id, _: rig.post_action(job_id, "pause"), ("", "/events")),
    "name": (patch(name="other"), ("", "/events")),
    "label": (patch(labels={"a": "b"}), ("",)),
    "description": (patch(description="why"), ("",)),
    "group": (patch(group="g"), ("",)),
    "live setting": (patch(save_interval=7), ("",)),
    "checkpoint": (report_checkpoint, ("", "/checkpoints")),
    "exit": (lambda rig, _, attempt: rig.exit(attempt, "completed", step=10), ("", "/attempts", "/events")),
    "another process": (write_elsewhere, ("",)),
}


@pytest.mark.parametrize("kind", WRITES)
def test_each_kind_of_write_changes_the_tags_and_nothing_stale_is_sent(any_rig: ServiceHarness, kind: str) -> None:
    reads_of(any_rig)
    job_id, attempt = any_rig.running()
    attempt.metric(1)
    any_rig.ship(attempt)
    write, changed = WRITES[kind]
    addresses = ["/jobs?limit=5", *(f"/jobs/{job_id}{path}" for path in PATHS)]
    tags = {address: any_rig.client.get(address).headers["etag"] for address in addresses}
    write(any_rig, job_id, attempt)
    for address, tag in tags.items():
        after = any_rig.client.get(address, headers={"If-None-Match": tag})
        if after.status_code == 304:
            after = any_rig.client.get(address)
            assert after.headers["etag"] == tag
        assert without_age(after.json()) == without_age(fresh(any_rig, address)), address
    for path in changed:
        after = any_rig.client.get(f"/jobs/{job_id}{path}", headers={"If-None-Match": tags[f"/jobs/{job_id}{path}"]})
        assert (after.status_code, after.headers["etag"] != tags[f"/jobs/{job_id}{path}"]) == (200, True), path


@pytest.mark.parametrize("fields", ["all", "summary"])
def test_a_job_of_a_list_is_as_fresh_as_the_job_itself(any_rig: ServiceHarness, fields: str) -> None:
    reads_of(any_rig)
    first, second = any_rig.submit(), any_rig.submit()
    path = f"/jobs/{second}"

    def require_same() -> None:
        listed = {job["id"]: job for job in any_rig.get("/jobs", fields=fields)["data"]}
        for job_id in (first, second):
            alone = any_rig.job(job_id)
            assert listed[job_id] == {name: alone[name] for name in listed[job_id]}

    require_same()
    for change in ({"name": "n"}, {"labels": {"a": "b"}}, {"group": "g"}, {"description": "d"}, {"save_interval": 9}):
        any_rig.client.patch(path, json=change).raise_for_status()
        require_same()
    any_rig.client.patch(path, json={"priority": 5}).raise_for_status()  # moves the other job in the queue
    require_same()
    any_rig.reconcile()  # changes what the jobs wait for
    require_same()
    any_rig.post_action(second, "cancel")
    require_same()
    attempt = any_rig.launcher.of(second)
    report_checkpoint(any_rig, second, attempt, 5)
    any_rig.exit(attempt, "stopped", step=5)
    require_same()
    shutil.rmtree(any_rig.home / "runs" / second / "checkpoints")
    any_rig.app.state.app_state.shared_reads.monotonic = lambda: 2.0
    require_same()


def test_a_discarded_job_leaves_the_list_and_a_deleted_one_is_not_found(any_rig: ServiceHarness) -> None:
    reads_of(any_rig)
    job_id = any_rig.submit()
    before = any_rig.client.get("/jobs")
    any_rig.client.patch(f"/jobs/{job_id}", json={"discarded": True}).raise_for_status()
    after = any_rig.client.get("/jobs", headers={"If-None-Match": before.headers["etag"]})
    assert (after.status_code, after.json()["data"]) == (200, [])
    tag = any_rig.client.get(f"/jobs/{job_id}").headers["etag"]
    any_rig.post_action(job_id, "cancel")
    assert any_rig.client.delete(f"/jobs/{job_id}").status_code == 204
    assert any_rig.client.get(f"/jobs/{job_id}", headers={"If-None-Match": tag}).status_code == 404


def test_a_deleted_checkpoint_is_not_shown_any_more(any_rig: ServiceHarness) -> None:
    reads = reads_of(any_rig)
    job_id, attempt = any_rig.running()
    report_checkpoint(any_rig, job_id, attempt, 5)
    report_checkpoint(any_rig, job_id, attempt, 6)
    any_rig.exit(attempt, "completed", step=10)
    assert any_rig.job(job_id)["checkpoint"]["step"] == 6
    assert any_rig.client.delete(f"/jobs/{job_id}/checkpoints/5").status_code == 204
    assert [one["step"] for one in any_rig.data(job_id, "checkpoints")] == [6]
    # By hand: the database knows nothing of it, so it is seen once the response is too old.
    shutil.rmtree(any_rig.home / "runs" / job_id / "checkpoints")
    reads.monotonic = lambda: 2.0
    assert any_rig.data(job_id, "checkpoints") == []


def test_an_unchanged_response_is_304_without_a_body_and_without_a_statement(rig: ServiceHarness) -> None:
    reads_of(rig)
    job_id, _ = rig.running()
    for path in ("/jobs", *(f"/jobs/{job_id}{path}" for path in PATHS), "/devices"):
        first = rig.client.get(path)
        assert first.headers["cache-control"] == "private, no-cache"
        assert first.headers["vary"] == "Accept"
        with statements(rig) as said:
            again = rig.client.get(path, headers={"If-None-Match": f'"other", W/{first.headers["etag"]}'})
            whole = rig.client.get(path)
        assert said == []
        assert (again.status_code, again.content) == (304, b"")
        assert again.headers["etag"] == first.headers["etag"]
        assert "content-type" not in again.headers
        assert (whole.content, whole.headers["content-type"]) == (first.content, "application/json")


def test_the_queue_of_a_waiting_job_is_not_stale(rig: ServiceHarness) -> None:
    reads_of(rig)
    job_id = rig.submit()
    before = rig.job(job_id)["queue"]["waiting_for"]
    rig.submit(resources={"device": "cpu", "nproc_per_node": 2, "priority": 5})
    rig.reconcile()
    assert rig.job(job_id)["queue"]["waiting_for"] != before
    assert rig.job(job_id) == fresh(rig, f"/jobs/{job_id}")


@pytest.mark.parametrize("path", ["", "/metrics?max_points=500", "/events"])
def test_a_thousand_readers_cause_one_computation_per_change(rig: ServiceHarness, path: str) -> None:
    reads_of(rig)
    job_id, attempt = rig.running()
    attempt.metric(1)
    rig.ship(attempt)
    address = f"/jobs/{job_id}{path}"

    async def read_by_all() -> set[bytes]:
        transport = httpx2.ASGITransport(app=rig.app)
        async with httpx2.AsyncClient(transport=transport, base_url=URL) as client:
            answers = await asyncio.gather(*(client.get(address) for _ in range(READERS)))
        assert {answer.status_code for answer in answers} == {200}
        return {answer.content for answer in answers}

    with statements(rig) as said:
        fresh(rig, address)
    most = len(said)
    bodies = set()
    for change in range(2):
        if change:
            attempt.metric(9)
            attempt.say("warning", code="slow", message="slow")
            rig.ship(attempt)
        with statements(rig) as said:
            read = asyncio.run(read_by_all())
        assert len(said) <= most, said
        assert len(read) == 1
        bodies |= read
    assert len(bodies) == 2


def test_a_curve_is_not_computed_again_for_a_change_of_another_job(rig: ServiceHarness) -> None:
    reads_of(rig)
    job_id, attempt = rig.running()
    attempt.metric(1)
    rig.ship(attempt)
    address = f"/jobs/{job_id}/metrics?max_points=500"
    before = rig.client.get(address)
    rig.submit()
    with statements(rig) as said:
        after = rig.client.get(address, headers={"If-None-Match": before.headers["etag"]})
    assert after.status_code == 304
    assert [statement for statement in said if "metrics" in statement] == []


def test_errors_are_not_shared_and_have_no_tag(rig: ServiceHarness) -> None:
    reads_of(rig)
    for path, status in (("/jobs/job_unknown", 404), ("/jobs/a%00b/metrics", 404), ("/jobs?statu=queued", 422)):
        for _ in range(2):
            answer = rig.client.get(path, headers={"If-None-Match": "*"})
            assert (answer.status_code, "etag" in answer.headers) == (status, False)


def test_a_kept_response_still_needs_a_token(make_rig: MakeHarness, sqlite_url: str) -> None:
    rig = make_rig(sqlite_url, token="a-long-secret-token")
    tag = rig.client.get("/jobs", headers={"Authorization": "Bearer a-long-secret-token"}).headers["etag"]
    for headers in ({}, {"If-None-Match": tag}, {"If-None-Match": tag, "Authorization": "Bearer wrong"}):
        assert rig.client.get("/jobs", headers=headers).status_code == 401
    rig.close()


def test_the_forms_of_a_curve_have_tags_of_their_own(rig: ServiceHarness) -> None:
    reads_of(rig)
    job_id, attempt = rig.running()
    for step in (1, 2):
        attempt.metric(step)
    rig.ship(attempt)
    kinds = ("application/json", "text/csv", "application/x-ndjson")
    address = f"/jobs/{job_id}/metrics?limit=2"
    answers = [rig.client.get(address, headers={"Accept": kind}) for kind in kinds]
    assert len({answer.headers["etag"] for answer in answers}) == 3
    assert [answer.headers["content-type"].partition(";")[0] for answer in answers] == list(kinds)
    attempt.metric(3)
    rig.ship(attempt)
    # The rows are the same. That another page follows is in a header.
    after = rig.client.get(address, headers={"Accept": "text/csv", "If-None-Match": answers[1].headers["etag"]})
    assert (after.status_code, after.text, "link" in after.headers) == (200, answers[1].text, True)


def test_the_kept_responses_are_bounded(rig: ServiceHarness) -> None:
    reads = reads_of(rig)
    job_id = rig.submit()
    for limit in range(1, 60):
        rig.client.get(f"/jobs/{job_id}/events?limit={limit}")
    assert 0 < reads.kept_bytes <= MAX_TOTAL_BYTES
    assert reads.kept_bytes > 59 * 500


@pytest.mark.parametrize(
    ("header", "named"),
    [('"a"', True), ('W/"a"', True), ('"b", "a"', True), ("*", True), ('"b"', False), ("", False), ('"a', False)],
)
def test_a_tag_is_compared_as_rfc_9110_says(header: str, named: bool) -> None:
    assert names_tag(header, '"a"') is named


def test_the_document_names_the_tag_and_304(rig: ServiceHarness) -> None:
    document = json.loads(rig.client.get("/openapi.json").content)
    for path in ("/jobs", "/jobs/{job_id}", *(f"/jobs/{{job_id}}/{name}" for name in ("metrics", "events"))):
        responses = document["paths"][path]["get"]["responses"]
        assert "ETag" in responses["200"]["headers"]
        assert "ETag" in responses["304"]["headers"]
    assert "304" not in document["paths"]["/version"]["get"]["responses"]
