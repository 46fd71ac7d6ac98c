"""The devices of this host: GPUs from NVML, and CPU slots."""

import os
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import pynvml

from trainyard.contract.processes import MARKER, variable_of
from trainyard.contract.sidecar import SIDECAR

CACHE_SECONDS = 1.0
CPUINFO = Path("/proc/cpuinfo")


@dataclass(frozen=True)
class Device:
    """A device that a rank can use.

    ``processes``: ids of all processes on it. ``strangers``: those that belong to no attempt and no service.
    """

    id: str
    kind: str
    model: str | None = None
    memory_bytes: int | None = None
    memory_used_bytes: int | None = None
    processes: tuple[int, ...] = ()
    strangers: tuple[int, ...] = ()
    temperature_celsius: int | None = None


class Inventory(Protocol):
    """A source of devices."""

    def devices(self) -> Sequence[Device]:
        """Return every device of this host, always in the same order."""


def cpu_slots(slots: int, model: str | None = None) -> tuple[Device, ...]:
    """Return the devices ``cpu:0`` to ``cpu:{slots - 1}``."""
    return tuple(Device(f"cpu:{i}", "cpu", model) for i in range(slots))


def cpu_model(cpuinfo: Path = CPUINFO) -> str | None:
    """Return the name of this host's processor, or None if the kernel does not report it."""
    try:
        lines = cpuinfo.read_text(errors="replace").splitlines()
    except OSError:
        return None
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), None) or None


class HostInventory:
    """The devices of this host. NVML is queried at most once a second; without NVML there are no CUDA devices."""

    def __init__(self, slots: int, visible: str | None = None) -> None:
        self._cpu = cpu_slots(slots, cpu_model())
        self._visible = visible
        self._nvml = _init_nvml()
        self._lock = threading.Lock()
        self._cuda: tuple[Device, ...] = ()
        self._queried_at = float("-inf")

    def devices(self) -> Sequence[Device]:
        """Return the CUDA devices, then the CPU slots."""
        if not self._nvml:
            return self._cpu
        with self._lock:
            if time.monotonic() - self._queried_at > CACHE_SECONDS:
                self._cuda = tuple(_cuda_devices(self._visible))
                self._queried_at = time.monotonic()
            return (*self._cuda, *self._cpu)


def kind_for(device: str, devices: Sequence[Device]) -> str:
    """Resolve ``resources.device`` of a spec: ``cpu``, ``cuda``, or one device such as ``cuda:1``."""
    if device != "auto":
        return device
    return "cuda" if count_by_kind(devices, "cuda") else "cpu"


def count_by_kind(devices: Sequence[Device], kind: str) -> int:
    """Return the number of devices of a kind, or with an id."""
    return sum(kind in (device.kind, device.id) for device in devices)


def _init_nvml() -> bool:
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return False
    return True


def _cuda_devices(visible: str | None) -> Iterator[Device]:
    for index in range(pynvml.nvmlDeviceGetCount()):
        if visible is None or str(index) in visible.split(","):
            yield _cuda_device(index)


def _cuda_device(index: int) -> Device:
    handle = pynvml.nvmlDeviceGetHandleByIndex(index)
    memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
    running = tuple(process.pid for process in pynvml.nvmlDeviceGetComputeRunningProcesses(handle))
    return Device(
        id=f"cuda:{index}",
        kind="cuda",
        model=str(pynvml.nvmlDeviceGetName(handle)),
        memory_bytes=int(memory.total),
        memory_used_bytes=int(memory.used),
        temperature_celsius=_temperature(handle),
        processes=running,
        # Our processes have a marker in their environment, which is unreadable for other users' processes.
        strangers=tuple(pid for pid in running if not (variable_of(pid, MARKER) or variable_of(pid, SIDECAR))),
    )


def _temperature(handle: Any) -> int | None:
    try:
        return int(pynvml.nvmlDeviceGetTemperature(handle, pynvml.NVML_TEMPERATURE_GPU))
    except pynvml.NVMLError:
        return None


def visible_devices() -> str | None:
    """Return the service's own CUDA_VISIBLE_DEVICES if it lists indices, or None: all devices."""
    text = os.environ.get("CUDA_VISIBLE_DEVICES")
    if text is None or any(not part.strip().isdecimal() for part in text.split(",") if part):
        return None
    return text
