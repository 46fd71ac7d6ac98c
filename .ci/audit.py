"""Compare the pinned packages of constraints.txt with the advisories that pip-audit finds: `make audit`.

The exit code is 1 if a package has a known vulnerability. If the database cannot be reached, or knows none of the
packages, this is printed and the exit code is 0: pip-audit itself would report that nothing was found.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

CONSTRAINTS = Path(__file__).parents[1] / "constraints.txt"
SECONDS = 300
SKIPPED = "skipped: pip-audit"


def main() -> int:
    """Run the audit and return an exit code."""
    command = [sys.executable, "-m", "pip_audit", "--requirement", str(CONSTRAINTS), "--no-deps", "--disable-pip"]
    try:
        done = subprocess.run(
            [*command, "--format", "json", "--progress-spinner", "off"], capture_output=True, text=True, timeout=SECONDS
        )
        report = json.loads(done.stdout)
    except subprocess.TimeoutExpired:
        return _skip(f"no response from the database within {SECONDS} s")
    except ValueError:
        return _skip(done.stderr.strip().rpartition("\n")[2] or f"exit code {done.returncode}")
    return judge(report["dependencies"])


def judge(packages: list[dict[str, Any]]) -> int:
    """Print what was found in the packages of a report, and return the exit code."""
    known = [package for package in packages if "skip_reason" not in package]
    if not known:
        return _skip("the database that was reached knows none of the packages")
    vulnerable = [(package, found) for package in known for found in package["vulns"]]
    for package, found in vulnerable:
        fixed = ", ".join(found["fix_versions"]) or "none"
        print(f"{package['name']} {package['version']}: {found['id']}; fixed in: {fixed}")
    print(f"{len(known)} of {len(packages)} packages compared, {len(vulnerable)} known vulnerabilities")
    return 1 if vulnerable else 0


def _skip(reason: str) -> int:
    print(f"{SKIPPED}: {reason}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
