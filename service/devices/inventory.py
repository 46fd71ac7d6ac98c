"""The devices of this host: GPUs from NVML, and CPU slots."""

import logging
import os
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, TypeVar

import pynvml

from trainyard.contract.processes import MARKER, variable_of
from trainyard.contract.sidecar import SIDECAR

CACHE_SECONDS = 1.0
CPUINFO = Path("/proc/cpuinfo")
DEVICES = Path("/dev")
NODE_SET_WORDS = 2
"""64-bit words of a set of NUMA nodes."""

PCI_ADDRESS = re.compile(r"(?:([0-9a-fA-F]{1,8}):)?([0-9a-fA-F]{1,2}):([0-9a-fA-F]{1,2})(?:\.[0-7])?")

UNSUPPORTED = frozenset(
    {pynvml.NVML_ERROR_NOT_SUPPORTED, pynvml.NVML_ERROR_NO_PERMISSION, pynvml.NVML_ERROR_FUNCTION_NOT_FOUND}
)
"""NVML errors of a working GPU: its card, driver or partition does not support the query."""

T = TypeVar("T")

log = logging.getLogger("trainyard")


@dataclass(frozen=True)
class Device:
    """A device that a rank can use.

    ``processes``: ids of all processes on it. ``strangers``: those that belong to no attempt and no service.
    ``link``: ``nvlink`` if an NVLink leads to another GPU of this host, ``pcie`` if there are others without one, else
    None. ``nvlink_peers``: ids of the GPUs at its NVLinks. ``xid_errors``: numbers of the errors that keep it from
    being leased. ``fault``: the driver's error, if the driver does not answer for this GPU. Such a GPU is not leased.
    """

    id: str
    kind: str
    model: str | None = None
    memory_bytes: int | None = None
    memory_used_bytes: int | None = None
    processes: tuple[int, ...] = ()
    strangers: tuple[int, ...] = ()
    temperature_celsius: int | None = None
    uuid: str | None = None
    pci_bus_id: str | None = None
    numa_node: int | None = None
    link: str | None = None
    nvlink_peers: tuple[str, ...] = ()
    xid_errors: tuple[int, ...] = ()
    fault: str | None = None

    @property
    def works(self) -> bool:
        """Whether the device has no known error. A device with an error is not leased."""
        return not self.xid_errors and self.fault is None

    def is_named(self, name: str) -> bool:
        """Return whether ``name`` is its id, its UUID or its PCI address. The latter in any of the usual spellings."""
        names = {self.id, self.uuid, self.pci_bus_id}
        return name in names or (self.pci_bus_id is not None and same_pci_address(name, self.pci_bus_id))


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


@dataclass(frozen=True)
class GpuFacts:
    """What does not change while the host runs."""

    uuid: str | None
    pci_bus_id: str | None
    numa_node: int | None
    link: str | None
    nvlink_peers: tuple[str, ...]


NO_FACTS = GpuFacts(uuid=None, pci_bus_id=None, numa_node=None, link=None, nvlink_peers=())


