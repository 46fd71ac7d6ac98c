"""The devices of this host."""

import inspect
import logging
import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pynvml
import pytest

from tests.fakes.nvml import NvmlHost, bridged_pairs
from tests.faults.service_home import until
from trainyard.contract import processes
from trainyard.contract.processes import MARKER
from trainyard.service.devices import inventory
from trainyard.service.devices.inventory import Device, HostInventory, cpu_slots, cuda_visible, kind_for


class FakeNvml(NvmlHost):
    """Two cards; a stranger on the second."""

    asked = 0

    def __init__(self) -> None:
        super().__init__("NVIDIA Test", ["00000000:3B:00.0", "00000000:5E:00.0"], [1, 2], [[], []])

    def nvmlDeviceGetCount(self) -> int:  # noqa: N802
        FakeNvml.asked += 1
        return 2

    def nvmlDeviceGetTemperature(self, index: int, sensor: int) -> int:  # noqa: N802
        assert sensor == self.NVML_TEMPERATURE_GPU
        if index:
            raise self.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)
        return 61

    def nvmlDeviceGetComputeRunningProcesses(self, index: int) -> list[Any]:  # noqa: N802
        return [SimpleNamespace(pid=77), SimpleNamespace(pid=78)] if index else []


def test_cuda_devices_and_their_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "77").mkdir()
    (tmp_path / "77" / "environ").write_bytes(f"A=1\0{MARKER}=job_a/1\0".encode())
    monkeypatch.setattr(processes, "PROC", tmp_path)
    monkeypatch.setattr(inventory, "pynvml", FakeNvml())
    FakeNvml.asked = 0
    now = [1000.0]
    monkeypatch.setattr(inventory, "time", SimpleNamespace(monotonic=lambda: now[0]))
    host = HostInventory(slots=1)
    first, second, cpu = host.devices()
    assert (first.id, first.kind, first.model, first.memory_bytes) == ("cuda:0", "cuda", "NVIDIA Test", 80 << 30)
    assert (first.processes, first.strangers) == ((), ())
    assert (first.temperature_celsius, second.temperature_celsius, cpu.temperature_celsius) == (61, None, None)
    assert (second.processes, second.strangers) == ((77, 78), (78,))
    assert (cpu.id, cpu.kind) == ("cpu:0", "cpu")
    now[0] += inventory.CACHE_SECONDS
    host.devices()
    assert FakeNvml.asked == 1, "the answer is good for a second"
    now[0] += 0.1
    host.devices()
    assert FakeNvml.asked == 2
    assert [d.id for d in HostInventory(0, visible="1").devices()] == ["cuda:1"]
    assert kind_for("auto", host.devices()) == "cuda"


def test_the_name_of_the_processor_is_that_of_the_kernel(tmp_path: Path) -> None:
    file = tmp_path / "cpuinfo"
    assert inventory.cpu_model(file) is None
    file.write_text("processor : 0\n")
    assert inventory.cpu_model(file) is None
    file.write_text("processor : 0\nmodel name\t: Some CPU @ 2 GHz\nmodel name\t: Another\n")
    assert inventory.cpu_model(file) == "Some CPU @ 2 GHz"
    assert [d.model for d in cpu_slots(2, "x")] == ["x", "x"]


