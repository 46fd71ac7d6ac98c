"""Runs the worker's exporter as a child process: the service does not import torch, and a child can be killed."""

import contextlib
import importlib.util
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from trainyard.contract.locks import FileLock
from trainyard.service.errors import ExportFailed, ExportTimedOut, ExportUnavailable, ServiceStopping
from trainyard.service.launch.environment import IMPORT_ROOT, inherited, roots_environment

WORKER_EXPORT = (sys.executable, "-P", "-m", "trainyard.worker.checkpoint.export")
"""-P: without it a folder `trainyard/` in the working directory would be imported instead."""

TIMEOUT_SECONDS = 900.0
POLL_SECONDS = 0.5
ERROR_PREFIX = "trainyard export: "
MAX_REASON = 1000


def require_exporter() -> None:
    """Raise ExportUnavailable if torch or safetensors is not installed."""
    if importlib.util.find_spec("torch") is None or importlib.util.find_spec("safetensors") is None:
        raise ExportUnavailable()


def run_exporter(
    arguments: list[str],
    lock: FileLock,
    stopping: threading.Event,
    seconds: float | None = None,
    data_roots: Sequence[Path] = (),
    save_roots: Sequence[Path] = (),
) -> None:
    """Run the exporter for at most ``seconds``, and until ``stopping`` is set.

    Raises ExportFailed with the exporter's reason, ExportTimedOut or ServiceStopping.
    ``data_roots``, ``save_roots``: the directories below which it may read and write, if any.
    """
    child = subprocess.Popen(
        [*WORKER_EXPORT, *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env=_environment(data_roots, save_roots),
        start_new_session=True,
        # The child inherits the lock: if the service is killed, it stays locked until the child has ended.
        pass_fds=[lock.descriptor],
    )
    try:
        stderr = _wait(child, stopping, seconds or TIMEOUT_SECONDS)
    finally:
        if child.poll() is None:
            os.killpg(child.pid, signal.SIGKILL)
            child.communicate()
    if child.returncode != 0:
        raise ExportFailed(_reason(stderr.decode(errors="replace"), child.returncode))


def _wait(child: subprocess.Popen[bytes], stopping: threading.Event, seconds: float) -> bytes:
    """Return the standard error of the child after its end."""
    deadline = time.monotonic() + seconds
    while not stopping.is_set():
        with contextlib.suppress(subprocess.TimeoutExpired):
            return child.communicate(timeout=min(POLL_SECONDS, max(deadline - time.monotonic(), 0)))[1]
        if time.monotonic() >= deadline:
            raise ExportTimedOut()
    raise ServiceStopping()


def _environment(data_roots: Sequence[Path], save_roots: Sequence[Path]) -> dict[str, str]:
    # No CUDA device: an export runs on the CPU, and devices are leased to attempts.
    return {
        **inherited(dict(os.environ)),
        **roots_environment(data_roots, save_roots),
        "PYTHONPATH": IMPORT_ROOT,
        "CUDA_VISIBLE_DEVICES": "",
    }


def _reason(stderr: str, status: int) -> str:
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    reason = next((line.removeprefix(ERROR_PREFIX) for line in reversed(lines) if line.startswith(ERROR_PREFIX)), None)
    if reason is not None:
        return f"{reason[:1].upper()}{reason[1:MAX_REASON]}."
    last = lines[-1][:MAX_REASON] if lines else "no output"
    ended = f"was ended by signal {-status}" if status < 0 else f"ended with status {status}"
    return f"The exporter {ended}: {last}"
