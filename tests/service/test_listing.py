"""Job lists: filters, order, pages."""

from typing import Any

import pytest
from sqlalchemy import event, select, text, update

from tests.service.harness import ServiceHarness
from tests.service.needs import ATTEMPT, NEEDS
from trainyard.contract.status import Reason
from trainyard.service.db.models import JobRow


def ids(page: dict[str, Any]) -> list[str]:
    return [job["id"] for job in page["data"]]


def test_filters_order_and_pages(any_rig: ServiceHarness) -> None:
    rig = any_rig
    made = [rig.submit(name=f"n{i % 2}", labels={"odd": str(i % 2), "all": "yes"}) for i in range(5)]
    newest = list(reversed(made))
    assert ids(rig.get("/jobs")) == newest
    assert ids(rig.get("/jobs", order="oldest")) == made
    assert ids(rig.get("/jobs", name="n1")) == [made[3], made[1]]
    assert ids(rig.get("/jobs", name="n")) == []
    assert ids(rig.get("/jobs", label="odd=0")) == [made[4], made[2], made[0]]
    assert ids(rig.get("/jobs", label=["odd=0", "all=yes"])) == [made[4], made[2], made[0]]
    assert ids(rig.get("/jobs", label=["odd=0", "all=no"])) == []
    rig.post_action(made[0], "cancel")
    assert ids(rig.get("/jobs", status="cancelled")) == [made[0]]
    assert ids(rig.get("/jobs", status=["cancelled", "queued"])) == newest

    for order, expected in (("newest", newest), ("oldest", made)):
        seen: list[str] = []
        page: dict[str, Any] = {"has_more": True}
        while page["has_more"]:
            after: dict[str, Any] = {"after": seen[-1]} if seen else {}
            page = rig.get("/jobs", order=order, limit=2, **after)
            seen += ids(page)
        assert seen == expected


def test_search_takes_parts_of_names_and_beginnings_of_ids(any_rig: ServiceHarness) -> None:
    rig = any_rig
    made = [rig.submit(name=name) for name in ("Base-100%", "base_2", "other")]
    assert ids(rig.get("/jobs", search="BASE")) == [made[1], made[0]]
    assert ids(rig.get("/jobs", search="%")) == [made[0]]
    assert ids(rig.get("/jobs", search="_")) == [made[1]]
    assert ids(rig.get("/jobs", search=made[2])) == ids(rig.get("/jobs", search=made[2][:8])) == [made[2]]
    assert ids(rig.get("/jobs", search=made[2][1:])) == []
    assert ids(rig.get("/jobs", search="base", limit=1, after=made[1])) == [made[0]]


@pytest.mark.parametrize(
    "params",
    [
        {"limit": 0},
        {"limit": 101},
        {"limit": 2**63},
        {"limit": -(2**63)},
        {"limit": "x"},
        {"limit": "NaN"},
        {"status": "dancing"},
        {"order": "random"},
        {"label": "nothing"},
        {"label": "a\0=b"},
        {"name": "a\0b"},
        {"name": "x" * 301},
        {"after": "job_aaaaaaaaaa"},
        {"after": "a\0b"},
        {"after": "1 OR 1=1"},
    ],
)
def test_bad_questions_are_422(any_rig: ServiceHarness, params: dict[str, Any]) -> None:
    answer = any_rig.client.get("/jobs", params=params)
    assert answer.status_code == 422
    body = answer.json()
    assert body["code"] == "invalid_request"
    assert body["errors"][0]["pointer"].startswith("/query/")


@pytest.mark.parametrize("what", ["events", "samples", "checkpoints", "attempts"])
def test_pages_of_what_belongs_to_a_job(any_rig: ServiceHarness, what: str) -> None:
    rig = any_rig
    job_id, attempt = rig.running()
    for step in (1, 2, 3):
        rig.checkpoint(job_id, attempt, step)
        attempt.say("sample", step=step, prompt="p", text=f"t{step}")
    rig.exit(attempt, "crashed", Reason.HUNG, step=3)
    for number in (2, 3):
        rig.post_action(job_id, "resume")
        rig.exit(rig.next_attempt(job_id, number, start_step=3), "crashed", Reason.HUNG, step=3)
    whole = rig.get(f"/jobs/{job_id}/{what}")
    assert whole["object"] == "list"
    assert whole["has_more"] is False
    assert len(whole["data"]) >= 3
    seen: list[Any] = []
    page: dict[str, Any] = {"has_more": True}
    while page["has_more"]:
        page = rig.get(f"/jobs/{job_id}/{what}", limit=1, **({"after": seen[-1]["id"]} if seen else {}))
        seen += page["data"]
    assert seen == whole["data"]
    for after in ("x", "-1", "9" * 30, "a\0", "²"):
        assert rig.client.get(f"/jobs/{job_id}/{what}", params={"after": after}).status_code == 422


