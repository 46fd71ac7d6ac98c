"""The output of the load benchmark: figures with their goals, and the machine they were measured on."""

import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path


@dataclass(frozen=True)
class Figure:
    """One measurement. ``is_limit``: the value must be below ``goal``, else reach it; None: there is no goal."""

    what: str
    value: float
    unit: str
    goal: float | None = None
    is_limit: bool = True

    @property
    def met(self) -> bool:
        if self.goal is None:
            return True
        return self.value < self.goal if self.is_limit else self.value >= self.goal

    def line(self) -> str:
        text = f"{self.what:<58} {self.value:>10,.1f} {self.unit}"
        if self.goal is None:
            return text
        bound = "under" if self.is_limit else "at least"
        return f"{text}   ({bound} {self.goal:,g}{'' if self.met else '; MISSED'})"


def quantile(values: Sequence[float], share: float) -> float:
    """Return the value below which ``share`` of the values are."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * share))]


def machine() -> str:
    """Return cores, CPU model, load and date: no figure means anything without them."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")
    cores, load = len(os.sched_getaffinity(0)), os.getloadavg()[0]
    when = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    return f"{cores} cores of {model}, load {load:.1f} at the beginning, Python {platform.python_version()}, {when}"
