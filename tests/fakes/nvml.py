"""NVML's answers on four kinds of hosts, and a stand-in for the library that gives them."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pynvml

ALL_LINKED = tuple(tuple(i for i in range(8) if i != gpu) for gpu in range(8))


@dataclass
class NvmlHost:
    """What NVML reports. ``numa``: bits of nearest NUMA nodes, None if it is not supported. ``links``: peers by GPU."""

    name: str
    pci: Sequence[str]
    numa: Sequence[int | None]
    links: Sequence[Sequence[int]]
    events: list[Any] = field(default_factory=list)
    can_report_events: bool = True

    mig: dict[int, Sequence[str]] = field(default_factory=dict)
    """UUIDs of the MIG instances, by the index of a GPU in MIG mode."""

    prohibited: set[int] = field(default_factory=set)
    """GPUs whose compute mode is Prohibited."""

    recovery: dict[int, int] = field(default_factory=dict)
    """The driver's recovery action, by GPU; NONE if it is missing."""

    def __getattr__(self, name: str) -> Any:
        """Return a constant of the library. Its functions are answered by this class, or not at all."""
        if name.startswith(("NVML_", "nvmlEventType")) or name == "NVMLError":
            return getattr(pynvml, name)
        raise AttributeError(name)

    def nvmlInit(self) -> None:  # noqa: N802
        """Start."""

    def nvmlSystemGetDriverVersion(self) -> str:  # noqa: N802
        return "580.65.06"

    def nvmlDeviceGetCount(self) -> int:  # noqa: N802
        return len(self.pci)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> Any:  # noqa: N802
        return index

    def nvmlDeviceGetMigMode(self, device: Any) -> list[int]:  # noqa: N802
        if not isinstance(device, int):
            raise pynvml.NVMLError(pynvml.NVML_ERROR_INVALID_ARGUMENT)
        if not self.mig:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)
        return [int(device in self.mig)] * 2

    def nvmlDeviceGetMaxMigDeviceCount(self, device: Any) -> int:  # noqa: N802
        return 7 if device in self.mig else 0

    def nvmlDeviceGetMigDeviceHandleByIndex(self, device: Any, index: int) -> str:  # noqa: N802
        # The numbers of instances have gaps after one is destroyed.
        if not 0 < index <= len(self.mig[device]):
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_FOUND)
        return self.mig[device][index - 1]

    def nvmlDeviceGetComputeMode(self, handle: Any) -> int:  # noqa: N802
        return int(self.NVML_COMPUTEMODE_PROHIBITED if handle in self.prohibited else self.NVML_COMPUTEMODE_DEFAULT)

    def nvmlDeviceGetFieldValues(self, handle: Any, fieldIds: Sequence[int]) -> list[Any]:  # noqa: N802
        assert list(fieldIds) == [pynvml.NVML_FI_DEV_GET_GPU_RECOVERY_ACTION]
        action = self.recovery.get(handle, pynvml.NVML_GPU_RECOVERY_ACTION_NONE)
        return [SimpleNamespace(nvmlReturn=pynvml.NVML_SUCCESS, value=SimpleNamespace(uiVal=action))]

    def nvmlDeviceGetMemoryInfo(self, handle: Any) -> Any:  # noqa: N802
        return SimpleNamespace(total=(80 if isinstance(handle, int) else 10) << 30, used=1 << 30)

    def nvmlDeviceGetTemperature(self, handle: Any, sensor: int) -> int:  # noqa: N802
        if not isinstance(handle, int):
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)
        return 40

    def nvmlDeviceGetName(self, handle: Any) -> str:  # noqa: N802
        return self.name if isinstance(handle, int) else f"{self.name} MIG 1g.10gb"

    def nvmlDeviceGetComputeRunningProcesses(self, handle: Any) -> list[Any]:  # noqa: N802
        return []

    def nvmlDeviceGetUUID(self, handle: Any) -> str:  # noqa: N802
        return f"GPU-{handle:08x}" if isinstance(handle, int) else str(handle)

    def nvmlDeviceGetPciInfo(self, handle: int) -> Any:  # noqa: N802
        return SimpleNamespace(busId=self.pci[handle])

    def nvmlDeviceGetMemoryAffinity(self, handle: int, nodeSetSize: int, scope: int) -> list[int]:  # noqa: N802
        bits = self.numa[handle]
        if bits is None:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)
        return [bits, *[0] * (nodeSetSize - 1)]

    def nvmlDeviceGetP2PStatus(self, device1: int, device2: int, p2pIndex: int) -> Any:  # noqa: N802
        linked = device2 in self.links[device1]
        return pynvml.NVML_P2P_STATUS_OK if linked else pynvml.NVML_P2P_STATUS_NOT_SUPPORTED

    def nvmlEventSetCreate(self) -> str:  # noqa: N802
        return "events"

    def nvmlEventSetFree(self, eventSet: str) -> None:  # noqa: N802
        """End."""

    def nvmlDeviceRegisterEvents(self, handle: Any, eventTypes: int, eventSet: str) -> None:  # noqa: N802
        assert eventTypes == self.nvmlEventTypeXidCriticalError
        if not self.can_report_events:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)

    def nvmlEventSetWait_v2(self, eventSet: str, timeoutms: int) -> Any:  # noqa: N802
        if not self.events:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_TIMEOUT)
        event = self.events.pop(0)
        if isinstance(event, pynvml.NVMLError):
            raise event
        return event


def dgx_h100() -> NvmlHost:
    """Eight GPUs at NVSwitches, four on each NUMA node."""
    pci = [f"00000000:{bus}:00.0" for bus in ("1B", "43", "52", "61", "9D", "C3", "D1", "DF")]
    return NvmlHost("NVIDIA H100 80GB HBM3", pci, [1] * 4 + [2] * 4, ALL_LINKED)


def bridged_pairs() -> NvmlHost:
    """Four PCIe cards; NVLink bridges join 0 with 2 and 1 with 3."""
    pci = [f"00000000:{bus}:00.0" for bus in ("17", "31", "B1", "CA")]
    return NvmlHost("NVIDIA A100 80GB PCIe", pci, [1, 1, 2, 2], [[2], [3], [0], [1]])


def two_sockets() -> NvmlHost:
    """Four PCIe cards without NVLink; 0 and 3 are on the first socket."""
    pci = [f"00000000:{bus}:00.0" for bus in ("01", "81", "A1", "C1")]
    return NvmlHost("NVIDIA L40S", pci, [1, 2, 2, 1], [[]] * 4)


def old_driver() -> NvmlHost:
    """Two cards whose driver reports neither NUMA nodes nor events."""
    return NvmlHost("Tesla V100", ["00000000:3B:00.0", "00000000:5E:00.0"], [None, None], [[], []], [], False)