def test_attempts_show_no_secret(rig: ServiceHarness) -> None:
    job_id, attempt = rig.running()
    text = rig.client.get(f"/jobs/{job_id}/attempts").text
    assert attempt.launch.token not in text
    assert "token" not in text


def test_devices_and_status_pages(any_rig: ServiceHarness) -> None:
    job_id, attempt = any_rig.running()
    devices = any_rig.get("/devices")["data"]
    assert [(d["id"], d["kind"], d["job_id"], d["attempt_id"]) for d in devices] == [
        ("cpu:0", "cpu", job_id, attempt.launch.attempt_id),
        ("cpu:1", "cpu", None, None),
    ]
    assert any_rig.get("/health") == {"status": "ok"}
    version = any_rig.get("/version")
    assert (version["name"], version["api"]) == ("trainyard", 1)
    text = any_rig.client.get("/metrics").text
    assert 'trainyard_jobs{status="running"} 1' in text
    assert "trainyard_devices_leased 1" in text
    assert any_rig.get("/ready", expect=503)["code"] == "not_ready", "no scheduler runs in this test"


def test_the_page_holds_no_name_at_all(rig: ServiceHarness) -> None:
    rig.submit(name="<b>alert</b>")
    page = rig.client.get("/", headers={"Accept": "text/html"}).text
    assert page.startswith("<!doctype html>")
    # Names come by the API, and tests/browser sees them shown as text.
    assert "alert" not in page


def test_the_document_describes_every_route(rig: ServiceHarness) -> None:
    document = rig.get("/openapi.json")
    described = {(method.upper(), path) for path, methods in document["paths"].items() for method in methods}
    # The tools for agents describe themselves by their own protocol.
    left_out = {("GET", "/openapi.json"), ("POST", "/mcp")}
    # The document has no converters, such as that of a name with slashes.
    routes = {(method, path.replace(":path}", "}")) for (method, path), need in NEEDS.items() if need != ATTEMPT}
    assert described == routes - left_out
    assert "learning_rate" in document["components"]["schemas"]["TrainingSpec"]["properties"]
    assert "summary" in document["components"]["schemas"]["Job"]["properties"]


def test_places_in_the_queue_are_the_same_one_by_one_and_in_a_list(any_rig: ServiceHarness) -> None:
    """Also of jobs that were queued at the same moment: the older one goes first."""
    priorities = [0, 5, 0, -3, 5, 0, 7]
    ids = [any_rig.submit(resources={"priority": priority}) for priority in priorities]
    with any_rig.database.write() as session:
        moment = session.scalars(select(JobRow.queued_at).where(JobRow.id == ids[0])).one()
        session.execute(update(JobRow).where(JobRow.id.in_(ids[:3])).values(queued_at=moment))
    order = sorted(range(len(ids)), key=lambda n: (-priorities[n], n))
    wanted = {ids[n]: place for place, n in enumerate(order, start=1)}
    assert {job_id: any_rig.job(job_id)["queue"]["position"] for job_id in ids} == wanted
    assert {job["id"]: job["queue"]["position"] for job in any_rig.get("/jobs")["data"]} == wanted
    any_rig.post_action(ids[6], "cancel")
    assert any_rig.job(ids[1])["queue"]["position"] == 1
    assert any_rig.job(ids[6])["queue"] is None


def test_group_and_discarded_filter_jobs(any_rig: ServiceHarness) -> None:
    rig = any_rig
    made = [rig.submit(name=f"n{i}", group="sweep" if i else None, description="why") for i in range(3)]
    assert [(job["group"], job["description"], job["discarded"]) for job in rig.get("/jobs")["data"]] == [
        ("sweep", "why", False),
        ("sweep", "why", False),
        (None, "why", False),
    ]
    assert ids(rig.get("/jobs", group="sweep")) == [made[2], made[1]]
    assert ids(rig.get("/jobs", group="other")) == []
    change = {"discarded": True, "description": "x" * 10_000, "group": "done"}
    changed = rig.client.patch(f"/jobs/{made[1]}", json=change)
    assert changed.status_code == 200, changed.text
    assert {name: changed.json()[name] for name in change} == change
    assert (changed.json()["spec"]["group"], changed.json()["status"]) == ("done", "queued")
    assert ids(rig.get("/jobs")) == [made[2], made[0]]
    assert ids(rig.get("/jobs", discarded="true")) == ids(rig.get("/jobs", discarded="true", group="done")) == [made[1]]
    assert rig.job(made[1])["discarded"]
    rig.client.patch(f"/jobs/{made[1]}", json={"discarded": False, "group": None})
    assert ids(rig.get("/jobs")) == list(reversed(made))
    assert rig.job(made[1])["group"] is None


