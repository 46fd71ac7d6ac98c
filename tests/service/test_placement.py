"""Which GPUs a job gets: near each other, without an XID error, and none that a setting excludes."""

import ctypes
import itertools
import logging
import threading
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any
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
from trainyard.service.devices.placement import choose, distance
from trainyard.service.devices.xids import KernelLog, XidError, XidWatcher
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


def pairs_on_eight_nodes() -> list[Device]:
    """16 GPUs, two on each of 8 NUMA nodes (NPS4)."""
    return [Device(f"cuda:{i}", "cuda", numa_node=i // 2) for i in range(16)]


def nvlink_fours() -> list[Device]:
    """16 GPUs on two NUMA nodes, with NVLinks in groups of four."""
    peers = [tuple(f"cuda:{j}" for j in range(16) if j // 4 == i // 4 and j != i) for i in range(16)]
    return [Device(f"cuda:{i}", "cuda", numa_node=i // 8, nvlink_peers=peers[i]) for i in range(16)]


@pytest.mark.parametrize("host", [pairs_on_eight_nodes(), nvlink_fours()], ids=["nps4", "nvlink"])
@pytest.mark.parametrize("count", [2, 3, 4, 5, 6])
def test_no_other_group_of_gpus_has_shorter_distances(host: Sequence[Device], count: int) -> None:
    seed = 20261201
    print(f"seed {seed}")
    chance = Random(seed)
    for free_count in (6, 9, 11):
        for _ in range(5):
            free = sorted(chance.sample(host, free_count), key=lambda device: int(device.id.removeprefix("cuda:")))
            chosen = set(choose(free, count))
            groups = itertools.combinations(free, count)
            assert inner([device for device in free if device.id in chosen]) == min(map(inner, groups)), chosen


def inner(group: Sequence[Device]) -> int:
    return sum(distance(one, other) for one, other in itertools.combinations(group, 2))


def test_four_ranks_get_two_pairs_rather_than_one_pair_and_two_single_gpus() -> None:
    host = pairs_on_eight_nodes()
    assert choose([host[i] for i in (5, 8, 9, 10, 11, 13)], 4) == ("cuda:8", "cuda:9", "cuda:10", "cuda:11")


def test_a_job_gets_gpus_of_one_model() -> None:
    models = ("H100", "H100", "L40S", "L40S")
    for numa_node in (0, None):
        host = [Device(f"cuda:{i}", "cuda", model, numa_node=numa_node) for i, model in enumerate(models)]
        assert choose(host[1:], 2) == ("cuda:2", "cuda:3")
        assert choose(host, 3) == ("cuda:0", "cuda:1", "cuda:2")
        waiting = Snapshot(queued=[job(ranks=2)], devices=host, leases={"cuda:0": "other"})
        assert plan(waiting, NOW).actions == (Start("job", ("cuda:2", "cuda:3")),)


def test_one_rank_does_not_prefer_a_gpu_of_another_model() -> None:
    """It may be the small card of the display."""
    for models in (("H100", "H100", "T400"), ("H100", "T400")):
        assert choose([Device(f"cuda:{i}", "cuda", model) for i, model in enumerate(models)], 1) == ("cuda:0",)


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


TWO_GPUS = (xids.Gpu("00000000:3B:00.0", "GPU-a", 0), xids.Gpu("00000000:5E:00.0", "GPU-b", 1))
KERNEL_LOG = """\
6,1201,81000000,-;pci 0000:3b:00.0: [10de:2330] type 00 class 0x030200
3,1202,82000000,-;NVRM: Xid (PCI:0000:3b:00): 79, pid='<unknown>', name=<unknown>, GPU has fallen off the bus.
3,1203,83000000,-;NVRM: Xid (PCI:0000:5e:00): 31, pid=4711, name=python, Ch 00000008, MMU Fault
3,1204,84000000,-;NVRM: Xid (PCI:0000:99:00): 48, pid=1, of a GPU that is gone
"""


def test_errors_in_the_kernel_log(tmp_path: Path) -> None:
    file = tmp_path / "kmsg"
    file.write_text(KERNEL_LOG)
    with KernelLog(file) as kernel_log:
        found = kernel_log.errors(TWO_GPUS)
        assert [(error.gpu_uuid, error.xid) for error in found] == [("GPU-a", 79), ("GPU-b", 31)]
        assert found[1].at - found[0].at == timedelta(seconds=1)
        assert kernel_log.errors(TWO_GPUS) == []
        with file.open("a") as more:
            more.write("3,1205,85000000,-,caller=T7;NVRM: Xid (PCI:0000:5e:00): 95, pid=1, name=a, Uncontained\n")
        before = datetime.now(UTC)
        [error] = kernel_log.errors(TWO_GPUS)
        assert (error.gpu_uuid, error.xid, error.clock_error) == ("GPU-b", 95, None)
        assert before <= error.at <= datetime.now(UTC), "its own clock may have drifted since boot"
    with KernelLog(tmp_path / "missing") as missing:
        assert missing.errors(TWO_GPUS) == []


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        # src/nvidia/src/kernel/gpu/rc/kernel_rc.c of the driver has these three forms.
        ("NVRM: Xid (PCI:0000:3b:00): 48, pid=77, name=python, DBE", [48]),
        ("NVRM: Xid (PCI:0000:3b:00 GPU-I:05): 94, pid=7194, Contained: CE User Channel (0x9). RST: No", [94]),
        ("NVRM: Xid (PCI:0000:3b:00 GPU-I:05 GPU-CI:00): 95, pid=7194, name=python, Uncontained", [95]),
        (
            "NVRM: Xid (PCI:0000:3b:00): 154, GPU recovery action changed from 0x0 (None) to 0x1 (GPU Reset Required)",
            [154],
        ),
        (
            "NVRM: Xid (PCI:0000:3b:00): 154, GPU recovery action changed from 0x1 (GPU Reset Required) to 0x0 (None)",
            [],
        ),
        ("nvidia-nvswitch0: SXid (PCI:0000:3b:00.0): 12028, Non-fatal, Link 32", []),
    ],
)
def test_forms_of_an_error_in_the_kernel_log(message: str, expected: list[int], tmp_path: Path) -> None:
    (tmp_path / "kmsg").write_text(f"3,1202,82000000,-;{message}\n")
    with KernelLog(tmp_path / "kmsg") as kernel_log:
        assert [error.xid for error in kernel_log.errors(TWO_GPUS)] == expected


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

    def create_set() -> str:
        sets.append([])
        return f"set {len(sets)}"

    def wait_of_set(events: str, milliseconds: int) -> object:
        if len(sets) == 1:
            lost.add(0)
        for index in sets[-1]:
            answer(index)
        return wait(events, milliseconds)

    monkeypatch.setattr(host, "nvmlEventSetCreate", create_set)
    monkeypatch.setattr(host, "nvmlDeviceRegisterEvents", lambda index, *_: sets[-1].append(answer(index)))
    monkeypatch.setattr(host, "nvmlEventSetWait_v2", wait_of_set)
    host.events = [SimpleNamespace(device=2, eventData=48)]
    watcher = XidWatcher(tmp_path / "none")
    watcher.start()
    until(lambda: not host.events)
    watcher.stop()
    assert [(error.gpu_uuid, error.xid) for error in watcher.pending()] == [("GPU-00000002", 48)]
    assert sets == [[0, 1, 2, 3], [1, 2, 3]]


@pytest.fixture
def pairs(monkeypatch: pytest.MonkeyPatch) -> NvmlHost:
    """A host whose GPUs are watched without waiting."""
    host = nvml.bridged_pairs()
    monkeypatch.setattr(xids, "pynvml", host)
    monkeypatch.setattr(xids, "WAIT_MILLISECONDS", 0)
    monkeypatch.setattr(xids, "RETRY_SECONDS", 0.0)
    return host


def watched_until_empty(host: NvmlHost, kmsg: Path) -> list[tuple[str, int]]:
    watcher = XidWatcher(kmsg)
    watcher.start()
    until(lambda: not host.events)
    watcher.stop()
    return [(error.gpu_uuid, error.xid) for error in watcher.pending()]


@pytest.mark.parametrize("code", [pynvml.NVML_ERROR_UNKNOWN, pynvml.NVML_ERROR_GPU_IS_LOST, pynvml.NVML_ERROR_TIMEOUT])
def test_no_error_of_nvml_ends_the_watch(code: int, pairs: NvmlHost, tmp_path: Path) -> None:
    pairs.events = [*[pynvml.NVMLError(code)] * 3, SimpleNamespace(device=2, eventData=48)]
    assert watched_until_empty(pairs, tmp_path / "none") == [("GPU-00000002", 48)]


def test_a_gpu_whose_events_cannot_be_registered_does_not_hide_those_of_the_others(
    pairs: NvmlHost, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After NVML_ERROR_UNKNOWN the set is undefined, and must be freed."""
    sets: list[list[int]] = []
    freed: list[int] = []

    def register(handle: int, *_: object) -> None:
        sets[-1].append(handle)
        if handle == 1:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_UNKNOWN)

    def create() -> int:
        sets.append([])
        return len(sets) - 1

    monkeypatch.setattr(pairs, "nvmlEventSetCreate", create)
    monkeypatch.setattr(pairs, "nvmlEventSetFree", freed.append)
    monkeypatch.setattr(pairs, "nvmlDeviceRegisterEvents", register)
    pairs.events = [SimpleNamespace(device=3, eventData=74)]
    assert watched_until_empty(pairs, tmp_path / "none") == [("GPU-00000003", 74)]
    assert (sets, freed) == ([[0, 1], [0, 2, 3]], [0, 1])


def test_the_event_of_a_gpu_that_has_fallen_off_the_bus_names_it(
    pairs: NvmlHost, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def handle_of(index: int) -> Any:
        # Each time another pointer to the same object, as from the library.
        return ctypes.cast(256 * (index + 1), pynvml.c_nvmlDevice_t)

    fallen: set[int] = set()

    def uuid_of(handle: Any) -> str:
        index = (ctypes.cast(handle, ctypes.c_void_p).value or 0) // 256 - 1
        if index in fallen:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_GPU_IS_LOST)
        return f"GPU-{index}"

    def wait(*_: object) -> Any:
        fallen.add(1)
        events, pairs.events = pairs.events, []
        if not events:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_TIMEOUT)
        return events[0]

    monkeypatch.setattr(pairs, "nvmlDeviceGetHandleByIndex", handle_of)
    monkeypatch.setattr(pairs, "nvmlDeviceGetPciInfo", lambda _: SimpleNamespace(busId="00000000:01:00.0"))
    monkeypatch.setattr(pairs, "nvmlDeviceGetUUID", uuid_of)
    monkeypatch.setattr(pairs, "nvmlEventSetWait_v2", wait)
    pairs.events = [SimpleNamespace(device=handle_of(1), eventData=79)]
    assert watched_until_empty(pairs, tmp_path / "none") == [("GPU-1", 79)]


def test_an_event_that_no_recovery_is_needed_is_no_error(pairs: NvmlHost, tmp_path: Path) -> None:
    pairs.recovery = {3: pynvml.NVML_GPU_RECOVERY_ACTION_GPU_RESET}
    pairs.events = [SimpleNamespace(device=gpu, eventData=154) for gpu in (2, 3)]
    assert watched_until_empty(pairs, tmp_path / "none") == [("GPU-00000003", 154)]


@pytest.mark.parametrize("xid", [13, 31, 32, 43, 45, 69, 109, 137, 162])
def test_an_error_of_the_program_does_not_mark_a_gpu(xid: int, pairs: NvmlHost, tmp_path: Path) -> None:
    pairs.events = [SimpleNamespace(device=0, eventData=xid)]
    assert watched_until_empty(pairs, tmp_path / "none") == []


@pytest.mark.parametrize("xid", [48, 63, 64, 74, 79, 92, 94, 95, 119, 120, 140, 999])
def test_an_error_of_the_gpu_marks_it(xid: int, pairs: NvmlHost, tmp_path: Path) -> None:
    pairs.events = [SimpleNamespace(device=0, eventData=xid)]
    assert watched_until_empty(pairs, tmp_path / "none") == [("GPU-00000000", xid)]


def test_a_gpu_without_events_is_watched_by_the_kernel_log(pairs: NvmlHost, tmp_path: Path) -> None:
    pairs.can_report_events = False
    file = tmp_path / "kmsg"
    file.write_text("")
    watcher = XidWatcher(file)
    watcher.start()
    with file.open("a") as log:
        log.write("3,1,2,-;NVRM: Xid (PCI:0000:31:00): 79, GPU has fallen off the bus.\n")
    until(watcher.pending)
    watcher.stop()
    assert [(error.gpu_uuid, error.xid) for error in watcher.pending()] == [("GPU-00000001", 79)]


def test_a_driver_that_is_loaded_later_is_watched(
    pairs: NvmlHost, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    not_loaded = [pynvml.NVMLError(pynvml.NVML_ERROR_DRIVER_NOT_LOADED)] * 3
    monkeypatch.setattr(pairs, "nvmlInit", mock.Mock(side_effect=[*not_loaded, None]))
    pairs.events = [SimpleNamespace(device=0, eventData=48)]
    assert watched_until_empty(pairs, tmp_path / "none") == [("GPU-00000000", 48)]


def test_the_start_of_the_watcher_does_not_wait_for_the_driver(
    pairs: NvmlHost, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A driver that hangs would block the start of the service."""
    threads: list[str] = []
    monkeypatch.setattr(pairs, "nvmlInit", lambda: threads.append(threading.current_thread().name))
    watcher = XidWatcher(tmp_path / "none")
    watcher.start()
    watcher.stop()
    assert set(threads) == {"xids"}


def test_an_error_that_comes_a_thousand_times_is_one(
    pairs: NvmlHost, tmp_path: Path, make_rig: MakeHarness, sqlite_url: str
) -> None:
    pairs.events = [SimpleNamespace(device=0, eventData=74) for _ in range(1000)]
    assert watched_until_empty(pairs, tmp_path / "none") == [("GPU-00000000", 74)]
    rig = make_rig(sqlite_url)
    with rig.database.write() as session:
        for minute in range(30):
            xids.store(session, [XidError("GPU-a", 74, NOW + timedelta(minutes=minute))])
        [error] = xids.uncleared(session, NOW + timedelta(hours=1))["GPU-a"]
    assert error.at == NOW + timedelta(minutes=29), "its 24 hours begin with the last one"


@pytest.mark.parametrize("drift", [-400.0, -9.0, 0.0, 9.0, 400.0])
def test_a_cleared_error_does_not_come_back_from_the_kernel_log(
    drift: float, make_rig: MakeHarness, sqlite_url: str
) -> None:
    """The clock of the kernel log is off by minutes after a month, and the service reads the log at each start."""
    rig = make_rig(sqlite_url)
    age = timedelta(days=30)
    again = XidError("GPU-a", 79, NOW + timedelta(seconds=drift), clock_error=age * xids.CLOCK_DRIFT)
    with rig.database.write() as session:
        xids.store(session, [XidError("GPU-a", 79, NOW)])
        xids.store(session, [again])
        assert xids.clear(session, "GPU-a", NOW + timedelta(minutes=1)) == 1
        xids.store(session, [again])
        assert xids.uncleared(session, NOW + timedelta(minutes=2)) == {}
        xids.store(session, [XidError("GPU-a", 79, NOW + timedelta(minutes=3))])
        assert list(xids.uncleared(session, NOW + timedelta(minutes=4))) == ["GPU-a"], "a new one"


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
    first = xids.with_xid_errors((quiet, failing), errors)
    assert (first[0] is quiet, first[1].xid_errors) == (True, (79,))
    assert all(a is b for a, b in zip(xids.with_xid_errors(first, errors), first, strict=True))
    assert xids.with_xid_errors(first, {})[1] == failing


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
