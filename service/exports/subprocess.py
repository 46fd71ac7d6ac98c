"""Runs the worker's exporter as a child process: the service itself has no torch, and a child can be ended."""

import importlib.util
import os
import signal
import subprocess
import sys

from trainyard.contract.locks import FileLock
from trainyard.service.errors import ExportFailed, ExportTimedOut, ExportUnavailable
from trainyard.service.launch.environment import IMPORT_ROOT, inherited

WORKER_EXPORT = (sys.executable, "-P", "-m", "trainyard.worker.checkpoint.export")
"""All that the service knows of the exporter. -P: a folder named worker/ where the service was started is not ours."""

TIMEOUT_SECONDS = 900.0
ERROR_PREFIX = "trainyard export: "
MAX_REASON = 1000


def require_exporter() -> None:
    """Raise ExportUnavailable on a host that cannot export."""
    if importlib.util.find_spec("torch") is None or importlib.util.find_spec("safetensors") is None:
        raise ExportUnavailable()


def run_exporter(arguments: list[str], lock: FileLock, seconds: float | None = None) -> None:
    """Export, within ``seconds``. The child holds ``lock`` too: it stays taken while a child lives that we left behind.

    Raises ExportFailed with the exporter's reason, and ExportTimedOut.
    """
    child = subprocess.Popen(
        [*WORKER_EXPORT, *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env=_environment(),
        start_new_session=True,
        pass_fds=[lock.descriptor],
    )
    try:
        _, said = child.communicate(timeout=seconds or TIMEOUT_SECONDS)
    except subprocess.TimeoutExpired:
        raise ExportTimedOut() from None
    finally:
        _end(child)
    if child.returncode != 0:
        raise ExportFailed(_reason(said.decode(errors="replace"), child.returncode))


def _environment() -> dict[str, str]:
    # No device: an export is a copy, and devices are leased.
    return {**inherited(dict(os.environ)), "PYTHONPATH": IMPORT_ROOT, "CUDA_VISIBLE_DEVICES": ""}


def _end(child: "subprocess.Popen[bytes]") -> None:
    if child.poll() is None:
        os.killpg(child.pid, signal.SIGKILL)
        child.communicate()


def _reason(said: str, status: int) -> str:
    """The exporter's own word where it has one, else how it ended."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    told = next((line.removeprefix(ERROR_PREFIX) for line in reversed(lines) if line.startswith(ERROR_PREFIX)), None)
    if told is not None:
        return f"{told[:1].upper()}{told[1:MAX_REASON]}."
    last = lines[-1][:MAX_REASON] if lines else "it said nothing"
    ended = f"was ended by signal {-status}" if status < 0 else f"ended with status {status}"
    return f"The exporter {ended}: {last}"