@pytest.mark.parametrize(
    ("change", "pointer"),
    [
        ({"description": "x" * 10_001}, "/description"),
        ({"description": "a\0b"}, "/description"),
        ({"group": ""}, "/group"),
        ({"group": "a\nb"}, "/group"),
        ({"discarded": 1}, "/discarded"),
        ({"discarded": None}, "/discarded"),
    ],
)
def test_a_bad_change_of_what_ranks_a_job_is_422(rig: ServiceHarness, change: dict[str, Any], pointer: str) -> None:
    job_id = rig.submit()
    answer = rig.client.patch(f"/jobs/{job_id}", json=change)
    assert (answer.status_code, answer.json()["errors"][0]["pointer"]) == (422, pointer)
    assert rig.job(job_id)["discarded"] is False


def scored(rig: ServiceHarness, scores: list[float | None], **groups: Any) -> list[str]:
    made = [rig.submit(**groups) for _ in scores]
    with rig.database.write() as session:
        for job_id, score in zip(made, scores, strict=True):
            if score is not None:
                values = {"score": score, "score_metric": "loss", "score_step": 1}
                session.execute(update(JobRow).where(JobRow.id == job_id).values(values))
    return made


@pytest.mark.parametrize("limit", [1, 2, 3, 100])
def test_jobs_by_score_come_in_pages_with_those_without_one_last(any_rig: ServiceHarness, limit: int) -> None:
    made = scored(any_rig, [2.0, None, 1.0, 3.0, None, 1.0])
    for order, expected in (("score", (2, 5, 0, 3, 4, 1)), ("-score", (3, 0, 5, 2, 4, 1))):
        seen: list[str] = []
        page: dict[str, Any] = {"has_more": True}
        while page["has_more"]:
            after: dict[str, Any] = {"after": seen[-1]} if seen else {}
            page = any_rig.get("/jobs", order=order, limit=limit, **after)
            seen += ids(page)
        assert seen == [made[index] for index in expected]


@pytest.mark.parametrize("params", [{}, {"order": "score"}, {"group": "g"}, {"group": "g", "order": "-score"}], ids=str)
def test_a_list_of_many_jobs_is_read_by_an_index(any_rig: ServiceHarness, params: dict[str, Any]) -> None:
    """No query of a page reads or sorts all jobs, however many there are."""
    rig = any_rig
    scored(rig, [1.0], group="g")
    columns = [column.name for column in JobRow.__table__.c if column.name not in ("number", "id", "discarded")]
    doubled = ", ".join(f'"{name}"' for name in columns)
    for power in range(13):
        with rig.database.write() as session:
            session.execute(
                text(
                    f"INSERT INTO jobs (id, discarded, {doubled}) "
                    f"SELECT CAST(number + {2**power} AS VARCHAR(40)), number % 2 = 0, {doubled} FROM jobs"
                )
            )
    with rig.database.write() as session:
        session.execute(text("ANALYZE"))
    statements: list[tuple[str, Any]] = []
    listen = (rig.database.engine, "before_cursor_execute")
    heard = event.listens_for(*listen)(lambda _c, _k, statement, values, *_: statements.append((statement, values)))
    try:
        assert len(rig.get("/jobs", limit=20, **params)["data"]) == 20
    finally:
        event.remove(*listen, heard)
    pages = [(statement, values) for statement, values in statements if "FROM jobs LEFT OUTER JOIN" in statement]
    assert pages
    explain = "EXPLAIN QUERY PLAN " if rig.database.engine.dialect.name == "sqlite" else "EXPLAIN "
    with rig.database.connection() as connection:
        for statement, values in pages:
            plan = str(connection.exec_driver_sql(explain + statement, values).all())
            assert "TEMP B-TREE" not in plan, plan
            assert "SCAN jobs" not in plan or "USING" in plan, plan
            assert "Seq Scan on jobs" not in plan, plan
            assert "Sort Key" not in plan, plan
