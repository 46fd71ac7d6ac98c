"""The ratios of each kind of processor, in `baselines/<processor>.json`: a later run says which has become worse."""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).parent / "baselines"
TOLERANCE = 0.05
UNITS = ("amx_bf16", "avx512_bf16", "avx512f", "avx2")
"""Flags of a processor that decide its speed in bf16, the best first. Virtual machines hide the model's name."""


@dataclass(frozen=True)
class Ratio:
    """A ratio of two things that were measured side by side. ``higher_is_better`` is false for a share of time."""

    name: str
    value: float
    higher_is_better: bool = True

    def worse_than(self, before: float) -> float:
        """Return by which share it is worse than ``before``; negative if it is better."""
        return (before - self.value) / before if self.higher_is_better else (self.value - before) / before


def processor(cpuinfo: str) -> str:
    """Return a file name for the processor that /proc/cpuinfo describes, such as ``amd-epyc-9r14-avx512-bf16``."""
    model = re.search(r"^model name\s*:\s*(.*)$", cpuinfo, re.MULTILINE)
    flags = set((re.search(r"^flags\s*:\s*(.*)$", cpuinfo, re.MULTILINE) or [""] * 2)[1].split())
    unit = next((name for name in UNITS if name in flags), "")
    words = f"{model[1] if model else 'unknown'} {unit}".lower().replace("(r)", "").replace("(tm)", "")
    return "-".join(re.findall(r"[a-z0-9]+", words))


def read(file: Path) -> dict[str, float]:
    """Return the ratios of ``file``, or {} if there is none yet."""
    return dict(json.loads(file.read_text())) if file.exists() else {}


def write(file: Path, known: Mapping[str, float], ratios: Iterable[Ratio]) -> None:
    """Store ``known`` with the values of ``ratios``."""
    file.parent.mkdir(exist_ok=True)
    values = {**known, **{ratio.name: round(ratio.value, 3) for ratio in ratios}}
    file.write_text(json.dumps(dict(sorted(values.items())), indent=2) + "\n")


def verdicts(known: Mapping[str, float], ratios: Iterable[Ratio]) -> list[str]:
    """Return a line for each ratio that is worse than its baseline by more than `TOLERANCE`."""
    return [
        f"{ratio.name} fell: {ratio.value:.3g}, {100 * ratio.worse_than(known[ratio.name]):.0f} % worse than "
        f"{known[ratio.name]:.3g}"
        for ratio in ratios
        if ratio.name in known and ratio.worse_than(known[ratio.name]) > TOLERANCE
    ]
