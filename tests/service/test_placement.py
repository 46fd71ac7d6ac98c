"""Which GPUs a job gets: near each other, without an XID error, and none that a setting excludes."""

import logging
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pynvml
import pytest
from sqlalchemy import select

from tests.fakes import nvml
from tests.fakes.inventory import FixedInventory
from tests.fakes.nvml import NvmlHost
from tests.faults.service_home import until
from tests.service.conftest import Command, MakeHarness
from tests.work import count_calls
from trainyard.service.db.models import XidErrorRow
from trainyard.service.devices import inventory, xids
from trainyard.service.devices.inventory import Device, HostInventory, cpu_slots, same_pci_address
from trainyard.service.devices.placement import choose
from trainyard.service.devices.xids import XidError, XidWatcher, kernel_log_errors
from trainyard.service.errors import DatabaseUnavailable
from trainyard.service.scheduler.loop import Scheduler
from trainyard.service.scheduler.plan import BACKFILL_PATIENCE, Start, plan
from trainyard.service.scheduler.snapshot import QueuedJob, Snapshot

NOW = datetime(2026, 1, 1, 12, tzinfo=UTC)


def devices_of(host: NvmlHost, monkeypatch: pytest.MonkeyPatch, excluded: Sequence[str] = ()) -> Sequence[Device]:
    monkeypatch.setattr(inventory, "pynvml", host)
    return HostInventory(0, excluded=excluded).devices()


