"""DiskMonitor: when a disk is low, which jobs get an alert, and when it is removed."""

import logging
from pathlib import Path
from typing import Any

import pytest

from tests.service.harness import ServiceHarness
from trainyard.service.maintenance import disk_monitor
from trainyard.service.maintenance.disk_monitor import (
    Disk,
    DiskLimits,
    DiskMonitor,
    DiskReading,
    DiskState,
    disk_state,
)
from trainyard.service.maintenance.loop import MaintenanceLoop
from trainyard.service.maintenance.warnings import to_alert
from trainyard.service.settings import Settings

GIB = 1 << 30


class Disks:
    """File systems that are as full as the test says, by the folder they are mounted at."""

    def __init__(self, **free: float) -> None:
        self.free = {name: int(share * 100 * GIB) for name, share in free.items()}
        self.more: dict[str, Any] = {}
        self.asked: list[Path] = []

    def __call__(self, path: Path) -> DiskReading:
        self.asked.append(path)
        if path.name.startswith("new"):
            raise FileNotFoundError(path)
        if path.name not in self.free:
            raise OSError(5, "Input/output error")
        device = sorted(self.free).index(path.name)
        return DiskReading(100 * GIB, self.free[path.name], device=device, **self.more)


def watch(found: Disks, **roots: list[Path]) -> DiskMonitor:
    return DiskMonitor(roots or {"home": [Path("/home")]}, DiskLimits(5 * GIB, 10), found)


@pytest.mark.parametrize(
    ("size", "percent", "total", "limit"),
    [
        (5 * GIB, 10, 100 * GIB, 5 * GIB),
        (5 * GIB, 10, 10 * GIB, 1 * GIB),
        (0, 10, 100 * GIB, 10 * GIB),
        (5 * GIB, 0, 10 * GIB, 5 * GIB),
        (0, 0, 100 * GIB, 0),
    ],
)
def test_the_smaller_of_both_limits_counts(size: int, percent: int, total: int, limit: int) -> None:
    assert DiskLimits(size, percent).of(total) == limit


@pytest.mark.parametrize(
    ("free", "before", "state"),
    [
        (6.0, None, DiskState.OK),
        (5.0, None, DiskState.OK),
        (4.99, None, DiskState.LOW),
        (5.2, DiskState.OK, DiskState.OK),
        (5.2, DiskState.LOW, DiskState.LOW),
        (5.2, DiskState.FULL, DiskState.LOW),
        (5.6, DiskState.LOW, DiskState.OK),
        (0.05, None, DiskState.FULL),
        (0.05, DiskState.OK, DiskState.FULL),
    ],
)
def test_a_disk_at_its_limit_does_not_alert_again_and_again(
    free: float, before: DiskState | None, state: DiskState
) -> None:
    assert disk_state(DiskReading(100 * GIB, int(free * GIB)), DiskLimits(5 * GIB, 10), before) is state


def test_other_ways_to_be_full() -> None:
    limits = DiskLimits(5 * GIB, 10)
    assert disk_state(DiskReading(100 * GIB, 50 * GIB, read_only=True), limits, None) is DiskState.FULL
    assert disk_state(DiskReading(100 * GIB, 50 * GIB, files=1000, files_free=0), limits, None) is DiskState.FULL
    assert disk_state(DiskReading(100 * GIB, 50 * GIB, files=1000, files_free=50), limits, None) is DiskState.LOW
    assert (
        disk_state(DiskReading(100 * GIB, 50 * GIB, files=1000, files_free=105), limits, DiskState.LOW) is DiskState.LOW
    )
    assert disk_state(DiskReading(100 * GIB, 50 * GIB, files=1000, files_free=105), limits, None) is DiskState.OK
    assert disk_state(DiskReading(100 * GIB, 50 * GIB, files=0), limits, None) is DiskState.OK
    assert disk_state(DiskReading(100 * GIB, 1 * GIB), DiskLimits(0, 0), None) is DiskState.OK, "the watch is off"


def test_folders_of_one_file_system_are_one_disk() -> None:
    found = Disks(home=0.5, saves=0.02)
    roots = {
        "home": [Path("/home")],
        "save_root": [Path("/saves"), Path("/home/new-1"), Path("/gone/away")],
        "corpus_cache": [Path("/home/new/new")],
    }
    seen = watch(found, **roots).poll()
    assert [(disk.name, disk.state) for disk in seen] == [
        ("home+save_root+corpus_cache", DiskState.OK),
        ("save_root", DiskState.LOW),
        ("save_root", DiskState.UNREADABLE),
    ]
    assert seen[0].paths == (Path("/home"), Path("/home/new-1"), Path("/home/new/new"))
    assert (seen[1].usage.free, seen[1].limit) == (2 * GIB, 5 * GIB)


def test_a_real_file_system(tmp_path: Path) -> None:
    usage = disk_monitor.usage_of(tmp_path)
    assert 0 < usage.free <= usage.total
    assert usage.device == tmp_path.stat().st_dev
    settings = Settings.read({"TRAINYARD_SAVE_ROOTS": str(tmp_path / "later")}, home=tmp_path)
    (disk,) = DiskMonitor.of(settings).poll()
    assert disk.name == "home+save_root+corpus_cache"


def test_a_disk_that_hangs_blocks_no_caller() -> None:
    now = [0.0]
    made = DiskMonitor({"home": [Path("/home")]}, DiskLimits(0, 0), Disks(home=0.5), lambda: now[0])
    assert made.readings() is made.readings(), "looked at once"
    now[0] = 59.0
    assert not made.stale
    now[0] = 61.0
    assert made.stale
    made.poll()
    assert not made.stale


