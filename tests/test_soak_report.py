"""What `make soak` prints and writes: its seed first, and at the end what was injected, how often, and what held."""

import json
import os
import subprocess
import sys
from pathlib import Path

from tests.soak_report import SoakReport, report

ROOT = Path(__file__).parents[1]

LONG = """
import pytest
from tests.soak_report import seed

@pytest.mark.soak
def test_good(account):
    account.faults["server killed"] += 1200
    account.figure("away, s", 2.0)
    account.figure("away, s", 1.0)
    account.invariants.append("nothing was lost")

@pytest.mark.soak
def test_bad(account):
    account.faults["agent killed"] += 1
    account.invariants.append("nobody may believe this")
    assert False

@pytest.mark.soak
def test_silent():
    pass

def test_short(account):
    account.faults["not of the long form"] += 1
"""


def pytest_run(folder: Path, *arguments: str) -> str:
    (folder / "test_long.py").write_text(LONG)
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "tests.soak_report",
        "-p",
        "no:cacheprovider",
        "-c",
        str(ROOT / "pyproject.toml"),
    ]
    environment = {**os.environ, "TRAINYARD_SOAK_SEED": "4711", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*command, f"--rootdir={folder}", *arguments, str(folder)],
        capture_output=True,
        text=True,
        env=environment,
        cwd=folder,
    )
    return done.stdout + done.stderr


def test_seed_and_account(tmp_path: Path) -> None:
    out = pytest_run(tmp_path, "-m", "soak")
    assert "soak: TRAINYARD_SOAK_SEED=4711 does the same again" in out
    told = out.partition("what was injected, how often, and what held (seed 4711)")[2]
    assert "test_long.py::test_good: passed" in told
    assert "    1,200 x server killed" in told
    assert "  away, s: median 2.00, worst 2.00, of 2" in told
    assert "  held: nothing was lost" in told
    assert "test_long.py::test_bad: failed" in told
    assert "nobody may believe this" not in told
    assert "test_silent" not in told
    written = json.loads((tmp_path / "soak-report.json").read_text())
    assert (written["seed"], written["injected"]) == (4711, 1201)
    good, bad = written["tests"]
    assert (good["outcome"], good["injected"]) == ("passed", {"server killed": 1200})
    assert good["held"] == ["nothing was lost"]
    assert good["figures"] == {"away, s": [2.0, 1.0]}
    assert (bad["outcome"], bad["injected"], bad["held"]) == ("failed", {"agent killed": 1}, [])


def test_the_short_form_prints_no_account(tmp_path: Path) -> None:
    assert "what was injected" not in pytest_run(tmp_path, "-m", "not soak")


def test_what_became_of_a_test_that_nobody_saw_is_unknown() -> None:
    account = SoakReport("test_x")
    account.faults["kill"] += 1
    assert report([account], {})[0] == "test_x: unknown"
