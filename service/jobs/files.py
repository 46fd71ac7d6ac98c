"""Removes a job's files: its run directory, and what it kept in a ``save_dir`` of its own."""

import logging
import shutil
from pathlib import Path

from contract.rundir import RunDir
from service.settings import Settings

log = logging.getLogger("trainyard")


def remove(settings: Settings, job_id: str, save_dir: str | None) -> None:
    """Remove them. What cannot be removed stays, and the log says so: the record is gone by now."""
    run = RunDir(settings.runs / job_id)
    for path in {run.path, run.products(save_dir).path}:
        if path.name == job_id and _ours(path, settings):
            shutil.rmtree(path, onerror=_complain)


def _ours(path: Path, settings: Settings) -> bool:
    """Looked at once more: a directory may have become a link since the job was submitted."""
    real = path.resolve()
    return real.name == path.name and any(real.is_relative_to(r) for r in (*settings.save_roots, settings.home))


def _complain(_function: object, path: str, error: object) -> None:
    reason = error[1] if isinstance(error, tuple) else error
    if not isinstance(reason, FileNotFoundError):
        log.warning("could not remove a file of a deleted job: %s: %s", path, type(reason).__name__)
