"""What a request costs, counted in statements: each is a round trip, and more of a request than anything else."""

import contextlib
import json
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
from sqlalchemy import event, text

from tests.faults.service_home import until
from tests.service.conftest import MakeHarness
from tests.service.harness import ServiceHarness
from trainyard.contract.spec import JobSpec
from trainyard.contract.status import JobStatus
from trainyard.service.auth.principal import LOCAL
from trainyard.service.clock import utc_now
from trainyard.service.db.engine import APPLICATION, Database
from trainyard.service.devices.inventory import cpu_slots
from trainyard.service.jobs import queries, repository
from trainyard.service.scheduler import loop
from trainyard.service.scheduler.loop import Scheduler


@contextlib.contextmanager
def statements(rig: ServiceHarness) -> Iterator[list[str]]:
    """What is said to the database meanwhile, the beginning and end of transactions left out."""
    said: list[str] = []

    def hear(_connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
        if not statement.startswith("BEGIN"):
            said.append(statement)

    event.listen(rig.database.engine, "before_cursor_execute", hear)
    try:
        yield said
    finally:
        event.remove(rig.database.engine, "before_cursor_execute", hear)


def without_version(said: list[str]) -> list[str]:
    """Without the question whether anything has changed, which Postgres is asked once for all readers that wait."""
    versions = [statement for statement in said if "txid_current_snapshot" in statement]
    assert len(versions) <= 1
    return [statement for statement in said if statement not in versions]


def test_a_job_is_read_by_two_statements(any_rig: ServiceHarness) -> None:
    queued = any_rig.submit()
    running, attempt = any_rig.running()
    any_rig.checkpoint(running, attempt, 5)
    any_rig.ship(attempt)
    for job_id in (queued, running):
        with statements(any_rig) as said:
            assert any_rig.job(job_id)["id"] == job_id
        assert len(without_version(said)) <= 2, said
    assert any_rig.job(running)["checkpoint"]["step"] == 5


def test_a_page_is_read_by_three_however_long_it_is(any_rig: ServiceHarness) -> None:
    any_rig.running()
    for _ in range(5):
        any_rig.submit()
    for limit in (2, 6):
        with statements(any_rig) as said:
            assert len(any_rig.get("/jobs", limit=limit, order="oldest")["data"]) == limit
        assert len(without_version(said)) <= 3, said


def test_a_thousand_lines_are_stored_by_as_many_statements_as_ten(any_rig: ServiceHarness) -> None:
    counts = []
    for lines in (10, 1000):
        job_id, attempt = any_rig.running(steps=2000)
        for step in range(1, lines + 1):
            attempt.metric(step)
        with statements(any_rig) as said:
            any_rig.ship(attempt)
        assert len(any_rig.data(job_id, "metrics", limit=2000)) == lines
        counts.append(len(said))
    assert counts[0] == counts[1]


def test_a_thousand_jobs_are_listed_and_scheduled_by_as_many_statements_as_ten(any_rig: ServiceHarness) -> None:
    first = any_rig.submit(labels={"a": "b"})
    works = (
        lambda: any_rig.get("/jobs", limit=5),
        lambda: any_rig.get("/jobs", limit=5, label="a=b"),
        any_rig.scheduler.reconcile,
    )
    counts = []
    for more in (9, 990):
        with any_rig.database.write() as session:
            spec = JobSpec.model_validate_json(json.dumps(repository.find(session, first).spec))
            for _ in range(more):
                repository.create(session, spec, {}, [], LOCAL, utc_now())
        any_rig.scheduler.reconcile()  # starts what has a device
        for work in works:
            with statements(any_rig) as said:
                work()
            counts.append(len(said))
    assert counts[:3] == counts[3:]


def test_a_submission_is_one_transaction(any_rig: ServiceHarness) -> None:
    any_rig.submit()
    begun: list[Any] = []
    event.listen(any_rig.database.engine, "begin", lambda connection: begun.append(connection))
    with statements(any_rig) as said:
        any_rig.submit()
    assert len(begun) == 1
    # The job, its event, the webhooks that want it, its corpus, and the job with its place in the queue for the answer.
    assert len(said) <= 6, said


@pytest.mark.parametrize("verb", ["pause", "cancel", "kill"])
def test_what_a_verb_shows_is_what_it_has_committed(any_rig: ServiceHarness, verb: str) -> None:
    job_id = any_rig.submit(labels={"a": "b"})
    shown = any_rig.post_action(job_id, verb)
    assert shown == any_rig.job(job_id)
    assert shown["status"] == ("paused" if verb == "pause" else "cancelled")


def test_what_a_submission_shows_is_what_it_has_committed(any_rig: ServiceHarness) -> None:
    any_rig.submit()
    answer = any_rig.client.post("/jobs", json=any_rig.spec(name="second", labels={"k": "v"}))
    assert answer.json() == any_rig.job(answer.json()["id"])
    assert answer.json()["queue"]["position"] == 2


def test_rows_are_shown_as_the_entities_would_be(any_rig: ServiceHarness) -> None:
    """The plain rows have every attribute of the entity, converted alike."""
    job_id, _ = any_rig.running(labels={"a": "b"})
    with any_rig.database.connection() as connection:
        (row,) = queries.job_rows(connection, job_id).jobs
    with any_rig.database.read() as session:
        entity = repository.find(session, job_id)
    names = [attribute.key for attribute in type(entity).__mapper__.column_attrs]
    assert {name: getattr(row, name) for name in names} == {name: getattr(entity, name) for name in names}
    assert row.status == JobStatus.RUNNING


def test_a_burst_of_submissions_is_looked_at_together(
    make_rig: MakeHarness, sqlite_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rounds: list[object] = []
    settle = Scheduler.reconcile_until_stable
    monkeypatch.setattr(Scheduler, "reconcile_until_stable", lambda self: rounds.append(settle(self)))
    monkeypatch.setattr(loop, "PAUSE_SECONDS", 600.0)
    rig = make_rig(sqlite_url, scheduling=True)
    until(lambda: rounds)
    jobs = [rig.submit() for _ in range(5)]
    assert {rig.status(job_id) for job_id in jobs} == {JobStatus.QUEUED}
    rig.close()
    assert len(rounds) == 1, "one look, and then the pause, however many ask for another"
    assert not rig.scheduler._thread.is_alive(), "who is asked to end does not wait for the pause"


def test_a_submission_starts_without_waiting_for_the_next_round(
    make_rig: MakeHarness, sqlite_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "ROUND_SECONDS", 600.0)
    rig = make_rig(sqlite_url, scheduling=True)
    for _ in range(3):
        job_id = rig.submit()
        until(partial(rig.launcher.living, job_id))
        rig.exit(rig.launcher.of(job_id), "completed", step=1)
    rig.close()


def test_only_a_change_that_matters_to_it_wakes_the_scheduler(rig: ServiceHarness) -> None:
    job_id = rig.submit()
    rig.scheduler._wake.clear()
    rig.client.patch(f"/jobs/{job_id}", json={"labels": {"a": "b"}, "name": "other"})
    assert not rig.scheduler._wake.is_set()
    rig.client.patch(f"/jobs/{job_id}", json={"priority": 3})
    assert rig.scheduler._wake.is_set()


def test_attempts_that_run_are_found_again_by_one_look(make_rig: MakeHarness, sqlite_url: str) -> None:
    first = make_rig(sqlite_url, devices=cpu_slots(5))
    jobs = [first.running()[0] for _ in range(4)]
    lost, _ = first.running()
    first.launcher.of(lost).lose_agent()
    second = first.restart()
    second.launcher.looks.clear()
    second.launcher.lookups = 0
    second.scheduler.reconcile()
    assert second.launcher.lookups == 1
    assert {name.job_id for name in second.launcher.looks} == {lost}, "only who was not seen to live is looked up"
    assert {second.status(job_id) for job_id in jobs} == {JobStatus.RUNNING}
    assert second.status(lost) is JobStatus.INTERRUPTED
    second.close()


def test_a_connection_that_the_server_has_closed_is_never_used(make_rig: MakeHarness, migrated_postgres: str) -> None:
    """Nobody asks the server before each request whether it is there: the closed connection itself says so."""
    rig = make_rig(migrated_postgres)
    kept = [rig.database.engine.connect() for _ in range(3)]
    for connection in kept:
        connection.close()
    others = Database(migrated_postgres)
    with others.engine.begin() as connection:
        gone = "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity WHERE application_name = :name AND pid <> "
        ended = connection.execute(text(gone + "pg_backend_pid()"), {"name": APPLICATION}).all()
    assert len(ended) >= 3
    assert [rig.client.get("/jobs").status_code for _ in range(4)] == [200] * 4
    others.close()
    rig.close()
