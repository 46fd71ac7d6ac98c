"""/ready, /status and /metrics: each failure is reported by component, while the rest still works."""

import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import text
from sqlalchemy.exc import OperationalError

from tests.service.conftest import MakeHarness
from tests.service.harness import ServiceHarness
from trainyard.service.api.readiness import MAX_ROUND_SECONDS, MAX_TAKEOVER_SECONDS, check_components
from trainyard.service.db.engine import newest_revision
from trainyard.service.db.models import SchedulerLeaseRow
from trainyard.service.leadership import LeaderMonitor
from trainyard.service.maintenance.disk_monitor import Disk, DiskReading, DiskState

GIB = 1 << 30
PROMTOOL = shutil.which("promtool")


@pytest.fixture
def live(rig: ServiceHarness, monkeypatch: pytest.MonkeyPatch) -> ServiceHarness:
    """A rig whose scheduler counts as running."""
    monkeypatch.setattr(type(rig.scheduler), "alive", property(lambda _: True))
    return rig


def told(rig: ServiceHarness, expect: int) -> dict[str, tuple[bool, str]]:
    """The parts of /ready by name."""
    found = rig.get("/ready", expect=expect)["parts"]
    return {part["name"]: (part["ok"], part["detail"]) for part in found}


def test_all_is_well(live: ServiceHarness, monkeypatch: pytest.MonkeyPatch) -> None:
    see(live, monkeypatch, disk(DiskState.OK))
    answer = live.get("/ready")
    assert answer["status"] == "ok"
    assert [part["name"] for part in answer["parts"]] == ["database", "migrations", "scheduler", "disk"]
    assert all(part["ok"] for part in answer["parts"])
    assert told(live, 200)["migrations"] == (True, f"at {newest_revision()}")
    assert live.get("/status")["ready"] is True


def test_no_scheduler(rig: ServiceHarness) -> None:
    answer = rig.client.get("/ready")
    body = answer.json()
    assert (answer.status_code, body["code"], answer.headers["retry-after"]) == (503, "not_ready", "1")
    assert body["detail"] == "Not ready. scheduler: does not run."
    assert told(rig, 503)["database"] == (True, "answers")


def test_a_service_that_waits_for_its_runs_takes_no_more_work(live: ServiceHarness) -> None:
    """They save and end, and keep their place: it starts nothing, and its successor continues with the same job."""
    running, attempt = live.running()
    live.scheduler.stop_launching()
    assert told(live, 503)["scheduler"] == (False, "the service is stopping: its runs save first")
    waiting = live.submit()
    live.exit(attempt, "stopped", step=7)
    live.reconcile()
    assert [live.status(job) for job in (running, waiting)] == ["queued", "queued"]
    job = live.job(running)
    assert (job["reason"], job["progress"]["step"]) == ("terminated", 7)
    assert job["message"] == "stopped at step 7, because the service stops; it resumes when the service starts"
    after = live.restart()
    after.reconcile()
    assert after.status(running) == "starting"
    assert after.data(running, "attempts")[-1]["trigger"] == "restart"
    after.close()


def test_a_scheduler_that_hangs(live: ServiceHarness, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(live.scheduler), "seconds_since_round", property(lambda _: MAX_ROUND_SECONDS + 1))
    assert told(live, 503)["scheduler"] == (False, "has not finished a round for 61 s")


def test_the_database_is_away(live: ServiceHarness, monkeypatch: pytest.MonkeyPatch) -> None:
    def away() -> None:
        raise OperationalError("SELECT 1", {}, Exception("gone, and this is the secret address"))

    see(live, monkeypatch, disk(DiskState.OK))
    monkeypatch.setattr(live.database, "read", away)
    monkeypatch.setattr(live.scheduler, "_enabled", False)
    answer = live.client.get("/ready")
    assert (answer.status_code, answer.json()["code"]) == (503, "database_unavailable")
    assert told(live, 503) == {
        "database": (False, "does not answer: OperationalError"),
        "scheduler": (False, "unknown while the database is unavailable"),
        "disk": (True, "has room"),
    }
    assert "secret" not in answer.text
    assert live.get("/status")["ready"] is False
    metrics = live.client.get("/metrics")
    assert metrics.status_code == 200, "an alert on the outage needs what is still known"
    assert "trainyard_database_up 0" in metrics.text
    assert "trainyard_request_seconds_bucket" in metrics.text
    assert "trainyard_jobs" not in metrics.text


