"""A service that does not schedule reports the same positions, waiting reasons and devices as the leader."""

from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from tests.fakes.inventory import FixedInventory
from tests.fakes.launcher import FakeLauncher
from tests.service.harness import URL
from tests.service.test_plan import gpus
from trainyard.service.api.dependencies import AppState
from trainyard.service.app import build_state, create_app
from trainyard.service.db.engine import Database
from trainyard.service.db.models import SchedulerLeaseRow
from trainyard.service.devices.inventory import Device, cpu_slots
from trainyard.service.leadership import LEASE_SECONDS
from trainyard.service.scheduler.published_inventory import (
    MEMORY_SECONDS,
    InventorySnapshot,
    PublishedInventory,
    PublishTracker,
)
from trainyard.service.scheduler.queue_preview import NO_JOBS, STARTS_NEXT, QueuePreview
from trainyard.service.settings import Settings


class Clock:
    """Monotonic, and goes only when told."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Pair:
    """A service that schedules two CPU slots and a GPU, when it is told to; and one on a host that has neither."""

    def __init__(self, home: Path, url: str, preemption: str = "off") -> None:
        settings = Settings.read({"TRAINYARD_PREEMPTION": preemption}, home=home, database_url=url)
        devices = FixedInventory((*gpus(1), *cpu_slots(2)))
        self.launcher = FakeLauncher()
        self.leader = build_state(settings, self.launcher, devices)
        self.replica = build_state(settings, FakeLauncher(), FixedInventory(()), schedules=False)
        self.corpus = home / "corpus.jsonl"
        self.corpus.write_text('{"text": "one"}\n')
        self.clients = [self._client(services) for services in (self.leader, self.replica)]

    def _client(self, services: AppState) -> TestClient:
        client = TestClient(create_app(services, scheduling=False), base_url=URL)
        client.__enter__()
        return client

    def round(self) -> None:
        assert self.leader.scheduler._renew_lease()
        self.leader.scheduler.reconcile_until_stable()

    def submit(self, client: int = 1, **resources: Any) -> str:
        body = {"data": {"data_path": str(self.corpus)}, "resources": {"device": "cpu", **resources}}
        answer = self.clients[client].post("/jobs", json=body)
        assert answer.status_code == 201, answer.text
        return str(answer.json()["id"])

    def queue(self, job_id: str) -> list[dict[str, Any] | None]:
        """What each of the two says."""
        for services in (self.leader, self.replica):
            services.scheduler._preview._loaded_at = float("-inf")
        return [client.get(f"/jobs/{job_id}").json()["queue"] for client in self.clients]

    def close(self) -> None:
        for client in self.clients:
            client.__exit__(None, None, None)


@pytest.fixture
def pair(tmp_path: Path, any_url: str) -> Iterator[Pair]:
    made = Pair(tmp_path, any_url)
    yield made
    made.close()


def test_both_say_the_same(pair: Pair) -> None:
    pair.round()
    running = pair.submit(nproc_per_node=2)
    pair.round()
    assert pair.launcher.starts[0].job_id == running
    waiting = pair.submit(nproc_per_node=2)
    urgent = pair.submit(priority=7)
    named = pair.submit(device="cuda:0")
    behind = pair.submit(device="cuda:0")
    pair.round()
    expected = {
        urgent: {"position": 1, "waiting_for": "1 CPU slot; 0 of 2 free"},
        waiting: {"position": 2, "waiting_for": "2 CPU slots; 0 of 2 free"},
        behind: {"position": 3, "waiting_for": f"cuda:0, which {named} has"},
    }
    for job_id, said in expected.items():
        assert pair.queue(job_id) == [said, said]
    listed = pair.clients[1].get("/jobs", params={"status": "queued"}).json()["data"]
    assert {job["id"]: job["queue"] for job in listed} == expected
    assert f"Waiting for cuda:0, which {named} has. Position 3." in {job["summary"] for job in listed}


def test_a_job_that_fits_says_so_before_the_next_round(pair: Pair) -> None:
    pair.round()
    job_id = pair.submit()
    assert pair.queue(job_id)[1] == {"position": 1, "waiting_for": STARTS_NEXT}


def test_a_replica_knows_the_devices_of_the_one_that_schedules(pair: Pair) -> None:
    before = pair.clients[1].get("/devices").json()["data"]
    assert before == [], "its own, until anybody has said otherwise"
    pair.round()
    pair.replica.inventory._read_at = float("-inf")  # type: ignore[attr-defined] # as if a second had passed
    shown = [client.get("/devices").json() for client in pair.clients]
    assert shown[0] == shown[1]
    assert [device["id"] for device in shown[1]["data"]] == ["cuda:0", "cpu:0", "cpu:1"]
    job_id = pair.submit(device="auto")
    assert pair.clients[1].get(f"/jobs/{job_id}").json()["alerts"] == [], "there is a GPU, elsewhere"


def test_without_a_leader_jobs_wait_for_one(pair: Pair) -> None:
    job_id = pair.submit(client=0)
    assert pair.queue(job_id)[1] == {"position": 1, "waiting_for": NO_JOBS}
    pair.round()
    pair.submit()
    pair.leader.scheduler._release_lease()
    waiting = pair.submit(nproc_per_node=2)
    assert pair.queue(waiting)[1] == {"position": 2, "waiting_for": NO_JOBS}


def test_a_leader_that_does_not_renew_its_lease_does_not_count(pair: Pair) -> None:
    clock = Clock()
    outlook = QueuePreview(pair.replica.database, lambda: datetime.now(UTC), clock)
    pair.round()
    running = pair.submit(nproc_per_node=2)
    pair.round()
    job_id = pair.submit()
    with pair.leader.database.write() as session:
        row = session.get(SchedulerLeaseRow, 1)
        assert row is not None
        row.holder = row.holder.replace('"boot_id": "', '"boot_id": "elsewhere ')  # type: ignore[union-attr]
    assert outlook.waiting() == {job_id: "1 CPU slot; 0 of 2 free"}
    clock.now += LEASE_SECONDS + 1
    assert outlook.waiting() == {job_id: NO_JOBS}
    with pair.leader.database.write() as session:
        row = session.get(SchedulerLeaseRow, 1)
        assert row is not None
        row.beat += 1
    clock.now += 1.5
    assert outlook.waiting() == {job_id: "1 CPU slot; 0 of 2 free"}
    assert running not in outlook.waiting()


def test_many_requests_cost_one_read_a_second(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    outlook = QueuePreview(pair.replica.database, lambda: datetime.now(UTC), clock)
    looks: list[object] = []

    def foresee(session: object) -> dict[str, str]:
        looks.append(session)
        return {}

    monkeypatch.setattr(outlook, "_load_waiting", foresee)
    for _ in range(50):
        outlook.waiting()
    clock.now += 1.5
    outlook.waiting()
    assert len(looks) == 2


def test_room_that_is_made_is_load_waitingn(tmp_path: Path, sqlite_url: str) -> None:
    pair = Pair(tmp_path, sqlite_url, "on")
    pair.round()
    low = pair.submit(nproc_per_node=2)
    pair.round()
    front = pair.submit(priority=5)
    with pair.leader.database.write() as session:
        from trainyard.service.db.models import AttemptRow, JobRow

        session.query(JobRow).filter_by(id=low).update({"status": "running", "progress": {"step": 3}})
        session.query(AttemptRow).filter_by(job_id=low).update({"start_step": 0})
    assert pair.queue(front)[1] == {"position": 1, "waiting_for": f"1 CPU slot; 0 of 2 free; {low} makes room"}
    pair.close()


def published(**fields: Any) -> InventorySnapshot:
    card = Device("cuda:0", "cuda", "H100", 80, 10, (5, 6), (6,))
    return InventorySnapshot((replace(card, **fields), *cpu_slots(1)), True)


def test_an_inventory_survives_its_row() -> None:
    row = SchedulerLeaseRow(id=1, epoch=1, beat=1)
    assert InventorySnapshot.of(None) is None
    assert InventorySnapshot.of(row) is None
    row.offer = {"preempts": True, "devices": [{**vars(device)} for device in published().devices]}
    assert InventorySnapshot.of(row) == published()


@pytest.mark.parametrize(
    "said", [{}, {"devices": []}, {"preempts": True, "devices": [{"id": "cuda:0"}]}, {"devices": 3}]
)
def test_an_unknown_inventory_format_is_ignored(said: dict[str, Any]) -> None:
    assert InventorySnapshot.of(SchedulerLeaseRow(id=1, epoch=1, beat=1, offer=said)) is None


def test_what_changes_all_the_time_is_not_news_each_second() -> None:
    clock = Clock()
    news = PublishTracker(clock)
    assert news.differs(published())
    news.mark_published(published())
    assert not news.differs(published())
    assert not news.differs(published(memory_used_bytes=11))
    assert not news.differs(published(temperature_celsius=70))
    assert news.differs(published(processes=(5,)))
    clock.now += MEMORY_SECONDS + 1
    assert not news.differs(published())
    assert news.differs(published(memory_used_bytes=11))
    news.forget()
    assert news.differs(published())


def test_own_devices_until_an_inventory_is_published(sqlite_url: str) -> None:
    clock = Clock()
    database = Database(sqlite_url)
    inventory = PublishedInventory(database, FixedInventory(cpu_slots(3)), clock)
    assert len(inventory.devices()) == 3
    with database.write() as session:
        session.add(SchedulerLeaseRow(id=1, epoch=1, beat=1))
        session.flush()
        published().write(session)
    assert len(inventory.devices()) == 3, "read once a second"
    clock.now += 1.5
    assert inventory.devices() == published().devices
    database.close()
