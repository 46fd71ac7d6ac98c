"""The report of ``make soak``: which faults were injected, how often, which invariants held, and measured figures.

A test requests the fixture ``account`` and fills it in. ``make soak`` prints its seed first and all reports at the
end, and writes them as JSON to TRAINYARD_SOAK_REPORT (``soak-report.json``). TRAINYARD_SOAK_SEED repeats a run.
"""

import json
import os
import random
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

SEED = "TRAINYARD_SOAK_SEED"
REPORT = "TRAINYARD_SOAK_REPORT"


@dataclass
class SoakReport:
    """What one test did, and found."""

    test: str
    faults: Counter[str] = field(default_factory=Counter)
    invariants: list[str] = field(default_factory=list)
    figures: dict[str, list[float]] = field(default_factory=dict)

    def figure(self, what: str, value: float) -> None:
        """One measurement, e.g. ``figure("orphan ended, s", 0.31)``."""
        self.figures.setdefault(what, []).append(value)

    def lines(self, outcome: str) -> list[str]:
        """As it is printed. What held is said only of a test that passed."""
        shown = [f"{self.test}: {outcome}"]
        shown += [f"  {count:>9,} x {what}" for what, count in sorted(self.faults.items())]
        shown += [f"  {what}: {spread(values)}" for what, values in self.figures.items()]
        return shown + [f"  held: {each}" for each in self.invariants if outcome == "passed"]

    def to_json(self, outcome: str) -> dict[str, Any]:
        return {
            "test": self.test,
            "outcome": outcome,
            "injected": dict(sorted(self.faults.items())),
            "held": self.invariants if outcome == "passed" else [],
            "figures": self.figures,
        }


def spread(values: Sequence[float]) -> str:
    """Median and worst."""
    ordered = sorted(values)
    return f"median {ordered[len(ordered) // 2]:.2f}, worst {ordered[-1]:.2f}, of {len(ordered)}"


ACCOUNTS = pytest.StashKey[list[SoakReport]]()


def seed() -> int:
    """The seed of this run of the long forms."""
    return int(os.environ[SEED])


def chosen(name: str, default: float) -> float:
    """A number of a long form that the environment may set: TRAINYARD_SOAK_KILLS and so on."""
    return float(os.environ.get(f"TRAINYARD_SOAK_{name}", default))


def report(accounts: Sequence[SoakReport], outcomes: Mapping[str, str]) -> list[str]:
    """All accounts, in the order of their tests."""
    return [line for each in accounts for line in each.lines(outcomes.get(each.test, "unknown"))]


def as_json(accounts: Sequence[SoakReport], outcomes: Mapping[str, str]) -> str:
    """All accounts with the seed and the time, and the sum of what was injected."""
    document = {
        "seed": seed(),
        "written_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "injected": sum(sum(each.faults.values()) for each in accounts),
        "tests": [each.to_json(outcomes.get(each.test, "unknown")) for each in accounts],
    }
    return json.dumps(document, indent=1) + "\n"


def pytest_configure(config: pytest.Config) -> None:
    config.stash[ACCOUNTS] = []
    os.environ.setdefault(SEED, str(random.SystemRandom().randrange(2**31)))


def pytest_report_header(config: pytest.Config) -> str | None:
    return f"soak: {SEED}={seed()} does the same again" if is_long(config) else None


def is_long(config: pytest.Config) -> bool:
    """Whether the long forms are run."""
    return "soak" in config.option.markexpr and "not soak" not in config.option.markexpr


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    accounts = config.stash[ACCOUNTS]
    if not accounts or not is_long(config):
        return
    calls = [each for kind in ("passed", "failed") for each in terminalreporter.stats.get(kind, [])]
    outcomes = {each.nodeid: each.outcome for each in calls}
    terminalreporter.section(f"what was injected, how often, and what held (seed {seed()})")
    for line in report(accounts, outcomes):
        terminalreporter.write_line(line)
    file = Path(os.environ.get(REPORT, "soak-report.json"))
    file.write_text(as_json(accounts, outcomes))
    terminalreporter.write_line(f"written to {file.resolve()}")


@pytest.fixture
def account(request: pytest.FixtureRequest) -> Iterator[SoakReport]:
    """This test's account."""
    made = SoakReport(request.node.nodeid)
    yield made
    if made.faults or made.figures:
        request.config.stash[ACCOUNTS].append(made)