def test_a_host_without_nvml_has_cpu_slots(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> None:
        raise pynvml.NVMLError(pynvml.NVML_ERROR_LIBRARY_NOT_FOUND)

    monkeypatch.setattr(pynvml, "nvmlInit", missing)
    assert [d.id for d in HostInventory(2).devices()] == ["cpu:0", "cpu:1"]
    assert kind_for("auto", HostInventory(2).devices()) == "cpu"


def test_a_driver_that_does_not_answer_at_the_start_is_asked_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Its libraries were updated, or the service was started before its module was loaded."""
    nvml = FailingNvml()
    nvml.starts = False
    for name in ("nvidia0", "nvidia1", "nvidiactl", "nvidia-uvm"):
        (tmp_path / name).touch()
    monkeypatch.setattr(inventory, "pynvml", nvml)
    monkeypatch.setattr(inventory, "CACHE_SECONDS", -1.0)
    monkeypatch.setattr(inventory, "RETRY_SECONDS", 0.0)
    monkeypatch.setattr(inventory, "DEVICES", tmp_path)
    host = HostInventory(slots=1)
    assert [(device.id, device.works) for device in host.devices()] == [
        ("cuda:0", False),
        ("cuda:1", False),
        ("cpu:0", True),
    ]
    assert "GPUs cannot be used until the driver answers" in caplog.text
    assert kind_for("auto", host.devices()) == "cuda", "a job must not start on the CPU"
    assert [device.id for device in HostInventory(0, visible="1").devices()] == ["cuda:1"]
    nvml.starts = True
    assert [(device.id, device.works) for device in host.devices()] == [
        ("cuda:0", True),
        ("cuda:1", True),
        ("cuda:2", True),
        ("cpu:0", True),
    ]


class FailingNvml(NvmlHost):
    """Three GPUs. ``failing``: the NVML error by query and index of the GPU."""

    def __init__(self) -> None:
        pci = [f"00000000:{bus}:00.0" for bus in ("1B", "43", "52")]
        super().__init__("NVIDIA Test", pci, [1, 1, 1], [[1, 2], [0, 2], [0, 1]])
        self.failing: dict[tuple[str, int], int] = {}
        self.counts = self.starts = True

    def nvmlInit(self) -> None:  # noqa: N802
        if not self.starts:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH)

    def answer(self, query: str, index: int) -> None:
        if (query, index) in self.failing:
            raise pynvml.NVMLError(self.failing[query, index])

    def nvmlDeviceGetCount(self) -> int:  # noqa: N802
        if not self.counts:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_UNKNOWN)
        return super().nvmlDeviceGetCount()

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:  # noqa: N802
        self.answer("handle", index)
        return index

    def nvmlDeviceGetMemoryInfo(self, index: int) -> Any:  # noqa: N802
        self.answer("memory", index)
        return super().nvmlDeviceGetMemoryInfo(index)

    def nvmlDeviceGetComputeRunningProcesses(self, index: int) -> list[Any]:  # noqa: N802
        self.answer("processes", index)
        return []


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> FailingNvml:
    nvml = FailingNvml()
    monkeypatch.setattr(inventory, "pynvml", nvml)
    monkeypatch.setattr(inventory, "CACHE_SECONDS", -1.0)
    return nvml


@pytest.mark.parametrize("query", ["handle", "memory", "processes"])
@pytest.mark.parametrize("code", [pynvml.NVML_ERROR_GPU_IS_LOST, pynvml.NVML_ERROR_UNKNOWN])
def test_a_gpu_that_fails_does_not_affect_the_others(failing: FailingNvml, query: str, code: int) -> None:
    host = HostInventory(slots=1)
    before = host.devices()
    failing.failing[query, 1] = code
    now = host.devices()
    assert [device.id for device in now] == ["cuda:0", "cuda:1", "cuda:2", "cpu:0"]
    assert [device.works for device in now] == [True, False, True, True]
    assert (now[1].fault, now[1].uuid, now[1].memory_used_bytes) == (str(pynvml.NVMLError(code)), before[1].uuid, None)
    failing.failing.clear()
    assert host.devices() == before, "the GPU was reset"


def test_a_gpu_that_failed_before_the_start_is_listed_and_can_recover(failing: FailingNvml) -> None:
    failing.failing["handle", 1] = pynvml.NVML_ERROR_GPU_IS_LOST
    host = HostInventory(slots=0)
    assert [(device.id, device.fault, device.uuid) for device in host.devices()] == [
        ("cuda:0", None, "GPU-00000000"),
        ("cuda:1", "GPU is lost", None),
        ("cuda:2", None, "GPU-00000002"),
    ]
    failing.failing.clear()
    assert (host.devices()[1].fault, host.devices()[1].uuid) == (None, "GPU-00000001")
    assert host.devices()[0].nvlink_peers == ("cuda:1", "cuda:2")


def test_gpus_stay_listed_if_the_driver_does_not_answer_at_all(failing: FailingNvml) -> None:
    host = HostInventory(slots=1)
    host.devices()
    failing.counts = False
    assert [(device.id, device.works) for device in host.devices()] == [
        ("cuda:0", False),
        ("cuda:1", False),
        ("cuda:2", False),
        ("cpu:0", True),
    ]
    assert kind_for("auto", host.devices()) == "cuda", "a queued job must not start on the CPU"


@pytest.mark.parametrize("code", sorted(inventory.UNSUPPORTED))
def test_a_query_that_a_gpu_does_not_support_is_no_fault(failing: FailingNvml, code: int) -> None:
    """A GPU that shares the host's memory, such as a GB10, reports no memory."""
    failing.failing = {("memory", 0): code, ("processes", 0): code}
    device = HostInventory(slots=0).devices()[0]
    assert (device.works, device.memory_bytes, device.memory_used_bytes, device.processes) == (True, None, None, ())


UUIDS = ("GPU-aaaa1111", "GPU-aaaa2222", "GPU-bbbb3333")


@pytest.mark.parametrize(
    ("visible", "expected"),
    [
        (None, [0, 1, 2]),
        ("0,2", [0, 2]),
        ("0, 2", [0, 2]),
        ("2,0", [0, 2]),
        ("", []),
        ("-1", []),
        ("1,-1,2", [1]),
        ("GPU-aaaa2222", [1]),
        ("GPU-b, 0", [0, 2]),
        ("GPU-aaaa", []),  # two have it
        ("0,GPU-cccc,2", [0]),
        ("0,3,1", [0]),
        ("NoDevFiles", []),  # Slurm's, for a job without GPUs
        ("all", []),
        ("MIG-55", [1]),
        ("GPU-bbbb3333,MIG-56", [2]),
    ],
)
def test_cuda_visible_devices_names_the_gpus_that_the_service_has(visible: str | None, expected: list[int]) -> None:
    gpus = [
        Device(f"cuda:{i}", "cuda", uuid=uuid, mig_uuid="MIG-55" if i == 1 else None) for i, uuid in enumerate(UUIDS)
    ]
    assert sorted(inventory.visible_indices(visible, gpus)) == expected


def test_a_lost_gpu_does_not_hide_the_gpus_that_are_named_after_it() -> None:
    gpus = [Device(f"cuda:{i}", "cuda", uuid=uuid) for i, uuid in enumerate((None, *UUIDS[1:]))]
    assert inventory.visible_indices(",".join(UUIDS), gpus) == {1, 2}


@pytest.mark.parametrize(("visible", "expected"), [("GPU-00000001", ["cuda:1"]), ("GPU-9", []), ("2", ["cuda:2"])])
def test_the_service_uses_only_the_gpus_of_its_own_cuda_visible_devices(
    visible: str, expected: list[str], failing: FailingNvml, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert [device.id for device in HostInventory(0, inventory.visible_devices()).devices()] == expected


def test_a_name_in_cuda_visible_devices_that_is_no_gpu_is_logged(
    failing: FailingNvml, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(logging.getLogger("trainyard"), "propagate", True)
    for visible in ("0,1", "-1", "", "GPU-00000001"):
        HostInventory(0, visible).devices()
    assert caplog.messages == []
    HostInventory(0, "0,GPU-9").devices()
    assert caplog.messages == [
        "CUDA_VISIBLE_DEVICES is 0,GPU-9, and this host has 1 of these GPUs: a name that it does not know ends the list"
    ]


def test_runs_get_uuids_because_cuda_does_not_number_a_lost_gpu() -> None:
    gpus = [Device(f"cuda:{i}", "cuda", uuid=uuid) for i, uuid in enumerate(UUIDS)]
    assert cuda_visible(["cuda:2", "cuda:0"], gpus) == "GPU-bbbb3333,GPU-aaaa1111"
    assert cuda_visible(["cpu:0"], gpus) == ""
    # torch rejects a list of UUIDs and numbers.
    assert cuda_visible(["cuda:0", "cuda:2"], [Device("cuda:0", "cuda"), *gpus[1:]]) == "0,2"
    assert cuda_visible(["cuda:12"], gpus) == "12", "it has vanished since it was leased"
    assert cuda_visible(["cuda:0"], [replace(gpus[0], mig_uuid="MIG-1")]) == "MIG-1"


def test_a_gpu_in_mig_mode_is_its_first_instance(monkeypatch: pytest.MonkeyPatch) -> None:
    host = bridged_pairs()
    host.mig = {1: ["MIG-a", "MIG-b"], 2: []}
    monkeypatch.setattr(inventory, "pynvml", host)
    devices = HostInventory(0).devices()
    assert [device.fault for device in devices] == [None, None, inventory.NO_INSTANCE, None]
    first = devices[1]
    assert (first.uuid, first.mig_uuid, first.memory_bytes) == ("GPU-00000001", "MIG-a", 10 << 30)
    assert first.model == "NVIDIA A100 80GB PCIe MIG 1g.10gb"
    assert [device.id for device in HostInventory(0, "MIG-a").devices()] == ["cuda:1"]
    assert [device.id for device in HostInventory(0, excluded=["MIG-a"]).devices()] == ["cuda:0", "cuda:2", "cuda:3"]


def test_a_gpu_that_prohibits_computing_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    host = bridged_pairs()
    host.prohibited = {3}
    monkeypatch.setattr(inventory, "pynvml", host)
    assert [device.works for device in HostInventory(0).devices()] == [True, True, True, False]


def test_a_driver_that_is_loaded_later_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    host, now, error = bridged_pairs(), [1000.0], pynvml.NVMLError(pynvml.NVML_ERROR_DRIVER_NOT_LOADED)
    monkeypatch.setattr(inventory, "pynvml", host)
    monkeypatch.setattr(inventory, "time", SimpleNamespace(monotonic=lambda: now[0]))
    init = mock.Mock(side_effect=error)
    monkeypatch.setattr(host, "nvmlInit", init)
    service = HostInventory(1)
    assert [device.id for device in service.devices()] == ["cpu:0"]
    init.side_effect = None
    assert len(service.devices()) == 1
    now[0] += inventory.RETRY_SECONDS
    assert [device.id for device in service.devices()] == ["cuda:0", "cuda:1", "cuda:2", "cuda:3", "cpu:0"]
    assert init.call_count == 2


def test_a_driver_that_hangs_stops_neither_the_service_nor_cpu_jobs(
    failing: FailingNvml, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After XID 119 a call of NVML may block for minutes, or for ever."""
    monkeypatch.setattr(inventory, "ANSWER_SECONDS", 0.01)
    host = HostInventory(slots=1)
    before = host.devices()
    may_answer, queries = threading.Event(), []

    def hanging(index: int) -> int:
        queries.append(index)
        may_answer.wait()
        return index

    with monkeypatch.context() as patched:
        patched.setattr(failing, "nvmlDeviceGetHandleByIndex", hanging)
        for _ in range(3):
            assert [(device.id, device.fault) for device in host.devices()] == [
                *((f"cuda:{i}", inventory.NO_ANSWER) for i in range(3)),
                ("cpu:0", None),
            ]
        assert queries == [0], "one thread waits, not one for each call"
        may_answer.set()
        until(lambda: host.devices() == before)


@pytest.mark.parametrize("call", ["nvmlInit", "nvmlDeviceGetCount", "nvmlDeviceGetUUID"])
def test_a_driver_that_hangs_at_the_start_does_not_stop_the_service(
    call: str, failing: FailingNvml, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("nvidia0", "nvidia1", "nvidia2", "nvidiactl"):
        (tmp_path / name).touch()
    monkeypatch.setattr(inventory, "DEVICES", tmp_path)
    monkeypatch.setattr(inventory, "FIRST_ANSWER_SECONDS", 0.01)
    may_answer, answer = threading.Event(), getattr(failing, call)

    def hanging(*arguments: int) -> object:
        may_answer.wait()
        return answer(*arguments)

    monkeypatch.setattr(failing, call, hanging)
    host = HostInventory(1, visible="0,1", excluded=["cuda:1"])
    found = [(device.id, device.fault) for device in host.devices()]
    assert found == [("cuda:0", inventory.NO_ANSWER), ("cpu:0", None)]
    may_answer.set()
    until(lambda: [(device.id, device.works) for device in host.devices()] == [("cuda:0", True), ("cpu:0", True)])


def test_a_driver_that_hangs_does_not_matter_to_a_service_without_gpus(
    failing: FailingNvml, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inventory, "ANSWER_SECONDS", 0.01)
    host = HostInventory(slots=1, visible="-1")
    before = host.devices()
    may_answer = threading.Event()
    with monkeypatch.context() as patched:
        patched.setattr(failing, "nvmlDeviceGetCount", may_answer.wait)
        assert host.devices() == before
        may_answer.set()


def test_a_uuid_that_could_not_be_read_is_read_later(failing: FailingNvml, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without its UUID, the XID errors of a GPU would not keep it from being leased."""
    with monkeypatch.context() as patched:
        busy = mock.Mock(side_effect=pynvml.NVMLError(pynvml.NVML_ERROR_UNKNOWN))
        patched.setattr(failing, "nvmlDeviceGetUUID", busy)
        host = HostInventory(0)
        assert [device.uuid for device in host.devices()] == [None] * 3
    assert [device.uuid for device in host.devices()] == [f"GPU-0000000{i}" for i in range(3)]


def test_the_fake_answers_only_what_the_library_has() -> None:
    """Same names of functions and of parameters. A fake that answers more would hide a call that fails on a host."""
    functions = [(name, value) for name, value in vars(NvmlHost).items() if name.startswith("nvml") and callable(value)]
    assert len(functions) > 15
    for name, fake in functions:
        real = list(inspect.signature(inspect.unwrap(getattr(pynvml, name))).parameters.values())
        required = [parameter.name for parameter in real if parameter.default is parameter.empty]
        own = list(inspect.signature(fake).parameters)[1:]
        assert own == required, name