@pytest.mark.parametrize("replaced", [False, True])
def test_a_home_that_is_deleted_under_the_service_takes_no_jobs(
    live: ServiceHarness, monkeypatch: pytest.MonkeyPatch, replaced: bool
) -> None:
    """SQLite would go on writing to the file that has no name any more, and all of it would be lost."""
    see(live, monkeypatch, disk(DiskState.OK))
    job_id = live.submit()
    file = Path(live.url.removeprefix("sqlite:///"))
    aside = file.with_name("aside.db")
    file.rename(aside)
    if replaced:
        file.touch()
    assert told(live, 503)["database"] == (False, "its file was removed or replaced")
    refused = live.client.post("/jobs", json=live.spec())
    assert (refused.status_code, refused.json()["code"]) == (503, "database_unavailable")
    assert "removed or replaced" in refused.json()["detail"]
    aside.rename(file)
    assert told(live, 200)["database"] == (True, "answers")
    assert [job["id"] for job in live.get("/jobs")["data"]] == [job_id]


def test_tables_of_another_release(any_rig: ServiceHarness) -> None:
    with any_rig.database.write() as session:
        session.execute(text("UPDATE alembic_version SET version_num = 'v0001'"))
    try:
        found = told(any_rig, 503)["migrations"]
        assert found == (False, f"the tables are at v0001, this release needs {newest_revision()}")
    finally:
        with any_rig.database.write() as session:
            session.execute(text("UPDATE alembic_version SET version_num = :v"), {"v": newest_revision()})


def test_no_tables_at_all(make_rig: MakeHarness, tmp_path: Path) -> None:
    rig = make_rig(f"sqlite:///{tmp_path}/other.db")
    with rig.database.write() as session:
        session.execute(text("DROP TABLE alembic_version"))
    assert told(rig, 503)["migrations"][1].startswith("the tables are at nothing")
    assert told(rig, 503)["database"][0] is True
    rig.close()


def replica(
    rig: ServiceHarness, monkeypatch: pytest.MonkeyPatch, silence: Callable[[Any], float]
) -> dict[str, tuple[bool, str]]:
    monkeypatch.setattr(rig.scheduler, "_enabled", False)
    services = rig.app.state.app_state
    monkeypatch.setattr(services.leader, "seconds_since_renewal", silence)
    return {part.name: (part.ok, part.detail) for part in check_components(services)}


def test_a_replica_hears_whether_somebody_schedules(any_rig: ServiceHarness, monkeypatch: pytest.MonkeyPatch) -> None:
    assert replica(any_rig, monkeypatch, lambda _: 1.0)["scheduler"] == (True, "is about to begin")
    with any_rig.database.write() as session:
        session.add(SchedulerLeaseRow(id=1, epoch=1, beat=1, holder="{}"))
    assert replica(any_rig, monkeypatch, lambda _: 1.0)["scheduler"] == (True, "runs in another service")
    found = replica(any_rig, monkeypatch, lambda _: MAX_TAKEOVER_SECONDS + 1)["scheduler"]
    assert found == (False, "no service has renewed the scheduler lease for 16 s")


