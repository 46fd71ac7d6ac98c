"""Several services on one database: one schedules, whatever stops, dies or wakes."""

import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx2
import pytest

from tests import soak_report
from tests.faults.conftest import MakeHome
from tests.faults.invariants import check_weights
from tests.faults.service_home import Home, Nursery, until
from tests.service.conftest import any_url, migrated_postgres, migrated_sqlite, postgres_url, sqlite_url
from tests.soak_report import SoakReport
from trainyard.contract.processes import ProcessIdentity
from trainyard.contract.rundir import read_json
from trainyard.service import leadership as leasing
from trainyard.service.db.engine import Database
from trainyard.service.db.models import SchedulerLeaseRow
from trainyard.service.leadership import LEASE_SECONDS, RENEW_SECONDS, LeaderLease, LeadershipLost

__all__ = ["any_url", "migrated_postgres", "migrated_sqlite", "postgres_url", "sqlite_url"]


class Clock:
    """A monotonic clock that is advanced by hand."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Group:
    """Claims of several services, each with its own clock; they are all this process, so that none looks dead."""

    def __init__(self, url: str) -> None:
        self.database = Database(url)
        self.clocks = [Clock(), Clock(), Clock()]
        self.leases = [LeaderLease(self.database, clock) for clock in self.clocks]

    def pass_time(self, seconds: float, *stopped: int) -> None:
        """Half a second at a time; those that are ``stopped`` do nothing, but their clocks continue."""
        for _ in range(int(seconds / 0.5)):
            for number, (clock, lease) in enumerate(zip(self.clocks, self.leases, strict=True)):
                clock.now += 0.5
                if number not in stopped:
                    lease.renew()

    def leading(self) -> list[int]:
        return [number for number, lease in enumerate(self.leases) if lease.epoch is not None]

    def row(self) -> tuple[int, int, str | None]:
        with self.database.read() as session:
            row = session.get(SchedulerLeaseRow, 1)
            assert row is not None
            return row.epoch, row.beat, row.holder


@pytest.fixture
def group(any_url: str) -> Iterator[Group]:
    made = Group(any_url)
    yield made
    made.database.close()


def test_one_leads_for_as_long_as_it_lives(group: Group) -> None:
    group.pass_time(60)
    assert group.leading() == [0]
    epoch, beat, _ = group.row()
    assert epoch == 1
    assert beat == pytest.approx(60 / RENEW_SECONDS, abs=2), "a renewal is a commit to the disk: not at each look"


def test_one_that_is_stopped_is_followed_by_another_and_its_late_write_is_refused(group: Group) -> None:
    group.pass_time(10)
    group.pass_time(LEASE_SECONDS + 1, 0)
    assert group.leading() in ([0, 1], [0, 2])
    assert not group.leases[0].fresh(), "it can know by its own clock that it slept"
    assert group.row()[0] == 2
    with pytest.raises(LeadershipLost), group.database.write() as session:
        group.leases[0].fence(session)
    group.pass_time(30)
    assert len(group.leading()) == 1
    assert group.leading() != [0]
    assert group.row()[0] == 2


def test_a_leader_that_was_stopped_for_less_than_its_lease_goes_on(group: Group) -> None:
    group.pass_time(10)
    group.pass_time(LEASE_SECONDS - RENEW_SECONDS - 1, 0)
    group.pass_time(10)
    assert group.leading() == [0]
    assert group.row()[0] == 1
    with group.database.write() as session:
        group.leases[0].fence(session)


def test_a_leader_whose_step_took_longer_than_its_lease_goes_on_unless_another_took_over(group: Group) -> None:
    """On a busy host each step may. A job was then queued again and again, and an end was never recorded."""
    group.pass_time(10)
    epoch, beat, _ = group.row()
    group.clocks[0].now += 2 * LEASE_SECONDS
    assert not group.leases[0].fresh()
    assert group.leases[0].confirm()
    assert group.leases[0].fresh()
    assert group.row()[:2] == (epoch, beat + 1)
    group.pass_time(LEASE_SECONDS + 1, 0)
    assert not group.leases[0].confirm()
    assert group.row()[0] == epoch + 1, "the new leader keeps the lease"
    group.leases[2 if group.leases[1].epoch is None else 1].release()
    assert not group.leases[0].confirm(), "what it knows is of an earlier epoch, also if the lease is free"
    assert group.row()[2] is None


def test_the_epoch_only_grows(group: Group) -> None:
    seen = []
    for stopped in (0, 1, 2, 0, 1, 2):
        group.pass_time(2 * LEASE_SECONDS + 2, stopped)
        seen.append(group.row()[0])
    assert seen == sorted(seen)
    assert seen[-1] > 2


def test_a_lease_that_was_given_up_is_taken_at_once(group: Group) -> None:
    group.pass_time(1)
    group.leases[0].release()
    assert group.row()[2] is None
    assert group.leases[1].renew()
    group.leases[0].release()
    assert group.leading() == [1], "one who does not lead has nothing to give up"


def test_a_leader_of_this_host_that_is_dead_is_not_waited_for(group: Group) -> None:
    group.pass_time(1)
    child = subprocess.Popen([sys.executable, "-S", "-c", ""])
    child.wait()
    me = ProcessIdentity.of(os.getpid())
    assert me is not None
    dead = {**me.to_json(), "pid": child.pid}
    for holder, taken in ((dead, True), ({**dead, "boot_id": "elsewhere"}, False), ({}, False)):
        with group.database.write() as session:
            row = session.get(SchedulerLeaseRow, 1)
            assert row is not None
            row.holder, row.epoch = json.dumps(holder), row.epoch + 1
        assert LeaderLease(group.database, group.clocks[1]).renew() is taken, holder


def test_two_that_begin_together_are_one_leader(group: Group) -> None:
    assert [lease.renew() for lease in group.leases].count(True) == 1


def test_the_lease_needs_no_clock_that_can_be_set(group: Group, monkeypatch: pytest.MonkeyPatch) -> None:
    group.pass_time(5)
    monkeypatch.setattr(time, "time", lambda: 0.0)
    group.pass_time(20)
    assert group.leading() == [0]
    source = Path(leasing.__file__).read_text()
    assert "datetime" not in source
    assert "time.time" not in source


# Real services on one Postgres.


@pytest.fixture
def servers(make_home: MakeHome, migrated_postgres: str, any_url: str, nursery: Nursery) -> Iterator[list[Home]]:
    """Three services on one home and one database, the first of them leading; the others may."""
    first = make_home(slots=2)
    others = [Home(nursery, first.path, 2, scale=0.1) for _ in range(2)]
    for home in (first, *others):
        home.database_url = any_url
        home.environment["TRAINYARD_DATABASE_URL"] = any_url
    yield [first, *others]
    for home in others:
        home.signal(signal.SIGCONT)
        home.kill()


def start_all(servers: list[Home]) -> None:
    """The first leads; each is asked at its own address."""
    servers[0].start()
    for home in servers[1:]:
        home.service = home.nursery.service(home=str(home.path), environment=home.environment, **home.wanted)


def addresses(home: Home) -> list[str]:
    return [line.split()[-1] for line in home.log().splitlines() if "ready at" in line]


@pytest.mark.long
@pytest.mark.parametrize("any_url", ["postgres"], indirect=True)
def test_a_leader_stopped_and_woken_launches_nothing_twice(servers: list[Home], any_url: str) -> None:
    for server in servers:
        server.wanted["lease_scale"] = 0.25
    start_all(servers)
    first = servers[0]
    until(lambda: len(addresses(first)) == 3)
    before = first.submit(steps="1000000", ranks="1")  # it is killed in the end
    until(lambda: first.step(before) > 3)
    first.signal(signal.SIGSTOP)
    stopped = first.url
    other = next(url for url in addresses(first) if url != stopped)
    job_id = str(httpx2.post(other + "/jobs", json=first.spec(steps="30", ranks="1"), timeout=60).json()["id"])
    until(lambda: first.url != stopped, what="another one leads")
    first.wait(job_id, "succeeded")
    first.signal(signal.SIGCONT)
    until(lambda: httpx2.get(stopped + "/ready", timeout=60).status_code == 200)
    late = str(httpx2.post(stopped + "/jobs", json=first.spec(steps="30", ranks="1"), timeout=60).json()["id"])
    first.wait(late, "succeeded")
    assert first.job(before)["attempt"] == 1, "no run was disturbed"
    assert first.url != stopped
    assert httpx2.post(first.url + f"/jobs/{before}/kill", timeout=60).status_code == 202
    first.wait(before, "cancelled")
    for job in (job_id, late):
        assert first.job(job)["attempt"] == 1
        check_weights(first, job, 30)


def launch_by_a_leader_that_sleeps(servers: list[Home], line: int) -> bool:
    """A leader that is stopped at this line of a launch, for longer than its lease, and woken when it is too late.

    False where the launch has fewer lines.
    """
    home = servers[0]
    for server in servers:
        server.kill()
    lead = home.nursery.service(
        home=str(home.path), environment=home.environment, **{**home.wanted, "stop_at": ["launch", line]}
    )
    assert lead is not None
    home.service = lead
    before = len(addresses(home))
    until(lambda: len(addresses(home)) > before)
    mine = addresses(home)[-1]
    until(lambda: (read_json(home.path / "service.json") or {}).get("url") == mine)
    servers[1].service = home.nursery.service(home=str(home.path), environment=home.environment, **home.wanted)
    until(lambda: len(addresses(home)) > before + 1)
    other = addresses(home)[-1]
    stops = home.log().count("stopped at")
    job_id = str(httpx2.post(other + "/jobs", json=home.spec(steps="20", ranks="1"), timeout=60).json()["id"])
    until(lambda: home.log().count("stopped at") > stops or home.step(job_id) == 20)
    stopped = home.log().count("stopped at") > stops
    if stopped:
        until(lambda: home.url == other, what="the other one leads")
    until(lambda: httpx2.get(f"{other}/jobs/{job_id}", timeout=60).json()["status"] == "succeeded")
    if stopped:
        lead.send(signal.SIGCONT)
        until(lambda: httpx2.get(mine + "/ready", timeout=60).status_code == 200)
        time.sleep(1.0)  # an agent that it launched now would need as long to refuse
    ran = [attempt.number for attempt in home.run(job_id).attempts() if attempt.outbox.exists()]
    assert len(ran) == 1, f"launched twice, after a stop at line {line}"
    check_weights(home, job_id, 20)
    return stopped


@pytest.mark.long
@pytest.mark.parametrize("any_url", ["postgres"], indirect=True)
def test_a_leader_stopped_in_a_launch_and_woken_launches_nothing_twice(servers: list[Home], any_url: str) -> None:
    servers[0].wanted["lease_scale"] = 0.25
    assert launch_by_a_leader_that_sleeps(servers, 40)


@pytest.mark.soak
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("any_url", ["postgres"], indirect=True)
def test_a_leader_stopped_at_each_line_of_a_launch(servers: list[Home], any_url: str, account: SoakReport) -> None:
    servers[0].wanted["lease_scale"] = 0.25
    lines = 0
    while launch_by_a_leader_that_sleeps(servers, lines + 1):
        lines += 1
        account.faults["leader stopped at a line of a launch, and woken past its lease"] += 1
    account.invariants.append(f"each of the {lines} lines: nothing launched twice, no late write")
    assert lines > 40


@pytest.mark.parametrize("any_url", ["postgres"], indirect=True)
def test_a_replica_answers_and_never_schedules(servers: list[Home], any_url: str) -> None:
    replica = servers[0]
    replica.start(ready=False, arguments=["--no-scheduler"])
    until(lambda: addresses(replica))
    url = addresses(replica)[0]
    until(lambda: httpx2.get(url + "/ready", timeout=60).status_code == 200)
    job_id = httpx2.post(url + "/jobs", json=replica.spec(steps="10", ranks="1"), timeout=60).json()["id"]
    time.sleep(2.5)  # rounds that a scheduler would have had
    assert httpx2.get(f"{url}/jobs/{job_id}", timeout=60).json()["status"] == "queued"
    assert read_json(replica.path / "service.json") is None, "agents report to one that schedules"
    scheduling = servers[1]
    scheduling.service = scheduling.nursery.service(
        home=str(scheduling.path), environment=scheduling.environment, **scheduling.wanted
    )
    until(lambda: httpx2.get(f"{url}/jobs/{job_id}", timeout=60).json()["status"] == "succeeded")


def test_who_is_deposed_says_so_and_writes_nothing(group: Group, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "trainyard")
    group.leases[0].renew()
    assert "epoch 1" in caplog.text
    group.leases[1].epoch = 0
    for lease in group.leases[1:]:
        with pytest.raises(LeadershipLost):
            write_late(group, lease)
    assert group.row()[1] == 1


def write_late(group: Group, lease: LeaderLease) -> None:
    with group.database.write() as session:
        row = session.get(SchedulerLeaseRow, 1)
        assert row is not None
        row.beat = 12345
        session.flush()
        lease.fence(session)


def leading(url: str) -> tuple[int, int]:
    """(pid of the one that schedules, epoch)."""
    database = Database(url)
    try:
        with database.read() as session:
            row = session.get(SchedulerLeaseRow, 1)
            assert row is not None
            return int(json.loads(row.holder)["pid"]) if row.holder else 0, row.epoch
    finally:
        database.close()


def followed(url: str, pid: int, epoch: int) -> Callable[[], bool]:
    """Whether another one than ``pid`` leads, in a later epoch."""

    def is_() -> bool:
        now, later = leading(url)
        return later > epoch and now not in (0, pid)

    return is_


@pytest.mark.soak
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("any_url", ["postgres"], indirect=True)
def test_leaders_stopped_and_woken_again_and_again(servers: list[Home], any_url: str, account: SoakReport) -> None:
    for server in servers:
        server.wanted["lease_scale"] = 0.25
    start_all(servers)
    first = servers[0]
    until(lambda: len(addresses(first)) == 3)
    steady = first.submit(steps="1000000", ranks="1")
    done = []
    for _ in range(int(soak_report.chosen("LEADERS", 20))):
        pid, epoch = leading(any_url)
        (leader,) = [server for server in servers if server.service is not None and server.service.pid == pid]
        leader.signal(signal.SIGSTOP)
        began = time.monotonic()
        until(followed(any_url, pid, epoch), what="another one leads")
        account.figure("another one leads after (leases a quarter as long), s", time.monotonic() - began)
        until(first.ready)
        done.append(first.submit(steps="10", ranks="1"))
        first.wait(done[-1], "succeeded")
        leader.signal(signal.SIGCONT)
        account.faults["leader stopped past its lease and woken"] += 1
    assert first.job(steady)["attempt"] == 1, "no run was disturbed"
    for job_id in done:
        assert first.job(job_id)["attempt"] == 1
        check_weights(first, job_id, 10)
    first.post(f"/jobs/{steady}/kill")
    first.wait(steady, "cancelled")
    account.invariants.append(f"{len(done)} jobs launched once each, one running all the while was not touched")
