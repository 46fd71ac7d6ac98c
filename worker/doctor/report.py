"""Results of the doctor's checks, and the report of all as text and JSON. Standard library only."""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import Any

REPORT_NAMES = ("doctor.txt", "doctor.json")


class HealthLevel(StrEnum):
    """Result of a check. A fault breaks runs or a promise; a warning costs time, or matters only for some runs."""

    OK = "ok"
    WARNING = "warning"
    FAULT = "fault"


@dataclass(frozen=True)
class CheckResult:
    """One line of the report.

    ``advice``: what to do, "" if nothing. ``data``: the facts and numbers behind it, for JSON. ``device``: name of the
    card or processor on which the numbers were measured, or None.
    """

    check: str
    health: HealthLevel
    message: str
    advice: str = ""
    data: Mapping[str, Any] = field(default_factory=dict)
    device: str | None = None

    def line(self) -> str:
        """Return the line for people."""
        where = f" [{self.device}]" if self.device else ""
        advice = f"\n{'':26}-> {self.advice}" if self.advice else ""
        return f"{self.health:8} {self.check:16} {self.message}{where}{advice}"


def ok(check: str, message: str, **data: Any) -> CheckResult:
    return CheckResult(check, HealthLevel.OK, message, data=data)


def warning(check: str, message: str, advice: str, **data: Any) -> CheckResult:
    return CheckResult(check, HealthLevel.WARNING, message, advice, data)


def fault(check: str, message: str, advice: str, **data: Any) -> CheckResult:
    return CheckResult(check, HealthLevel.FAULT, message, advice, data)


@dataclass
class DoctorReport:
    """All results of one run of the doctor, in order."""

    version: str
    host: str
    at: datetime = field(default_factory=lambda: datetime.now(UTC))
    results: list[CheckResult] = field(default_factory=list)

    @property
    def health(self) -> HealthLevel:
        """The worst result."""
        found = {result.health for result in self.results}
        return next((health for health in (HealthLevel.FAULT, HealthLevel.WARNING) if health in found), HealthLevel.OK)

    def summary(self) -> str:
        """Return the last line of the text."""
        counts = {health: sum(result.health is health for result in self.results) for health in HealthLevel}
        warnings, faults = _count(counts[HealthLevel.WARNING], "warning"), _count(counts[HealthLevel.FAULT], "fault")
        return f"{counts[HealthLevel.OK]} ok, {warnings}, {faults}"

    def text(self) -> str:
        """Return the whole report for people."""
        head = f"trainyard {self.version} on {self.host}, {self.at.isoformat(timespec='seconds')}"
        return "\n".join([head, *(result.line() for result in self.results), self.summary()]) + "\n"

    def document(self) -> dict[str, Any]:
        """Return the JSON document."""
        return {
            "object": "doctor",
            "version": self.version,
            "host": self.host,
            "at": self.at.isoformat(timespec="seconds").replace("+00:00", "Z"),
            "health": self.health,
            "checks": [asdict(result) for result in self.results],
        }

    def json(self) -> str:
        """Return the JSON document on one line."""
        return json.dumps(_without_nan(self.document()), default=str, allow_nan=False)

    def write(self, folder: Path) -> list[Path]:
        """Write doctor.txt and doctor.json, and return their paths. Raises OSError."""
        folder.mkdir(parents=True, exist_ok=True)
        files = [folder / name for name in REPORT_NAMES]
        for file, content in zip(files, (self.text(), self.json() + "\n"), strict=True):
            file.write_text(content, encoding="utf-8")
        return files


def _without_nan(value: Any) -> Any:
    """Return ``value`` with None for NaN and infinity, which JSON lacks and a broken card may compute."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {name: _without_nan(each) for name, each in value.items()}
    return [_without_nan(each) for each in value] if isinstance(value, list | tuple) else value


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
