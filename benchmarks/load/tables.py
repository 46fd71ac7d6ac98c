"""What the load bench prints: a figure beside its goal, and what it was measured on."""

import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path


@dataclass(frozen=True)
class Figure:
    """One measurement. ``most``: the goal is to stay below ``goal``, else to reach it; None: told for what it is."""

    what: str
    value: float
    unit: str
    goal: float | None = None
    most: bool = True

    @property
    def met(self) -> bool:
        """Whether the goal is reached."""
        if self.goal is None:
            return True
        return self.value < self.goal if self.most else self.value >= self.goal

    def line(self) -> str:
        """As it is printed."""
        shown = f"{self.what:<58} {self.value:>10,.1f} {self.unit}"
        if self.goal is None:
            return shown
        bound = "under" if self.most else "at least"
        return f"{shown}   ({bound} {self.goal:,g}{'' if self.met else '; MISSED'})"


def quantile(values: Sequence[float], share: float) -> float:
    """The value below which ``share`` of them lie."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * share))]


def machine() -> str:
    """Cores, model, load and date: without them no figure says anything."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")
    cores, load = len(os.sched_getaffinity(0)), os.getloadavg()[0]
    when = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    return f"{cores} cores of {model}, load {load:.1f} at the beginning, Python {platform.python_version()}, {when}"