class HostInventory:
    """The devices of this host. NVML is queried at most once a second; without NVML there are no CUDA devices.

    If the driver no longer answers for a GPU, the GPU stays in the list with its ``fault``. All others can be used, and
    a job with the device "auto" does not start on the CPU. The same holds for the GPUs in /dev if the driver has not
    answered at all since the start: it is asked again. ``excluded``: ids, UUIDs or PCI addresses of devices that
    are left out.
    """

    def __init__(self, slots: int, visible: str | None = None, excluded: Sequence[str] = ()) -> None:
        self._cpu = _without(cpu_slots(slots, cpu_model()), excluded)
        self._visible = visible
        self._excluded = excluded
        self._facts: tuple[GpuFacts | None, ...] = ()
        self._last_seen: dict[int, Device] = {}
        self._has_nvml, self._answers = _init_nvml()
        self._lock = threading.Lock()
        self._cuda: tuple[Device, ...] = ()
        self._queried_at = float("-inf")
        known = [*cpu_slots(slots), *(self._cuda_devices() if self._has_nvml and excluded else ())]
        for name in excluded:
            if not any(device.is_named(name) for device in known):
                log.warning("TRAINYARD_EXCLUDE_DEVICES names a device that this host does not have: %s", name)

    def devices(self) -> Sequence[Device]:
        """Return the CUDA devices, then the CPU slots."""
        if not self._has_nvml:
            return self._cpu
        with self._lock:
            if time.monotonic() - self._queried_at > CACHE_SECONDS:
                self._cuda = _without(self._cuda_devices(), self._excluded)
                self._queried_at = time.monotonic()
            return (*self._cuda, *self._cpu)

    def _cuda_devices(self) -> Iterator[Device]:
        try:
            if not self._answers:
                pynvml.nvmlInit()
                self._answers = True
            count = pynvml.nvmlDeviceGetCount()
        except pynvml.NVMLError as error:
            known = self._last_seen or filter(self._is_visible, device_files())
            yield from [self._with_fault(index, error) for index in known]
            return
        if len(self._facts) != count or None in self._facts:
            self._facts = tuple(_gpu_facts(count))
        for index, facts in enumerate(self._facts):
            if self._is_visible(index):
                yield self._cuda_device(index, facts)

    def _is_visible(self, index: int) -> bool:
        return self._visible is None or str(index) in self._visible.split(",")

    def _cuda_device(self, index: int, facts: GpuFacts | None) -> Device:
        before = self._last_seen.get(index)
        try:
            device = _cuda_device(index, facts or NO_FACTS)
        except pynvml.NVMLError as error:
            return self._with_fault(index, error)
        if before is not None and before.fault is not None:
            log.info("the driver answers for a GPU again", extra={"devices": device.id})
        self._last_seen[index] = device
        return device

    def _with_fault(self, index: int, error: pynvml.NVMLError) -> Device:
        """Return the GPU as it was at the last answer of the driver, with the error, without values that change."""
        before = self._last_seen.get(index) or Device(f"cuda:{index}", "cuda")
        unknown: dict[str, Any] = {"memory_used_bytes": None, "temperature_celsius": None}
        device = replace(before, **unknown, processes=(), strangers=(), fault=str(error))
        if before.fault != device.fault:
            log.warning("the driver does not answer for a GPU: %s", error, extra={"devices": device.id})
        self._last_seen[index] = device
        return device


def _without(devices: Iterable[Device], excluded: Sequence[str]) -> tuple[Device, ...]:
    return tuple(device for device in devices if not any(device.is_named(name) for name in excluded))


def same_pci_address(one: str, other: str) -> bool:
    """Return whether both are one PCI address: ``3b:00.0``, ``0000:3b:00`` and ``00000000:3B:00.0`` are."""
    return _pci_numbers(one) == _pci_numbers(other) is not None


def _pci_numbers(text: str) -> tuple[int, int, int] | None:
    found = PCI_ADDRESS.fullmatch(text.strip())
    return (int(found[1] or "0", 16), int(found[2], 16), int(found[3], 16)) if found is not None else None


def kind_for(device: str, devices: Sequence[Device]) -> str:
    """Resolve ``resources.device`` of a spec: ``cpu``, ``cuda``, or one device such as ``cuda:1``."""
    if device != "auto":
        return device
    return "cuda" if count_by_kind(devices, "cuda") else "cpu"


def count_by_kind(devices: Sequence[Device], kind: str) -> int:
    """Return the number of devices of a kind, or with an id."""
    return sum(kind in (device.kind, device.id) for device in devices)


def _init_nvml() -> tuple[bool, bool]:
    """Return whether this host has NVML, and whether the driver answers. A driver that does not may do so later."""
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        if error.value == pynvml.NVML_ERROR_LIBRARY_NOT_FOUND:
            return False, False
        log.warning("the NVIDIA driver does not answer, so no job gets a GPU: %s; run `trainyard doctor`", error)
        return True, False
    return True, True


def device_files() -> list[int]:
    """Return the numbers of the GPUs that have a file in /dev."""
    return sorted(
        int(found[1]) for file in DEVICES.glob("nvidia*") if (found := re.fullmatch(r"nvidia(\d+)", file.name))
    )


