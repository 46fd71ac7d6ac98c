"""Exports on disk: built under a temporary name, published by a rename, and listed by their names.

exports/step-00001000-hf/        the export
exports/.step-00001000-hf.json   hash of the exported weights: a rewound run may have others at the same step
exports/.lock                    locked while an export of the job is in progress
"""

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from trainyard.contract.locks import FileLock, LockBusy
from trainyard.contract.rundir import MODEL_FILE, ArtifactDir, fsync_directory, read_json, write_json
from trainyard.service.errors import CheckpointNotFound, ExportInProgress, StorageError
from trainyard.service.exports.subprocess import require_exporter, run_exporter
from trainyard.service.storage.checkpoint_files import read_manifest
from trainyard.service.storage.share import link_checkpoint

EXPORT_NAME = re.compile(r"step-([0-9]{8,})-(hf|minimind)")


class ExportRequest(NamedTuple):
    """A checkpoint to export, and how. ``tokenizer``: a directory, or "byte". ``stem``: of MiniMind's file name."""

    artifacts: ArtifactDir
    checkpoint: Path
    step: int
    format: str
    tokenizer: str
    stem: str


def is_exported(request: ExportRequest) -> bool:
    """Return whether exactly these weights were exported before."""
    manifest = read_manifest(request.checkpoint)
    if manifest is None or MODEL_FILE not in manifest:
        raise CheckpointNotFound()
    return _directory(request).is_dir() and _exported_sha256(request) == manifest[MODEL_FILE].sha256


def run_export(request: ExportRequest) -> None:
    """Export the checkpoint, unless it is exported already.

    Raises StepUnavailable, StorageError, ExportUnavailable, ExportInProgress, ExportFailed or ExportTimedOut.
    """
    require_exporter()
    try:
        request.artifacts.exports.mkdir(parents=True, exist_ok=True)
        try:
            lock = FileLock(request.artifacts.exports / ".lock").take()
        except LockBusy:
            raise ExportInProgress() from None
        with lock:
            if not is_exported(request):
                _export(request, lock)
    except OSError as error:
        raise StorageError.from_os_error(error) from error


def _export(request: ExportRequest, lock: FileLock) -> None:
    final = _directory(request)
    source, building = (final.with_name(f".{kind}-{final.name}") for kind in ("source", "building"))
    # The last is the exporter's own temporary directory.
    temporary = (source, building, building.with_name(f".{building.name}.exporting"))
    try:
        for directory in temporary:
            shutil.rmtree(directory, ignore_errors=True)
        # Retention may remove the checkpoint during the export; the links keep its files.
        link_checkpoint(request.checkpoint, source)
        names = ["--tokenizer", request.tokenizer, "--stem", request.stem]
        run_exporter([str(source), "--format", request.format, "--out", str(building), *names], lock)
        _publish(request, source, building, final)
    finally:
        for directory in temporary:
            shutil.rmtree(directory, ignore_errors=True)


def _publish(request: ExportRequest, source: Path, building: Path, final: Path) -> None:
    # The hash is removed first and written last: an interrupted publication is not taken for an export.
    _hash_file(request).unlink(missing_ok=True)
    shutil.rmtree(final, ignore_errors=True)
    building.rename(final)
    fsync_directory(final.parent)
    manifest = read_manifest(source) or {}
    write_json(_hash_file(request), {"sha256": manifest[MODEL_FILE].sha256})


def _directory(request: ExportRequest) -> Path:
    return request.artifacts.export(request.step, request.format)


def _hash_file(request: ExportRequest) -> Path:
    return _directory(request).with_name(f".{_directory(request).name}.json")


def _exported_sha256(request: ExportRequest) -> str | None:
    try:
        content = read_json(_hash_file(request))
    except ValueError:
        return None
    return content.get("sha256") if isinstance(content, dict) else None


def list_exports(artifacts: ArtifactDir) -> Iterator[dict[str, Any]]:
    """Yield a description of each export, newest step first."""
    paths = artifacts.exports.iterdir() if artifacts.exports.is_dir() else ()
    for path in sorted(paths, reverse=True):
        match = EXPORT_NAME.fullmatch(path.name)
        if match and path.is_dir() and not path.is_symlink():
            yield describe_export(artifacts, int(match.group(1)), match.group(2))


def describe_export(artifacts: ArtifactDir, step: int, form: str) -> dict[str, Any]:
    """Return ``step, format, path, files, bytes`` of an existing export."""
    path = artifacts.export(step, form)
    files = [{"name": file.name, "bytes": file.lstat().st_size} for file in sorted(path.iterdir())]
    return {"step": step, "format": form, "path": str(path), "files": files, "bytes": sum(f["bytes"] for f in files)}
