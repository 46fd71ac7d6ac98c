"""Did the kernel kill for want of memory? Asked of the cgroup, so that another tenant's kill is not taken for ours."""

from dataclasses import dataclass
from pathlib import Path
from typing import Self

CGROUPS = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class MemoryEvents:
    """The cgroup's count of out-of-memory kills when the attempt began; None where there is no such count."""

    file: Path | None
    before: int | None

    @classmethod
    def of_this_cgroup(cls) -> Self:
        """The count of the cgroup (version 2) that this process and its children live in."""
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            if line.startswith("0::"):
                file = CGROUPS / line[3:].lstrip("/") / "memory.events"
                return cls(file, _kills(file))
        return cls(None, None)

    def killed(self) -> int:
        """Kills since the attempt began; 0 where nobody counts."""
        now = _kills(self.file) if self.file is not None else None
        return now - self.before if now is not None and self.before is not None else 0


def _kills(file: Path) -> int | None:
    try:
        counts = dict(line.split() for line in file.read_text().splitlines())
        return int(counts["oom_kill"])
    except (OSError, ValueError, KeyError):
        return None
