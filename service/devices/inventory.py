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
RETRY_SECONDS = 10.0
"""Time between two attempts to use a driver that is installed but not loaded."""

ANSWER_SECONDS = 5.0
"""How long a caller waits for NVML. Its calls block for minutes, or forever, if a GPU or its firmware hangs."""

FIRST_ANSWER_SECONDS = 60.0
"""How long the first caller waits. Without persistence mode, the driver needs seconds to initialize each GPU."""

NO_ANSWER = f"the driver has not answered for more than {ANSWER_SECONDS:g} s"
NO_INSTANCE = "its MIG mode is on, and it has no MIG instance"
PROHIBITED = "its compute mode is Prohibited"

CPUINFO = Path("/proc/cpuinfo")
DEVICES = Path("/dev")
NODE_SET_WORDS = 2
"""64-bit words of a set of NUMA nodes."""

PCI_ADDRESS = re.compile(r"(?:([0-9a-fA-F]{1,8}):)?([0-9a-fA-F]{1,2}):([0-9a-fA-F]{1,2})(?:\.[0-7])?")

UUID_PREFIXES = ("GPU-", "MIG-")

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
    being leased. ``fault``: why no job can use this GPU, such as the driver's error if the driver does not answer for
    it. Such a GPU is not leased. ``mig_uuid``: UUID of the MIG instance that jobs use if the GPU is in MIG mode.
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
    mig_uuid: str | None = None

    @property
    def works(self) -> bool:
        """Whether the device has no known error. A device with an error is not leased."""
        return not self.xid_errors and self.fault is None

    def is_named(self, name: str) -> bool:
        """Return whether ``name`` is its id, one of its UUIDs or its PCI address, in any of the usual spellings."""
        names = {self.id, self.uuid, self.mig_uuid, self.pci_bus_id}
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
    """Facts about a GPU that do not change while the host runs."""

    uuid: str | None
    pci_bus_id: str | None
    numa_node: int | None
    link: str | None
    nvlink_peers: tuple[str, ...]


NO_FACTS = GpuFacts(uuid=None, pci_bus_id=None, numa_node=None, link=None, nvlink_peers=())


