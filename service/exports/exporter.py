"""Exports on disk: built under a temporary name, published by a rename, and listed by their names.

exports/step-00001000-hf/        the export
exports/.step-00001000-hf.json   hash of the exported weights: a rewound run may have others at the same step
exports/.lock                    locked while an export of the job is in progress
"""

import re
import shutil
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from trainyard.contract.allowed_paths import directory_inside
from trainyard.contract.locks import FileLock, LockBusy
from trainyard.contract.rundir import MODEL_FILE, ArtifactDir, fsync_directory, read_json, write_json
from trainyard.service.errors import CheckpointNotFound, ExportInProgress, StorageError
from trainyard.service.exports.subprocess import require_exporter, run_exporter
from trainyard.service.storage.checkpoint_files import read_manifest
from trainyard.service.storage.share import link_checkpoint

EXPORT_NAME = re.compile(r"step-[0-9]{8,}-(hf|minimind)")


class ExportRequest(NamedTuple):
    """A checkpoint to export, and how. ``tokenizer``: a directory, or "byte". ``stem``: of MiniMind's file name.

    ``data_roots``, ``save_roots``: the directories below which the tokenizer and all other paths must lie, if any.
    """

    artifacts: ArtifactDir
    checkpoint: Path
    step: int
    format: str
    tokenizer: str
    stem: str
    data_roots: tuple[Path, ...] = ()
    save_roots: tuple[Path, ...] = ()


def is_exported(request: ExportRequest) -> bool:
    """Return whether exactly these weights were exported before."""
    manifest = read_manifest(request.checkpoint, request.save_roots)
    if manifest is None or MODEL_FILE not in manifest:
        raise CheckpointNotFound()
    return _directory(request).is_dir() and _exported_sha256(request) == manifest[MODEL_FILE].sha256


def run_export(request: ExportRequest, stopping: threading.Event) -> bool:
    """Export the checkpoint. Return False if another request has exported it meanwhile.

    Raises StepUnavailable, StorageError, ExportUnavailable, ExportInProgress, ExportFailed, ExportTimedOut, or
    ServiceStopping once ``stopping`` is set.
    """
    require_exporter()
    try:
        with directory_inside(request.artifacts.exports, request.save_roots, create=True) as folder:
            try:
                lock = FileLock.acquire(folder / ".lock")
            except LockBusy:
                raise ExportInProgress() from None
            with lock:
                is_due = not is_exported(request)
                if is_due:
                    _export(request, folder, lock, stopping)
                return is_due
    except OSError as error:
        raise StorageError.from_os_error(error) from error


def _export(request: ExportRequest, folder: Path, lock: FileLock, stopping: threading.Event) -> None:
    """Export to ``folder``, another path of the directory of exports, which no link can replace."""
    final = _directory(request)
    source, building = (final.with_name(f".{kind}-{final.name}") for kind in ("source", "building"))
    # A killed service may have left those of another step, whose links keep deleted weights on the disk.
    _remove_temporary(folder)
    try:
        # Retention may remove the checkpoint during the export; the links keep its files.
        link_checkpoint(request.checkpoint, source, request.save_roots)
        names = ["--tokenizer", request.tokenizer, "--stem", request.stem]
        arguments = [str(source), "--format", request.format, "--out", str(building), *names]
        run_exporter(arguments, lock, stopping, data_roots=request.data_roots, save_roots=request.save_roots)
        _publish(request, folder, source.name, building.name)
    finally:
        _remove_temporary(folder)


def _remove_temporary(folder: Path) -> None:
    """Remove the directories of unfinished exports. The caller holds the lock of the job's exports."""
    # The last kind is the exporter's own.
    for pattern in (".source-*", ".building-*", "..building-*"):
        for directory in folder.glob(pattern):
            shutil.rmtree(directory, ignore_errors=True)


def _publish(request: ExportRequest, folder: Path, source: str, building: str) -> None:
    # The hash is removed first and written last: an interrupted publication is not taken for an export.
    final, hash_file = folder / _directory(request).name, folder / _hash_file(request).name
    hash_file.unlink(missing_ok=True)
    shutil.rmtree(final, ignore_errors=True)
    (folder / building).rename(final)
    fsync_directory(folder)
    manifest = read_manifest(folder / source) or {}
    write_json(hash_file, {"sha256": manifest[MODEL_FILE].sha256})


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


def list_exports(places: Iterable[ArtifactDir]) -> Iterator[dict[str, Any]]:
    """Yield a description of each export, newest step first. An export in several places is described once."""
    found: dict[str, ArtifactDir] = {}
    for artifacts in places:
        for path in artifacts.exports.iterdir() if artifacts.exports.is_dir() else ():
            if EXPORT_NAME.fullmatch(path.name) and path.is_dir() and not path.is_symlink():
                found.setdefault(path.name, artifacts)
    for name in sorted(found, reverse=True):
        _, step, form = name.split("-")
        yield describe_export(found[name], int(step), form)


def describe_export(artifacts: ArtifactDir, step: int, form: str) -> dict[str, Any]:
    """Return ``step, format, path, files, bytes`` of an existing export."""
    path = artifacts.export(step, form)
    files = [{"name": file.name, "bytes": file.lstat().st_size} for file in sorted(path.iterdir())]
    return {"step": step, "format": form, "path": str(path), "files": files, "bytes": sum(f["bytes"] for f in files)}
