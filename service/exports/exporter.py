"""Exports on disk: made beside under another name, published by one rename, and found again by their names.

exports/step-00001000-hf/        what was exported
exports/.step-00001000-hf.json   of which weights: a run that went back may have others at the same step
exports/.lock                    held while one of the job is made
"""

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from trainyard.contract.locks import FileLock, LockBusy
from trainyard.contract.rundir import (
    MODEL_FILE,
    ArtifactDir,
    fsync_directory,
    read_json,
    write_json,
)
from trainyard.service.errors import CheckpointNotFound, ExportInProgress, StorageError
from trainyard.service.exports.subprocess import require_exporter, run_exporter
from trainyard.service.storage.checkpoint_files import read_manifest
from trainyard.service.storage.share import link_checkpoint

EXPORT_NAME = re.compile(r"step-([0-9]{8,})-(hf|minimind)")


class ExportRequest(NamedTuple):
    """What is to be exported. ``tokenizer``: a directory, or "byte"."""

    artifacts: ArtifactDir
    checkpoint: Path
    step: int
    format: str
    tokenizer: str
    stem: str


def is_exported(wanted: ExportRequest) -> bool:
    """Whether these very weights were exported before."""
    manifest = read_manifest(wanted.checkpoint)
    if manifest is None or MODEL_FILE not in manifest:
        raise CheckpointNotFound()
    return _directory(wanted).is_dir() and _exported(wanted) == manifest[MODEL_FILE].sha256


def run_export(wanted: ExportRequest) -> None:
    """Export. Raises StepUnavailable, DiskTrouble, ExportUnavailable, -UnderWay, -Failed, -TimedOut."""
    require_exporter()
    try:
        _make_alone(wanted)
    except OSError as error:
        raise StorageError.from_os_error(error) from error


def _make_alone(wanted: ExportRequest) -> None:
    wanted.artifacts.exports.mkdir(parents=True, exist_ok=True)
    try:
        lock = FileLock(wanted.artifacts.exports / ".lock").take()
    except LockBusy:
        raise ExportInProgress() from None
    with lock:
        if not is_exported(wanted):
            _make(wanted, lock)


def _make(wanted: ExportRequest, lock: FileLock) -> None:
    final = _directory(wanted)
    source, building = (final.with_name(f".{kind}-{final.name}") for kind in ("source", "building"))
    # The last is where the exporter itself builds.
    leftovers = (source, building, building.with_name(f".{building.name}.exporting"))
    try:
        for leftover in leftovers:
            shutil.rmtree(leftover, ignore_errors=True)
        # Linked: retention may take the checkpoint's own names away meanwhile.
        link_checkpoint(wanted.checkpoint, source)
        named = ["--tokenizer", wanted.tokenizer, "--stem", wanted.stem]
        run_exporter([str(source), "--format", wanted.format, "--out", str(building), *named], lock)
        _publish(wanted, source, building, final)
    finally:
        for leftover in leftovers:
            shutil.rmtree(leftover, ignore_errors=True)


def _publish(wanted: ExportRequest, source: Path, building: Path, final: Path) -> None:
    _note(wanted).unlink(missing_ok=True)
    shutil.rmtree(final, ignore_errors=True)
    building.rename(final)
    fsync_directory(final.parent)
    manifest = read_manifest(source) or {}
    write_json(_note(wanted), {"sha256": manifest[MODEL_FILE].sha256})


def _directory(wanted: ExportRequest) -> Path:
    return wanted.artifacts.export(wanted.step, wanted.format)


def _note(wanted: ExportRequest) -> Path:
    return _directory(wanted).with_name(f".{_directory(wanted).name}.json")


def _exported(wanted: ExportRequest) -> str | None:
    try:
        said = read_json(_note(wanted))
    except ValueError:
        return None
    return said.get("sha256") if isinstance(said, dict) else None


def list_exports(products: ArtifactDir) -> Iterator[dict[str, Any]]:
    """Every export, newest step first: ``step, format, path, files``."""
    found = products.exports.iterdir() if products.exports.is_dir() else ()
    for path in sorted(found, reverse=True):
        match = EXPORT_NAME.fullmatch(path.name)
        if match and path.is_dir() and not path.is_symlink():
            yield to_export_response(products, int(match.group(1)), match.group(2))


def to_export_response(products: ArtifactDir, step: int, form: str) -> dict[str, Any]:
    """One export that is there."""
    path = products.export(step, form)
    files = [{"name": file.name, "bytes": file.lstat().st_size} for file in sorted(path.iterdir())]
    return {"step": step, "format": form, "path": str(path), "files": files, "bytes": sum(f["bytes"] for f in files)}