class HostInventory:
    """The devices of this host. NVML is queried at most once a second; without NVML there are no CUDA devices.

    If the driver no longer answers for a GPU, the GPU stays in the list with its ``fault``. All others can be used, and
    a job with the device "auto" does not start on the CPU. The same holds for the GPUs in /dev until the driver answers
    for the first time. If the driver hangs, no GPU is leased until it answers.

    ``visible``: CUDA_VISIBLE_DEVICES of the service, or None if it is not set. ``excluded``: ids, UUIDs or PCI
    addresses of devices that are left out.
    """

    def __init__(self, slots: int, visible: str | None = None, excluded: Sequence[str] = ()) -> None:
        self._cpu = _without(cpu_slots(slots, cpu_model()), excluded)
        self._slots = slots
        self._visible = visible
        self._excluded = excluded
        self._facts: tuple[GpuFacts | None, ...] = ()
        self._last_seen: dict[int, Device] = {}
        self._driver = _Driver()
        self._lock = threading.Lock()
        self._cuda: tuple[Device, ...] = ()
        self._query: _Query | None = None
        self._has_answered = False
        self._has_checked_names = False
        self._queried_at = float("-inf")

    def devices(self) -> Sequence[Device]:
        """Return the CUDA devices, then the CPU slots.

        Takes at most ANSWER_SECONDS if the driver hangs, and FIRST_ANSWER_SECONDS until it has answered once.
        """
        if self._driver.is_absent:
            return self._cpu
        with self._lock:
            if time.monotonic() - self._queried_at > CACHE_SECONDS:
                self._refresh()
                self._queried_at = time.monotonic()
            return (*self._cuda, *self._cpu)

    def _refresh(self) -> None:
        """Query NVML in a separate thread. If it hangs, the thread continues, and its result is used later."""
        waits = self._query is None
        if self._query is None:
            self._query = _Query(lambda: _without(self._query_gpus(), self._excluded))
        seconds = ANSWER_SECONDS if self._has_answered else FIRST_ANSWER_SECONDS
        if not self._query.wait(seconds if waits else 0.0):
            if waits:
                log.warning("the driver of the GPUs hangs; no GPU is leased until it answers")
            # Not without them: a job with the device "auto" would start on the CPU.
            known = self._cuda or _without((_unknown_gpu(index) for index in self._visible_files()), self._excluded)
            self._cuda = tuple(_as_faulty(device, NO_ANSWER) for device in known)
            return
        query, self._query = self._query, None
        self._cuda, self._has_answered = query.result(), True

    def _query_gpus(self) -> list[Device]:
        if not self._driver.is_ready() and not self._driver.is_absent:
            return self._without_driver(self._driver.error)
        gpus = list(self._cuda_devices()) if not self._driver.is_absent else []
        if not self._has_checked_names:
            self._has_checked_names = True
            self._log_unknown_names(_named_gpus(self._facts, ",".join([self._visible or "", *self._excluded])))
        return gpus

    def _without_driver(self, error: str) -> list[Device]:
        """Return the GPUs that the driver reported before, or those in /dev, with ``error``."""
        known = list(self._last_seen) or self._visible_files()
        return [self._with_fault(index, error) for index in known]

    def _visible_files(self) -> list[int]:
        """Return the indices of the GPUs in /dev that the service may use."""
        gpus = [_unknown_gpu(index) for index in device_files()]
        return sorted(visible_indices(self._visible, gpus))

    def _cuda_devices(self) -> Iterator[Device]:
        try:
            count = pynvml.nvmlDeviceGetCount()
        except pynvml.NVMLError as error:
            yield from self._without_driver(str(error))
            return
        if len(self._facts) != count or any(_answers(i) for i, facts in enumerate(self._facts) if facts is None):
            self._facts = tuple(_gpu_facts(count))
        shown = visible_indices(self._visible, _named_gpus(self._facts, self._visible))
        for index, facts in enumerate(self._facts):
            if index in shown:
                yield self._cuda_device(index, facts)

    def _cuda_device(self, index: int, facts: GpuFacts | None) -> Device:
        before = self._last_seen.get(index)
        try:
            device = _cuda_device(index, facts or NO_FACTS)
        except pynvml.NVMLError as error:
            return self._with_fault(index, str(error))
        if device.fault is None and before is not None and before.fault is not None:
            log.info("a GPU can be used again", extra={"devices": device.id})
        elif device.fault is not None and (before is None or before.fault != device.fault):
            log.warning("a GPU cannot be used: %s", device.fault, extra={"devices": device.id})
        self._last_seen[index] = device
        return device

    def _with_fault(self, index: int, error: str) -> Device:
        """Return the GPU as at the last answer of the driver, with ``error`` and without values that change."""
        before = self._last_seen.get(index) or _unknown_gpu(index)
        device = _as_faulty(before, error)
        if before.fault != device.fault:
            log.warning("the driver does not answer for a GPU: %s", error, extra={"devices": device.id})
        self._last_seen[index] = device
        return device

    def _log_unknown_names(self, cuda: Sequence[Device]) -> None:
        known = [*cpu_slots(self._slots), *cuda]
        for name in self._excluded:
            if not any(device.is_named(name) for device in known):
                log.warning("TRAINYARD_EXCLUDE_DEVICES names a device that this host does not have: %s", name)
        names = [name for name in _split(self._visible or "") if name]
        shown = visible_indices(self._visible, cuda)
        if cuda and len(shown) < len(names) and "-1" not in names:
            log.warning(
                "CUDA_VISIBLE_DEVICES is %s, and this host has %d of these GPUs: a name that it does not know ends "
                "the list",
                self._visible,
                len(shown),
            )


class _Driver:
    """NVML, which is initialized once.

    ``is_absent``: NVML is not installed, so this host has no GPUs. ``error``: why NVML cannot be queried.
    """

    def __init__(self) -> None:
        self.is_absent = False
        self.error = ""
        self._ready = False
        self._tried_at = float("-inf")

    def is_ready(self) -> bool:
        """Return whether NVML can be queried. A driver that is loaded after the service has started is found later."""
        if self._ready or self.is_absent or time.monotonic() - self._tried_at < RETRY_SECONDS:
            return self._ready
        first = self._tried_at == float("-inf")
        self._tried_at = time.monotonic()
        try:
            pynvml.nvmlInit()
            self._ready = True
        except pynvml.NVMLError as error:
            self.is_absent, self.error = error.value == pynvml.NVML_ERROR_LIBRARY_NOT_FOUND, str(error)
            if first and not self.is_absent:
                log.warning("GPUs cannot be used until the driver answers: %s; run `trainyard doctor`", error)
        return self._ready