@pytest.mark.parametrize(
    ("host", "index", "expected"),
    [
        (nvml.dgx_h100(), 5, ("00000000:C3:00.0", 1, "nvlink", tuple(f"cuda:{i}" for i in (0, 1, 2, 3, 4, 6, 7)))),
        (nvml.bridged_pairs(), 1, ("00000000:31:00.0", 0, "nvlink", ("cuda:3",))),
        (nvml.two_sockets(), 1, ("00000000:81:00.0", 1, "pcie", ())),
        (nvml.old_driver(), 0, ("00000000:3B:00.0", None, "pcie", ())),
        (NvmlHost("One", ["00000000:01:00.0"], [3], [[]]), 0, ("00000000:01:00.0", None, None, ())),
    ],
)
def test_where_a_gpu_is(
    host: NvmlHost,
    index: int,
    expected: tuple[str, int | None, str | None, tuple[str, ...]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    device = devices_of(host, monkeypatch)[index]
    assert (device.pci_bus_id, device.numa_node, device.link, device.nvlink_peers) == expected
    assert device.uuid == f"GPU-{index:08x}"


@pytest.mark.parametrize(
    ("host", "busy", "ranks", "expected"),
    [
        (nvml.dgx_h100(), (), 2, "0 1"),
        (nvml.dgx_h100(), (), 8, "0 1 2 3 4 5 6 7"),
        (nvml.bridged_pairs(), (), 2, "0 2"),
        (nvml.bridged_pairs(), (0,), 2, "1 3"),
        (nvml.bridged_pairs(), (0,), 1, "2"),  # 1 and 3 stay together
        (nvml.bridged_pairs(), (0, 3), 2, "1 2"),
        (nvml.two_sockets(), (), 2, "0 3"),
        (nvml.two_sockets(), (3,), 2, "1 2"),
        (nvml.two_sockets(), (1,), 1, "2"),
        (nvml.two_sockets(), (), 3, "0 1 2"),
        (nvml.old_driver(), (), 1, "0"),
    ],
)
def test_a_job_gets_gpus_that_are_near_each_other(
    host: NvmlHost, busy: Sequence[int], ranks: int, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = [device for i, device in enumerate(devices_of(host, monkeypatch)) if i not in busy]
    assert " ".join(device.removeprefix("cuda:") for device in choose(free, ranks)) == expected


def test_the_choice_takes_little_work_with_many_gpus() -> None:
    many = [Device(f"cuda:{i}", "cuda", numa_node=i % 2) for i in range(64)]
    assert choose(many, 16) == tuple(f"cuda:{2 * i}" for i in range(16))
    assert count_calls(lambda: choose(many, 16)) < 400_000, "there are 5e14 ways to choose"


@pytest.mark.parametrize(
    "excluded", ["cuda:1", "GPU-00000001", "00000000:31:00.0", "0000:31:00.0", "31:00.0", "0000:31:00"]
)
def test_a_device_is_excluded_by_any_of_its_names(excluded: str, monkeypatch: pytest.MonkeyPatch) -> None:
    devices = devices_of(nvml.bridged_pairs(), monkeypatch, [excluded])
    assert [device.id for device in devices] == ["cuda:0", "cuda:2", "cuda:3"]


def test_a_name_that_excludes_nothing_is_logged(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(logging.getLogger("trainyard"), "propagate", True)
    devices_of(nvml.two_sockets(), monkeypatch, ["cuda:1", "cuda:11"])
    assert [record.getMessage() for record in caplog.records] == [
        "TRAINYARD_EXCLUDE_DEVICES names a device that this host does not have: cuda:11"
    ]


def test_pci_addresses() -> None:
    assert same_pci_address("0001:3b:00.0", "00000001:3B:00.0")
    assert not same_pci_address("0001:3b:00.0", "0000:3b:00.0")
    assert not same_pci_address("cuda:1", "cuda:1"), "no PCI address"


KERNEL_LOG = """\
6,1201,81000000,-;pci 0000:3b:00.0: [10de:2330] type 00 class 0x030200
3,1202,82000000,-;NVRM: Xid (PCI:0000:3b:00): 79, pid='<unknown>', name=<unknown>, GPU has fallen off the bus.
3,1203,83000000,-;NVRM: Xid (PCI:0000:5e:00): 31, pid=4711, name=python, Ch 00000008, MMU Fault
3,1204,84000000,-;NVRM: Xid (PCI:0000:99:00): 48, pid=1, of a GPU that is gone
"""


def test_errors_in_the_kernel_log(tmp_path: Path) -> None:
    file = tmp_path / "kmsg"
    file.write_text(KERNEL_LOG)
    found = kernel_log_errors(file, {"00000000:3B:00.0": "GPU-a", "00000000:5E:00.0": "GPU-b"})
    assert [(error.gpu_uuid, error.xid) for error in found] == [("GPU-a", 79), ("GPU-b", 31)]
    assert found[1].at - found[0].at == timedelta(seconds=1)
    assert kernel_log_errors(tmp_path / "missing", {}) == []


def watched(watcher: XidWatcher) -> list[tuple[str, int]]:
    watcher.start()
    watcher.stop()
    return [(error.gpu_uuid, error.xid) for error in watcher.pending()]


def test_events_and_the_kernel_log_are_watched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "kmsg").write_text(KERNEL_LOG)
    host = nvml.old_driver()
    monkeypatch.setattr(xids, "pynvml", host)
    # Of a card without events, the kernel log still counts. 31 is an error of the program.
    assert watched(XidWatcher(tmp_path / "kmsg")) == [("GPU-00000000", 79)]
    host.can_report_events = True
    host.events = [SimpleNamespace(device=1, eventData=xid) for xid in (48, 43, 95)]
    watcher = XidWatcher(tmp_path / "none")
    watcher.start()
    while host.events:
        pass
    watcher.stop()
    assert [(error.gpu_uuid, error.xid) for error in watcher.pending()] == [("GPU-00000001", 48), ("GPU-00000001", 95)]
    watcher.forget(watcher.pending()[:1])
    assert [error.xid for error in watcher.pending()] == [95]


def test_a_lost_gpu_does_not_end_the_watch_of_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    host = nvml.bridged_pairs()
    monkeypatch.setattr(xids, "pynvml", host)
    monkeypatch.setattr(xids, "WAIT_MILLISECONDS", 0)
    lost = pynvml.NVMLError(pynvml.NVML_ERROR_GPU_IS_LOST)

    def handle_of(index: int) -> int:
        if index == 0:
            raise lost
        return index

    monkeypatch.setattr(host, "nvmlDeviceGetHandleByIndex", handle_of)
    host.events = [lost, lost, SimpleNamespace(device=2, eventData=48)]
    watcher = XidWatcher(tmp_path / "none")
    watcher.start()
    while host.events:
        pass
    watcher.stop()
    assert [(error.gpu_uuid, error.xid) for error in watcher.pending()] == [("GPU-00000002", 48)]


def test_the_others_are_watched_in_a_set_without_the_gpu_that_is_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NVML reports the loss again and again for a set with that GPU, and nothing of the others."""
    host = nvml.bridged_pairs()
    monkeypatch.setattr(xids, "pynvml", host)
    monkeypatch.setattr(xids, "WAIT_MILLISECONDS", 0)
    sets: list[list[int]] = []
    lost: set[int] = set()
    wait = host.nvmlEventSetWait_v2

    def answer(index: int) -> int:
        if index in lost:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_GPU_IS_LOST)
        return index

    def wait_of_set(events: str, milliseconds: int) -> object:
        if len(sets) == 1:
            lost.add(0)
        for index in sets[-1]:
            answer(index)
        return wait(events, milliseconds)

    monkeypatch.setattr(host, "nvmlEventSetCreate", lambda: sets.append([]))
    monkeypatch.setattr(host, "nvmlDeviceRegisterEvents", lambda index, *_: sets[-1].append(answer(index)))
    monkeypatch.setattr(host, "nvmlEventSetWait_v2", wait_of_set)
    host.events = [SimpleNamespace(device=2, eventData=48)]
    watcher = XidWatcher(tmp_path / "none")
    watcher.start()
    until(lambda: not host.events)
    watcher.stop()
    assert [(error.gpu_uuid, error.xid) for error in watcher.pending()] == [("GPU-00000002", 48)]
    assert sets == [[0, 1, 2, 3], [1, 2, 3]]


def test_an_xid_error_is_stored_after_the_database_was_unavailable(
    make_rig: MakeHarness, sqlite_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "kmsg").write_text(KERNEL_LOG)
    monkeypatch.setattr(xids, "pynvml", nvml.old_driver())
    rig = make_rig(sqlite_url)
    watcher = XidWatcher(tmp_path / "kmsg")
    watcher.start()
    watcher.stop()
    scheduler = Scheduler(rig.database, rig.launcher, FixedInventory(cpu_slots(1)), rig.clock, xid_watcher=watcher)
    with (
        mock.patch.object(rig.database, "write", side_effect=DatabaseUnavailable),
        pytest.raises(DatabaseUnavailable),
    ):
        scheduler.reconcile()
    for _ in range(2):
        scheduler.reconcile()
        with rig.database.read() as session:
            assert [(row.gpu_uuid, row.xid) for row in session.scalars(select(XidErrorRow))] == [("GPU-00000000", 79)]
    assert watcher.pending() == ()


def job(device: str = "cuda", ranks: int = 1) -> QueuedJob:
    return QueuedJob("job", "job", device, ranks, 0, NOW, 1)


def test_only_devices_whose_errors_change_are_copied() -> None:
    quiet, failing = Device("cuda:0", "cuda", uuid="a"), Device("cuda:1", "cuda", uuid="b")
    errors = {"b": [XidError("b", 79, NOW)]}
    first = xids.marked((quiet, failing), errors)
    assert (first[0] is quiet, first[1].xid_errors) == (True, (79,))
    assert all(a is b for a, b in zip(xids.marked(first, errors), first, strict=True))
    assert xids.marked(first, {})[1] == failing


@pytest.mark.parametrize(
    ("queued", "expected"),
    [
        (job(), ("cuda:1",)),
        (job(ranks=2), "2 GPUs; 1 of 2 free, and cuda:0 with XID errors"),
        (job("cuda:0"), "cuda:0, which has XID errors; `trainyard devices --clear cuda:0` clears them"),
    ],
)
def test_a_gpu_with_an_error_is_not_leased(queued: QueuedJob, expected: tuple[str, ...] | str) -> None:
    devices = (Device("cuda:0", "cuda", uuid="a", xid_errors=(79,)), Device("cuda:1", "cuda"))
    require_plan(queued, devices, expected)


@pytest.mark.parametrize(
    ("queued", "expected"),
    [
        (job(), ("cuda:1",)),
        (job(ranks=2), "2 GPUs; 1 of 2 free, and cuda:0 (GPU is lost) cannot be used"),
        (job("cuda:0"), "cuda:0, which cannot be used (GPU is lost)"),
    ],
)
def test_a_gpu_with_a_fault_is_not_leased(queued: QueuedJob, expected: tuple[str, ...] | str) -> None:
    devices = (Device("cuda:0", "cuda", uuid="a", fault="GPU is lost"), Device("cuda:1", "cuda"))
    require_plan(queued, devices, expected)


def require_plan(queued: QueuedJob, devices: Sequence[Device], expected: tuple[str, ...] | str) -> None:
    decision = plan(Snapshot(queued=[queued], devices=devices), NOW)
    if isinstance(expected, str):
        assert decision.waiting == {"job": expected}
    else:
        assert decision.actions == (Start("job", expected),)


GPU = (Device("cuda:0", "cuda", uuid="GPU-a"),)


def test_an_error_keeps_a_gpu_from_being_leased_until_it_is_cleared(make_rig: MakeHarness, any_url: str) -> None:
    rig = make_rig(any_url, devices=GPU)
    at = rig.clock() - timedelta(minutes=1)
    with rig.database.write() as session:
        # The kernel log reports it again after a restart of the service, at nearly the same time.
        xids.store(session, [XidError("GPU-a", 79, at), XidError("GPU-a", 79, at + timedelta(seconds=1))])
    job_id = rig.submit(resources={"device": "cuda"})
    rig.reconcile()
    assert rig.status(job_id) == "queued"
    assert "cuda:0 with XID errors" in rig.job(job_id)["queue"]["waiting_for"]
    [device] = rig.get("/devices")["data"]
    assert [error["xid"] for error in device["xid_errors"]] == [79]
    assert 'trainyard_device_xid_errors{device="cuda:0"} 1.0' in rig.client.get("/metrics").text
    assert rig.client.post("/devices/cuda:9/clear").json()["code"] == "device_not_found"
    assert rig.client.post("/devices/cuda:0/clear").json()["xid_errors"] == []
    with rig.database.write() as session:
        xids.store(session, [XidError("GPU-a", 79, at)])  # a cleared one is not counted again
    rig.reconcile()
    assert rig.status(job_id) == "starting"


def test_a_lost_gpu_is_shown_and_blocks_no_other_job(make_rig: MakeHarness, sqlite_url: str) -> None:
    lost = Device("cuda:0", "cuda", uuid="GPU-a", fault="GPU is lost")
    rig = make_rig(sqlite_url, devices=(lost, Device("cuda:1", "cuda", uuid="GPU-b")))
    rig.reconcile()
    assert [device["fault"] for device in rig.get("/devices")["data"]] == ["GPU is lost", None]
    on_both = rig.submit(resources={"device": "cuda", "nproc_per_node": 2})
    rig.clock.forward(BACKFILL_PATIENCE.total_seconds() + 1)
    on_one = rig.submit(resources={"device": "cuda"})
    rig.reconcile()
    assert (rig.status(on_both), rig.status(on_one)) == ("queued", "starting")
    assert rig.job(on_both)["queue"]["waiting_for"] == "2 GPUs; 1 of 2 free, and cuda:0 (GPU is lost) cannot be used"


def test_an_error_counts_for_a_day(make_rig: MakeHarness, sqlite_url: str) -> None:
    rig = make_rig(sqlite_url, devices=GPU)
    with rig.database.write() as session:
        xids.store(session, [XidError("GPU-a", 79, NOW)])
        assert list(xids.uncleared(session, NOW + timedelta(hours=23, minutes=59))) == ["GPU-a"]
        assert xids.uncleared(session, NOW + timedelta(hours=24, minutes=1)) == {}


def test_the_command_clears_a_device(command: Command) -> None:
    code, out, err = command("devices", "--clear", "cpu:0")
    assert code == 0, err
    assert out.splitlines()[1].split()[0] == "cpu:0"
    assert command("devices", "--clear", "cuda:7")[0] == 1