def _cuda_device(index: int, facts: GpuFacts) -> Device:
    handle = pynvml.nvmlDeviceGetHandleByIndex(index)
    # A GPU that shares the host's memory reports no memory. A GPU in a virtual machine reports no processes.
    memory = _if_supported(lambda: pynvml.nvmlDeviceGetMemoryInfo(handle))
    processes = _if_supported(lambda: pynvml.nvmlDeviceGetComputeRunningProcesses(handle))
    running = tuple(process.pid for process in processes or ())
    return Device(
        id=f"cuda:{index}",
        kind="cuda",
        model=_if_supported(lambda: str(pynvml.nvmlDeviceGetName(handle))),
        memory_bytes=int(memory.total) if memory is not None else None,
        memory_used_bytes=int(memory.used) if memory is not None else None,
        temperature_celsius=_or_none(lambda: int(pynvml.nvmlDeviceGetTemperature(handle, pynvml.NVML_TEMPERATURE_GPU))),
        processes=running,
        # Our processes have a marker in their environment, which is unreadable for other users' processes.
        strangers=tuple(pid for pid in running if not (variable_of(pid, MARKER) or variable_of(pid, SIDECAR))),
        **vars(facts),
    )


def _gpu_facts(count: int) -> Iterator[GpuFacts | None]:
    """Yield the facts of each GPU, or None if the driver does not answer for it."""
    handles = [_or_none(lambda: pynvml.nvmlDeviceGetHandleByIndex(index)) for index in range(count)]  # noqa: B023
    for own, handle in enumerate(handles):
        if handle is None:
            yield None
            continue
        peers = tuple(
            f"cuda:{index}"
            for index, other in enumerate(handles)
            if index != own and other is not None and _has_nvlink(handle, other)
        )
        yield GpuFacts(
            uuid=_or_none(lambda: str(pynvml.nvmlDeviceGetUUID(handle))),  # noqa: B023 - called at once
            pci_bus_id=_or_none(lambda: _text(pynvml.nvmlDeviceGetPciInfo(handle).busId)),  # noqa: B023
            numa_node=_or_none(lambda: _numa_node(handle)),  # noqa: B023
            link="nvlink" if peers else "pcie" if count > 1 else None,
            nvlink_peers=peers,
        )


def _has_nvlink(one: Any, other: Any) -> bool:
    # Also true for GPUs that are connected through an NVSwitch.
    status = _or_none(lambda: pynvml.nvmlDeviceGetP2PStatus(one, other, pynvml.NVML_P2P_CAPS_INDEX_NVLINK))
    return status is not None and status == pynvml.NVML_P2P_STATUS_OK


def _numa_node(handle: Any) -> int | None:
    # A set of bits: the NUMA nodes whose memory is nearest to the GPU. With more than one, none is preferred.
    words = pynvml.nvmlDeviceGetMemoryAffinity(handle, NODE_SET_WORDS, pynvml.NVML_AFFINITY_SCOPE_NODE)
    nodes = [64 * i + bit for i, word in enumerate(words) for bit in range(64) if int(word) >> bit & 1]
    return nodes[0] if len(nodes) == 1 else None


def _text(value: bytes | str) -> str:
    return value.decode() if isinstance(value, bytes) else value


def _if_supported(query: Callable[[], T]) -> T | None:
    """Return the answer of NVML, or None if the GPU does not support the query. Raises NVMLError if it fails."""
    try:
        return query()
    except pynvml.NVMLError as error:
        if error.value not in UNSUPPORTED:
            raise
        return None


def _or_none(query: Callable[[], T]) -> T | None:
    """Return the answer of NVML, or None if the driver or the card does not know it."""
    try:
        return query()
    except pynvml.NVMLError:
        return None


def visible_devices() -> str | None:
    """Return the indices in the service's own CUDA_VISIBLE_DEVICES, without spaces; None means all devices."""
    text = os.environ.get("CUDA_VISIBLE_DEVICES")
    if text is None:
        return None
    parts = [part.strip() for part in text.split(",")]
    # CUDA ignores a negative index and everything after it: "-1" hides every device.
    negative = [position for position, part in enumerate(parts) if part[:1] == "-" and part[1:].isdecimal()]
    parts = parts[: negative[0]] if negative else parts
    return ",".join(parts) if all(part.isdecimal() for part in parts if part) else None