class _Query:
    """A call in a separate daemon thread, which does not keep the process from ending."""

    def __init__(self, ask: Callable[[], tuple[Device, ...]]) -> None:
        self._ask = ask
        self._ended = threading.Event()
        self._answer: tuple[Device, ...] = ()
        self._error: BaseException | None = None
        threading.Thread(target=self._run, name="nvml", daemon=True).start()

    def _run(self) -> None:
        try:
            self._answer = self._ask()
        except BaseException as error:
            self._error = error
        finally:
            self._ended.set()

    def wait(self, seconds: float | None) -> bool:
        return self._ended.wait(seconds)

    def result(self) -> tuple[Device, ...]:
        if self._error is not None:
            raise self._error
        return self._answer


def _unknown_gpu(index: int) -> Device:
    return Device(f"cuda:{index}", "cuda")


def _as_faulty(device: Device, fault: str) -> Device:
    unknown: dict[str, Any] = {"memory_used_bytes": None, "temperature_celsius": None}
    return replace(device, **unknown, processes=(), strangers=(), fault=fault)


def _without(devices: Iterable[Device], excluded: Sequence[str]) -> tuple[Device, ...]:
    return tuple(device for device in devices if not any(device.is_named(name) for name in excluded))


def same_pci_address(one: str, other: str) -> bool:
    """Return whether both are the same PCI address, as ``3b:00.0``, ``0000:3b:00`` and ``00000000:3B:00.0`` are."""
    return _pci_numbers(one) == _pci_numbers(other) is not None


def _pci_numbers(text: str) -> tuple[int, int, int] | None:
    found = PCI_ADDRESS.fullmatch(text.strip())
    return (int(found[1] or "0", 16), int(found[2], 16), int(found[3], 16)) if found is not None else None


def kind_for(device: str, devices: Sequence[Device]) -> str:
    """Return ``device``, the ``resources.device`` of a spec, with ``auto`` resolved to ``cuda`` or ``cpu``."""
    if device != "auto":
        return device
    return "cuda" if count_by_kind(devices, "cuda") else "cpu"


def count_by_kind(devices: Sequence[Device], kind: str) -> int:
    """Return the number of devices of a kind, or with an id."""
    return sum(kind in (device.kind, device.id) for device in devices)


def cuda_visible(ids: Iterable[str], devices: Sequence[Device]) -> str:
    """Return the value of CUDA_VISIBLE_DEVICES that makes CUDA number the GPUs ``ids`` of ``devices`` 0, 1, ...

    UUIDs, because CUDA leaves out what NVML still counts, such as a GPU that is lost or that a container may not use:
    then its numbers are not NVML's. Numbers only if a UUID is not known.
    """
    gpus = [name for name in ids if name.startswith("cuda:")]
    known = {device.id: device.mig_uuid or device.uuid for device in devices}
    uuids = [known.get(name) for name in gpus]
    return ",".join(uuid or "" for uuid in uuids) if all(uuids) else ",".join(gpus).replace("cuda:", "")


def device_files() -> list[int]:
    """Return the numbers of the GPUs that have a file in /dev."""
    names = (re.fullmatch(r"nvidia(\d+)", file.name) for file in DEVICES.glob("nvidia*"))
    return sorted(int(name[1]) for name in names if name is not None)


def _cuda_device(index: int, facts: GpuFacts) -> Device:
    handle = pynvml.nvmlDeviceGetHandleByIndex(index)
    mode = _if_supported(lambda: pynvml.nvmlDeviceGetComputeMode(handle))
    fault = PROHIBITED if mode == pynvml.NVML_COMPUTEMODE_PROHIBITED else None
    # CUDA uses only the first instance of a GPU in MIG mode.
    part, mig_uuid = handle, None
    if _is_in_mig_mode(handle):
        instance = _first_instance(handle)
        mig_uuid = _if_supported(lambda: str(pynvml.nvmlDeviceGetUUID(instance))) if instance is not None else None
        part, fault = (handle, NO_INSTANCE) if instance is None else (instance, fault)
    # A GPU that shares the host's memory reports no memory. A GPU in a virtual machine reports no processes.
    memory = _if_supported(lambda: pynvml.nvmlDeviceGetMemoryInfo(part))
    processes = _if_supported(lambda: pynvml.nvmlDeviceGetComputeRunningProcesses(part))
    running = tuple(process.pid for process in processes or ())
    return Device(
        id=f"cuda:{index}",
        kind="cuda",
        model=_if_supported(lambda: str(pynvml.nvmlDeviceGetName(part))),
        memory_bytes=int(memory.total) if memory is not None else None,
        memory_used_bytes=int(memory.used) if memory is not None else None,
        temperature_celsius=_or_none(lambda: int(pynvml.nvmlDeviceGetTemperature(handle, pynvml.NVML_TEMPERATURE_GPU))),
        processes=running,
        # Our processes have a marker in their environment, which is unreadable for other users' processes.
        strangers=tuple(pid for pid in running if not (variable_of(pid, MARKER) or variable_of(pid, SIDECAR))),
        fault=fault,
        mig_uuid=mig_uuid,
        **vars(facts),
    )