def low(rig: ServiceHarness, job_id: str) -> list[str]:
    return [alert["message"] for alert in rig.job(job_id)["alerts"] if alert["code"] == "disk_low"]


def kinds(rig: ServiceHarness, job_id: str) -> list[tuple[str, str]]:
    events = rig.data(job_id, "events", limit=100)
    return [(e["kind"], e["actor"]) for e in events if e["kind"] == "disk" or e["data"].get("code") == "disk_low"]


def test_running_jobs_hear_of_it_once_and_hear_when_it_is_over(any_rig: ServiceHarness) -> None:
    rig = any_rig
    found = Disks(home=0.02)
    upkeep = MaintenanceLoop(rig.scheduler, watch(found), rig.clock)
    job_id, _ = rig.running()
    ended, attempt = rig.running()
    rig.exit(attempt, "completed", step=10)
    waiting = rig.submit(resources={"nproc_per_node": 2})
    upkeep.round()
    upkeep.round()
    assert low(rig, job_id) == [
        "the disk of home is nearly full: 2.0 GiB of 100.0 GiB free (warning threshold: 5.0 GiB)"
    ]
    assert kinds(rig, job_id) == [("warning", "service")]
    assert low(rig, ended) == low(rig, waiting) == []
    late, _ = rig.running()
    found.free["home"] = int(5.2 * GIB)
    upkeep.round()
    assert low(rig, late), "a job that began later is told too, and the disk still counts as low"
    assert len(low(rig, job_id)) == 1
    found.free["home"] = 6 * GIB
    upkeep.round()
    upkeep.round()
    for each in (job_id, late):
        assert low(rig, each) == []
        assert kinds(rig, each) == [("warning", "service"), ("disk", "service")]
    found.free["home"] = 1 * GIB
    upkeep.round()
    assert low(rig, job_id), "and again, when it is low again"


def test_only_those_who_save_there_hear_of_a_save_root(rig: ServiceHarness, tmp_path: Path) -> None:
    found = Disks(home=0.5, saves=0.02)
    other = rig.home / "elsewhere"
    there, _ = rig.running(checkpoint={"save_dir": str(other)})
    here, _ = rig.running()
    disk = watch(found, home=[Path("/home")], save_root=[Path("/saves")])
    MaintenanceLoop(rig.scheduler, disk, rig.clock).round()
    assert low(rig, here) == low(rig, there) == []

    def ask(path: Path) -> DiskReading:
        return found(Path("/saves") if path.is_relative_to(other) else Path("/home"))

    disk = DiskMonitor({"home": [rig.home], "save_root": [other]}, DiskLimits(5 * GIB, 10), ask)
    MaintenanceLoop(rig.scheduler, disk, rig.clock).round()
    assert low(rig, here) == []
    assert len(low(rig, there)) == 1
    assert "save_root" in low(rig, there)[0]


def test_a_service_that_does_not_schedule_only_polls(rig: ServiceHarness, monkeypatch: pytest.MonkeyPatch) -> None:
    job_id, _ = rig.running()
    monkeypatch.setattr(rig.scheduler, "_enabled", False)
    upkeep = MaintenanceLoop(rig.scheduler, watch(Disks(home=0.02)), rig.clock)
    upkeep.round()
    assert low(rig, job_id) == []


def test_the_log_says_it_once(rig: ServiceHarness, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "trainyard")
    found = Disks(home=0.5)
    upkeep = MaintenanceLoop(rig.scheduler, watch(found), rig.clock)
    for share in (0.5, 0.02, 0.02, 0.0, 0.5, 0.5):
        found.free["home"] = int(share * 100 * GIB)
        upkeep.round()
    said = [record.getMessage() for record in caplog.records if "disk" in record.getMessage()]
    assert len(said) == 3, said
    assert "2.0 GiB" in said[0]
    assert "0.0 MiB" in said[1]
    assert said[2] == "the disk of home has room again"


def test_the_loop_goes_on_whatever_happens(rig: ServiceHarness, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainyard.service.maintenance.loop.ROUND_SECONDS", 0.01)
    import threading

    calls, thrice = [], threading.Event()

    def look() -> tuple[()]:
        calls.append(1)
        if len(calls) >= 3:
            thrice.set()
        raise OSError("hangs no more, but is broken")

    made = watch(Disks(home=0.5))
    monkeypatch.setattr(made, "poll", look)
    upkeep = MaintenanceLoop(rig.scheduler, made)
    upkeep.start()
    assert thrice.wait(60)
    upkeep.stop()


def test_what_is_said_names_no_path() -> None:
    found = Disks(home=0.5)
    found.more = {"read_only": True}
    disk = watch(found).poll()[0]
    assert to_alert(disk) == "the disk of home can only be read"
    found.more = {"files": 1000, "files_free": 3}
    assert to_alert(watch(found).poll()[0]) == "the disk of home is about to run out of inodes: 3 are left"
    tiny = Disk((), ("home",), DiskReading(4 << 20, 3 << 20, files=9000, files_free=8000), 1 << 19, DiskState.FULL)
    said = "the disk of home is nearly full: 3.0 MiB of 4.0 MiB free (warning threshold: 64.0 MiB)"
    assert to_alert(tiny) == said
    assert to_alert(watch(Disks()).poll()[0]) == "the disk of home does not answer"


def test_the_settings() -> None:
    settings = Settings.read({})
    assert (settings.disk_bytes, settings.disk_percent) == (5 * GIB, 10)
    given = {"TRAINYARD_DISK_LOW_BYTES": "0", "TRAINYARD_DISK_LOW_PERCENT": "3"}
    settings = Settings.read(given)
    assert (settings.disk_bytes, settings.disk_percent) == (0, 3)
