"""`trainyard doctor`: check this host, and with --gpu test training on its GPU.

Exit code 0: no fault; 1: a fault; 2: wrong usage, or --gpu without a GPU.
"""

import argparse
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path

from trainyard.contract.stdio import run_command
from trainyard.worker.cuda_errors import cuda_advice
from trainyard.worker.doctor.facts import host_description
from trainyard.worker.doctor.host import check_host
from trainyard.worker.doctor.report import REPORT_NAMES, CheckResult, DoctorReport, HealthLevel
from trainyard.worker.openmp import limit_spinning

NO_FAULT, FAULTY, USAGE = 0, 1, 2
FURTHER = "`trainyard doctor` without --gpu checks the driver."


def main() -> int:
    """Run the doctor on this process's arguments, and return its exit code."""
    parsed = _parse()
    device = parsed.device or ("cuda" if parsed.gpu else None)
    if device is not None:
        # OpenMP and cuBLAS read these when torch is loaded. Without the second, deterministic runs fail on a GPU.
        limit_spinning(os.environ)
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    if device == "cuda" and (missing := missing_gpu()) is not None:
        print(f"trainyard doctor: there is no usable GPU: {missing}", file=sys.stderr)
        return USAGE
    report = DoctorReport(version("trainyard"), host_description())
    # The folder is tried first: the checks may take minutes.
    if parsed.out is not None and not _succeeds(parsed.out, lambda: try_folder(parsed.out)):
        return FAULTY
    if not parsed.json:
        print(report.text().splitlines()[0], flush=True)
    for result in _results(device):
        report.results.append(result)
        if not parsed.json:
            print(result.line(), flush=True)
    print(report.json() if parsed.json else report.summary(), flush=True)
    if parsed.out is not None:
        if not _succeeds(parsed.out, lambda: report.write(parsed.out)):
            return FAULTY
        print(f"written: {', '.join(str(parsed.out / name) for name in REPORT_NAMES)}", file=sys.stderr)
    return FAULTY if report.health is HealthLevel.FAULT else NO_FAULT


def try_folder(folder: Path) -> None:
    """Make the folder, and a file in it that is deleted at once. Raises OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder):
        pass


def _succeeds(folder: Path, write: Callable[[], object]) -> bool:
    """Return True after ``write``; if it fails, print why and return False."""
    try:
        write()
    except OSError as error:
        print(f"trainyard doctor: the report cannot be written in {folder}: {error.strerror}", file=sys.stderr)
        return False
    return True


def _results(device: str | None) -> Iterator[CheckResult]:
    yield from check_host(os.environ)
    if device is not None:
        from trainyard.worker.doctor.promises import check_promises

        yield from check_promises(device)


def missing_gpu() -> str | None:
    """Return why no GPU can be used here, in one line, or None."""
    try:
        import torch

        from trainyard.worker.distributed import cuda_problem
    except (ImportError, OSError) as error:
        return f"torch cannot be loaded: {error}".splitlines()[0]
    problem = cuda_problem()
    if problem is None:
        return None
    version_of_torch = "" if torch.__version__ in problem else f" (torch {torch.__version__})"
    return f"{problem}{version_of_torch}. {cuda_advice(problem) or FURTHER}"


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="trainyard doctor", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    parser.add_argument("--gpu", action="store_true", help="also test training on the GPU, in about four minutes")
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="write the report to DIR/doctor.txt and DIR/doctor.json"
    )
    # The same trials in small sizes on a CPU, for the tests.
    parser.add_argument("--device", choices=["cpu", "cuda"], help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(run_command("trainyard doctor", main))