def _is_in_mig_mode(handle: Any) -> bool:
    current_and_pending = _if_supported(lambda: pynvml.nvmlDeviceGetMigMode(handle))
    return current_and_pending is not None and current_and_pending[0] == pynvml.NVML_DEVICE_MIG_ENABLE


def _first_instance(handle: Any) -> Any | None:
    count = _if_supported(lambda: pynvml.nvmlDeviceGetMaxMigDeviceCount(handle)) or 0
    found = (_or_none(lambda: pynvml.nvmlDeviceGetMigDeviceHandleByIndex(handle, i)) for i in range(count))  # noqa: B023
    return next((instance for instance in found if instance is not None), None)


def _named_gpus(facts: Sequence[GpuFacts | None], names: str | None) -> list[Device]:
    """Return the GPUs with their names. MIG instances are queried only if ``names``, of a setting, has one."""
    with_instances = "MIG-" in (names or "")
    return [
        Device(
            f"cuda:{index}",
            "cuda",
            uuid=gpu.uuid if gpu is not None else None,
            pci_bus_id=gpu.pci_bus_id if gpu is not None else None,
            mig_uuid=_mig_uuid(index) if with_instances else None,
        )
        for index, gpu in enumerate(facts)
    ]


def _mig_uuid(index: int) -> str | None:
    return _or_none(lambda: _cuda_device(index, NO_FACTS).mig_uuid)


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
        try:
            # XID errors are stored by UUID. If it cannot be read now, it is read again later.
            uuid = _if_supported(lambda: str(pynvml.nvmlDeviceGetUUID(handle)))  # noqa: B023 - called at once
        except pynvml.NVMLError:
            yield None
            continue
        yield GpuFacts(
            uuid=uuid,
            pci_bus_id=_or_none(lambda: _text(pynvml.nvmlDeviceGetPciInfo(handle).busId)),  # noqa: B023
            numa_node=_or_none(lambda: _numa_node(handle)),  # noqa: B023
            link="nvlink" if peers else "pcie" if count > 1 else None,
            nvlink_peers=peers,
        )


def _answers(index: int) -> bool:
    return _or_none(lambda: pynvml.nvmlDeviceGetUUID(pynvml.nvmlDeviceGetHandleByIndex(index))) is not None


def _has_nvlink(one: Any, other: Any) -> bool:
    # Also true for GPUs that are connected through an NVSwitch.
    status = _or_none(lambda: pynvml.nvmlDeviceGetP2PStatus(one, other, pynvml.NVML_P2P_CAPS_INDEX_NVLINK))
    return status is not None and status == pynvml.NVML_P2P_STATUS_OK


def _numa_node(handle: Any) -> int | None:
    # One bit for each NUMA node whose memory is nearest to the GPU. If there are several, none is preferred.
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
    """Return the answer of NVML, or None if the query fails."""
    try:
        return query()
    except pynvml.NVMLError:
        return None


def visible_devices() -> str | None:
    """Return the service's own CUDA_VISIBLE_DEVICES; None means all devices."""
    return os.environ.get("CUDA_VISIBLE_DEVICES")


def visible_indices(visible: str | None, gpus: Sequence[Device]) -> frozenset[int]:
    """Return the indices of the ``gpus`` that ``visible``, a value of CUDA_VISIBLE_DEVICES, names. None names all.

    ``gpus``: all GPUs of the host in NVML's order. As in CUDA, a name is an index or the beginning of a UUID, and a
    name that is neither ends the list: "-1" and "NoDevFiles" hide every GPU.
    """
    if visible is None:
        return frozenset(range(len(gpus)))
    found: set[int] = set()
    for name in _split(visible):
        matches = [index for index, gpu in enumerate(gpus) if _is_called(gpu, index, name)]
        if len(matches) == 1:
            found.add(matches[0])
        elif matches or not (name.startswith(UUID_PREFIXES) and any(gpu.uuid is None for gpu in gpus)):
            break  # a name that is missing may be that of a lost GPU, whose UUID is not known
    return frozenset(found)


def _is_called(gpu: Device, index: int, name: str) -> bool:
    if name.isdecimal():
        return int(name) == index
    return name.startswith(UUID_PREFIXES) and any((uuid or "").startswith(name) for uuid in (gpu.uuid, gpu.mig_uuid))


def _split(visible: str) -> list[str]:
    return [part.strip() for part in visible.split(",")]
