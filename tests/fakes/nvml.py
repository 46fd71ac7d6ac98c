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

    NVMLError = pynvml.NVMLError
    NVML_TEMPERATURE_GPU = pynvml.NVML_TEMPERATURE_GPU
    NVML_P2P_CAPS_INDEX_NVLINK = pynvml.NVML_P2P_CAPS_INDEX_NVLINK
    NVML_P2P_STATUS_OK = pynvml.NVML_P2P_STATUS_OK
    NVML_AFFINITY_SCOPE_NODE = pynvml.NVML_AFFINITY_SCOPE_NODE
    NVML_ERROR_LIBRARY_NOT_FOUND = pynvml.NVML_ERROR_LIBRARY_NOT_FOUND
    NVML_ERROR_TIMEOUT = pynvml.NVML_ERROR_TIMEOUT
    NVML_ERROR_GPU_IS_LOST = pynvml.NVML_ERROR_GPU_IS_LOST
    nvmlEventTypeXidCriticalError = pynvml.nvmlEventTypeXidCriticalError  # noqa: N815 - NVML's names

    def nvmlInit(self) -> None:  # noqa: N802
        """Start."""

    def nvmlDeviceGetCount(self) -> int:  # noqa: N802
        return len(self.pci)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:  # noqa: N802
        return index

    def nvmlDeviceGetMemoryInfo(self, _: int) -> Any:  # noqa: N802
        return SimpleNamespace(total=80 << 30, used=1 << 30)

    def nvmlDeviceGetTemperature(self, _: int, __: int) -> int:  # noqa: N802
        return 40

    def nvmlDeviceGetName(self, _: int) -> str:  # noqa: N802
        return self.name

    def nvmlDeviceGetComputeRunningProcesses(self, _: int) -> list[Any]:  # noqa: N802
        return []

    def nvmlDeviceGetUUID(self, index: int) -> str:  # noqa: N802
        return f"GPU-{index:08x}"

    def nvmlDeviceGetPciInfo(self, index: int) -> Any:  # noqa: N802
        return SimpleNamespace(busId=self.pci[index])

    def nvmlDeviceGetMemoryAffinity(self, index: int, words: int, _: int) -> list[int]:  # noqa: N802
        bits = self.numa[index]
        if bits is None:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)
        return [bits, *[0] * (words - 1)]

    def nvmlDeviceGetP2PStatus(self, one: int, other: int, _: int) -> Any:  # noqa: N802
        linked = other in self.links[one]
        return pynvml.NVML_P2P_STATUS_OK if linked else pynvml.NVML_P2P_STATUS_NOT_SUPPORTED

    def nvmlEventSetCreate(self) -> str:  # noqa: N802
        return "events"

    def nvmlEventSetFree(self, _: str) -> None:  # noqa: N802
        """End."""

    def nvmlDeviceRegisterEvents(self, _: int, kind: int, __: str) -> None:  # noqa: N802
        assert kind == self.nvmlEventTypeXidCriticalError
        if not self.can_report_events:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)

    def nvmlEventSetWait_v2(self, _: str, __: int) -> Any:  # noqa: N802
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
