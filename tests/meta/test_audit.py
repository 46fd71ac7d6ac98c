"""`make audit` fails for a known vulnerability, and says so if it could not look."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[2] / ".ci" / "audit.py"
SAFE = {"name": "idna", "version": "3.20", "vulns": []}
UNKNOWN = {"name": "torch", "skip_reason": "Dependency not found on PyPI and could not be audited: torch (2.13.0)"}
VULNERABLE = {
    "name": "h11",
    "version": "0.14.0",
    "vulns": [{"id": "PYSEC-2025-1", "fix_versions": ["0.16.0"], "aliases": ["CVE-2025-43859"], "description": ""}],
}


@pytest.fixture
def audit() -> Any:
    spec = importlib.util.spec_from_file_location("audit", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_vulnerability_is_named_with_its_fix(audit: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert audit.judge([SAFE, VULNERABLE, UNKNOWN]) == 1
    assert "h11 0.14.0: PYSEC-2025-1; fixed in: 0.16.0" in capsys.readouterr().out
    assert audit.judge([SAFE, UNKNOWN]) == 0
    assert "1 of 2 packages compared, 0 known vulnerabilities" in capsys.readouterr().out


def test_a_database_that_knows_no_package_is_not_taken_for_a_good_result(
    audit: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    assert audit.judge([UNKNOWN]) == 0
    assert capsys.readouterr().out.startswith("skipped: pip-audit: ")


def test_an_audit_that_cannot_run_is_skipped_by_name(
    audit: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # Stands for a Python without pip-audit, and for one that ends with an error.
    monkeypatch.setattr(audit.sys, "executable", "/bin/false")
    assert audit.main() == 0
    assert capsys.readouterr().out == "skipped: pip-audit: exit code 1\n"


def test_the_pinned_packages_are_what_is_compared(audit: Any) -> None:
    assert (SCRIPT.parents[1] / "constraints.txt").samefile(audit.CONSTRAINTS)
