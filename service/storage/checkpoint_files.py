"""Safe access to the files of a checkpoint: only files that its manifest lists, and never through a symbolic link.

``roots``: the directories below which the checkpoint must lie, see `contract.allowed_paths.open_inside`.
"""

import os
import re
import stat
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from trainyard.contract.allowed_paths import directory_inside
from trainyard.contract.failpoints import failpoint
from trainyard.contract.rundir import MANIFEST_FILE, FileDigest, RunDir, parse_manifest
from trainyard.service.errors import FileNotInCheckpoint, RangeUnsatisfiable

MAX_MANIFEST = 16 << 20
OPEN_FLAGS = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC
FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,200}")
ONE_RANGE = re.compile(r"bytes=([0-9]{0,18})-([0-9]{0,18})")


@dataclass(frozen=True)
class ByteRange:
    """Bytes ``first`` to ``last``, both included, of a file of ``size`` bytes. ``partial``: a Range was requested."""

    first: int
    last: int
    size: int
    partial: bool

    @property
    def length(self) -> int:
        return self.last - self.first + 1


def checkpoint_directory(run: RunDir, save_dir: str | None, step: int, path: str) -> Path | None:
    """Return ``path`` if it is a directory where checkpoints of the step belong, else None. An attempt reported it."""
    for artifacts in run.artifact_dirs(save_dir):
        for directory in (artifacts.checkpoint(step), artifacts.milestone(step)):
            if str(directory) == path:
                return directory
    return None


@failpoint("share.manifest")
def read_manifest(directory: Path, roots: Sequence[Path] = ()) -> dict[str, FileDigest] | None:
    """Return the files that the manifest lists, or None if it is missing or invalid."""
    try:
        with _open_directory(directory, roots) as descriptor:
            return _read_manifest_in(descriptor)
    except OSError:
        return None


@failpoint("share.read_manifest", "download.read_manifest")
def _read_manifest_in(descriptor: int) -> dict[str, FileDigest] | None:
    try:
        with _open_in(descriptor, MANIFEST_FILE) as file:
            manifest = parse_manifest(file.read(MAX_MANIFEST))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    return {name: digest for name, digest in manifest.items() if FILE_NAME.fullmatch(name)}


@failpoint("share.validate")
def is_valid(directory: Path, roots: Sequence[Path] = (), only: Collection[str] | None = None) -> bool:
    """Return whether every file of the manifest exists with its size. The contents are not read.

    ``only``: names of files; no others are checked.
    """
    manifest = read_manifest(directory, roots)
    if not manifest:
        return False
    try:
        with directory_inside(directory, roots) as pinned:
            checked = {name: digest for name, digest in manifest.items() if only is None or name in only}
            return all((pinned / name).lstat().st_size == digest.bytes for name, digest in checked.items())
    except OSError:
        return False


@failpoint("download.open_listed")
def open_listed(directory: Path, name: str, roots: Sequence[Path] = ()) -> tuple[BinaryIO, str | None]:
    """Open a file that the manifest lists, or the manifest itself. Raises FileNotInCheckpoint.

    Return the file and its sha256 of the manifest, which is None for the manifest.
    """
    # Manifest and file are read through one directory descriptor: if a run is rewound, another checkpoint may get the
    # same path. The open file can be read to its end even if retention removes it.
    try:
        with _open_directory(directory, roots) as descriptor:
            manifest = _read_manifest_in(descriptor)
            if manifest is None or (name != MANIFEST_FILE and name not in manifest):
                raise FileNotInCheckpoint()
            return _open_in(descriptor, name), manifest[name].sha256 if name != MANIFEST_FILE else None
    except OSError:
        raise FileNotInCheckpoint() from None


@failpoint("share.open_file")
def open_file(directory: Path, name: str, roots: Sequence[Path] = ()) -> BinaryIO:
    """Open a regular file directly in ``directory``, below one of ``roots`` if any are given.

    Neither may be a symbolic link. Raises OSError.
    """
    with _open_directory(directory, roots) as descriptor:
        return _open_in(descriptor, name)


@contextmanager
def _open_directory(directory: Path, roots: Sequence[Path]) -> Iterator[int]:
    # The descriptor stays the same directory, even if another one gets its name.
    with directory_inside(directory.parent, roots) as parent:
        descriptor = os.open(parent / directory.name, OPEN_FLAGS | os.O_DIRECTORY)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


@failpoint("share.open", "download.open")
def _open_in(directory: int, name: str) -> BinaryIO:
    # NONBLOCK: opening a FIFO would otherwise wait for a writer.
    descriptor = os.open(name, OPEN_FLAGS | os.O_NONBLOCK, dir_fd=directory)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise FileNotFoundError(name)
    return os.fdopen(descriptor, "rb")


def parse_range(header: str | None, size: int) -> ByteRange:
    """Return the range of a Range header, or the whole file if it is missing, invalid or has several ranges.

    Raises RangeUnsatisfiable if it begins after the end of the file.
    """
    whole = ByteRange(0, size - 1, size, partial=False)
    match = ONE_RANGE.fullmatch((header or "").replace(" ", ""))
    if match is None or match.groups() == ("", ""):
        return whole
    first, last = match.groups()
    if not first:
        start, end = max(0, size - int(last)), size - 1
    else:
        start, end = int(first), min(int(last), size - 1) if last else size - 1
        if last and int(last) < start:
            return whole
    if start >= size or end < start:
        raise RangeUnsatisfiable(headers={"Content-Range": f"bytes */{size}"})
    return ByteRange(start, end, size, partial=True)