def test_the_leader_is_watched_by_its_counting() -> None:
    now = [100.0]
    watch = LeaderMonitor(lambda: now[0])
    row = SchedulerLeaseRow(id=1, epoch=1, beat=1, holder="{}")
    now[0] = 103.0
    assert watch.seconds_since_renewal(None) == 3.0, "since we began to look"
    assert watch.seconds_since_renewal(row) == 0.0
    now[0] = 110.0
    assert watch.seconds_since_renewal(row) == 7.0
    row.beat = 2
    assert watch.seconds_since_renewal(row) == 0.0
    now[0], row.holder, row.beat = 115.0, None, 3
    assert watch.seconds_since_renewal(row) == 5.0, "nobody holds it since"
    row.epoch, row.beat, row.holder = 2, 2, "{}"
    assert watch.seconds_since_renewal(row) == 0.0


def disk(state: DiskState, free: int = 1 * GIB) -> Disk:
    return Disk((Path("/somewhere/secret"),), ("home",), DiskReading(100 * GIB, free), 5 * GIB, state)


def see(rig: ServiceHarness, monkeypatch: pytest.MonkeyPatch, *disks: Disk) -> None:
    watch = rig.app.state.app_state.disks
    watch.poll()
    monkeypatch.setattr(watch, "_latest", disks)


@pytest.mark.parametrize(
    ("state", "status"), [(DiskState.OK, 200), (DiskState.LOW, 200), (DiskState.FULL, 503), (DiskState.UNREADABLE, 503)]
)
def test_a_low_disk_is_told_and_a_full_one_takes_no_work(
    live: ServiceHarness, monkeypatch: pytest.MonkeyPatch, state: DiskState, status: int
) -> None:
    see(live, monkeypatch, disk(state))
    ok, detail = told(live, status)["disk"]
    assert ok is (status == 200)
    assert ("home" in detail) is (state is not DiskState.OK)
    assert "secret" not in live.client.get("/ready").text, "it asks for no token"
    (shown,) = live.get("/status")["disks"]
    assert (shown["id"], shown["state"], shown["paths"]) == ("home", state, ["/somewhere/secret"])
    assert shown["free_bytes"] == (None if state is DiskState.UNREADABLE else 1 * GIB)
    text = live.client.get("/metrics").text
    assert f'trainyard_disk_low{{disk="home"}} {int(state is not DiskState.OK)}' in text
    assert ('trainyard_disk_free_bytes{disk="home"} 1.073741824e+09' in text) is (state is not DiskState.UNREADABLE)


def test_a_disk_that_hangs(live: ServiceHarness, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(live.app.state.app_state.disks), "stale", property(lambda _: True))
    assert told(live, 503)["disk"] == (False, "a disk does not answer")


def test_status_needs_a_token_and_ready_does_not(make_rig: MakeHarness, sqlite_url: str) -> None:
    rig = make_rig(sqlite_url, token="sesame")
    assert rig.client.get("/status").status_code == 401
    assert "parts" in rig.client.get("/ready").json()
    rig.close()


@pytest.mark.skipif(PROMTOOL is None, reason="promtool is not installed")
def test_promtool_has_nothing_to_say_against_the_metrics(
    any_rig: ServiceHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert PROMTOOL is not None
    rig = any_rig
    see(rig, monkeypatch, disk(DiskState.LOW), replace(disk(DiskState.UNREADABLE), holds=("save",)))
    job_id, attempt = rig.running()
    attempt.metric(1)
    rig.ship(attempt)
    _, failed = rig.running()
    rig.exit(failed, "completed", step=1)
    rig.get(f"/jobs/{job_id}")
    rig.client.request("BREW", "/nowhere")
    found = rig.client.get("/metrics").text
    for name in (
        "queue_length",
        "devices_leased",
        "attempts_live",
        "ingest_lag_seconds",
        "request_seconds",
        "disk_low",
    ):
        assert f"trainyard_{name}" in found
    checked = subprocess.run([PROMTOOL, "check", "metrics"], input=found, capture_output=True, text=True, timeout=60)
    assert (checked.returncode, checked.stdout + checked.stderr) == (0, "")
