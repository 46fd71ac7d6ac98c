"""What this machine has, as far as a look at the kernel's files tells."""

import os
import platform
from dataclasses import dataclass
from pathlib import Path

from client.words import size

BF16_INSTRUCTIONS = frozenset({"avx512_bf16", "amx_bf16", "bf16"})
"""Words in /proc/cpuinfo, on x86 and on Arm."""


@dataclass(frozen=True)
class Machine:
    """``cores`` are those this process may use; ``gpus`` the NVIDIA devices that have a device file.

    ``bf16``: whether bfloat16 is quicker here than float32. On CPUs without instructions for it, it is far slower.
    """

    cores: int
    memory_bytes: int
    gpus: int
    bf16: bool = False

    @classmethod
    def found(cls, devices: Path = Path("/dev"), cpuinfo: Path = Path("/proc/cpuinfo")) -> "Machine":
        """What is here."""
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        gpus = len(list(devices.glob("nvidia[0-9]*")))
        bf16 = gpus > 0 or not BF16_INSTRUCTIONS.isdisjoint(cpuinfo.read_text().split())
        return cls(len(os.sched_getaffinity(0)), memory, gpus, bf16)

    @property
    def ranks(self) -> int:
        """Worker processes the demo uses: two where there is room, because one has nothing to agree with."""
        return min(2, self.gpus or self.cores)

    def __str__(self) -> str:
        gpus = f"{self.gpus} GPU{'s' if self.gpus > 1 else ''}" if self.gpus else "no GPU"
        ranks = f"{self.ranks} rank{'s' if self.ranks > 1 else ''} on the {'GPU' if self.gpus else 'CPU'}"
        cores = f"{self.cores} core{'s' if self.cores > 1 else ''}"
        return f"{cores}, {size(self.memory_bytes)} memory, {gpus}, Python {platform.python_version()}: {ranks}"
