"""The devices of this host."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pynvml
import pytest

from tests.fakes.nvml import NvmlHost
from trainyard.contract import processes
from trainyard.contract.processes import MARKER
from trainyard.service.devices import inventory
from trainyard.service.devices.inventory import HostInventory, cpu_slots, kind_for


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


def test_cuda_devices_and_who_is_on_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_the_processor_has_the_name_that_the_kernel_gives_it(tmp_path: Path) -> None:
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
    monkeypatch.setattr(inventory, "DEVICES", tmp_path)
    host = HostInventory(slots=1)
    assert "the NVIDIA driver does not answer, so no job gets a GPU" in caplog.text
    assert [(device.id, device.works) for device in host.devices()] == [
        ("cuda:0", False),
        ("cuda:1", False),
        ("cpu:0", True),
    ]
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


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (None, None),
        ("0,2", "0,2"),
        ("0, 2", "0,2"),
        ("", ""),
        ("-1", ""),
        ("1,-1,2", "1"),
        ("GPU-abc", None),
        ("GPU-abc,-1", None),
    ],
)
def test_which_cards_the_service_may_see(
    monkeypatch: pytest.MonkeyPatch, text: str | None, expected: str | None
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if text is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", text)
    assert inventory.visible_devices() == expected
