"""The files of a checkpoint: those that its manifest names, opened so that nothing else can be meant."""

import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from trainyard.contract.failpoints import failpoint
from trainyard.contract.rundir import (
    MANIFEST_FILE,
    ArtifactDir,
    FileDigest,
    parse_manifest,
)
from trainyard.service.errors import FileNotInCheckpoint, RangeUnsatisfiable

MAX_MANIFEST = 16 << 20
OPEN_FLAGS = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC
FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,200}")
ONE_RANGE = re.compile(r"bytes=([0-9]{0,18})-([0-9]{0,18})")


@dataclass(frozen=True)
class ByteRange:
    """Bytes ``first`` to ``last`` of a file of ``size``, both included. ``partial``: not all of it was asked for."""

    first: int
    last: int
    size: int
    partial: bool

    @property
    def length(self) -> int:
        """How many bytes that is."""
        return self.last - self.first + 1


def checkpoint_directory(products: ArtifactDir, step: int, path: str) -> Path | None:
    """Where a checkpoint's files are, if ``path``, which an attempt has reported, is where they must be; else None."""
    return next((place for place in (products.checkpoint(step), products.milestone(step)) if str(place) == path), None)


@failpoint("share.manifest")
def read_manifest(directory: Path) -> dict[str, FileDigest] | None:
    """What the manifest says; None where there is none that can be read."""
    try:
        with open_directory(directory) as within:
            return _read_manifest_in(within)
    except OSError:
        return None


@failpoint("share.read_manifest", "download.read_manifest")
def _read_manifest_in(within: int) -> dict[str, FileDigest] | None:
    try:
        with _open_in(within, MANIFEST_FILE) as file:
            found = parse_manifest(file.read(MAX_MANIFEST))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    return {name: said for name, said in found.items() if FILE_NAME.fullmatch(name)}


@failpoint("share.validate")
def is_valid(directory: Path) -> bool:
    """Whether every file that the manifest names is there with its size. The bytes are not read."""
    manifest = read_manifest(directory)
    if not manifest:
        return False
    try:
        return all((directory / name).lstat().st_size == said.bytes for name, said in manifest.items())
    except OSError:
        return False


@failpoint("download.open_listed")
def open_listed(directory: Path, name: str) -> tuple[BinaryIO, str | None]:
    """The file, and its sha256 by the manifest; None for the manifest itself. Raises FileNotInCheckpoint.

    A file that retention removes meanwhile can be read to its end: it is open. And both are of one directory, though
    another may stand under its name by now, of a run that went back.
    """
    try:
        with open_directory(directory) as within:
            manifest = _read_manifest_in(within)
            if manifest is None or (name != MANIFEST_FILE and name not in manifest):
                raise FileNotInCheckpoint()
            return _open_in(within, name), manifest[name].sha256 if name != MANIFEST_FILE else None
    except OSError:
        raise FileNotInCheckpoint() from None


@failpoint("share.open_file")
def open_file(directory: Path, name: str) -> BinaryIO:
    """A regular file that lies in ``directory`` itself: neither may be a link by now. Raises OSError."""
    with open_directory(directory) as within:
        return _open_in(within, name)


@contextmanager
def open_directory(directory: Path) -> Iterator[int]:
    """A descriptor of the directory that stands under this name now, whatever stands there later. Raises OSError."""
    within = os.open(directory, OPEN_FLAGS | os.O_DIRECTORY)
    try:
        yield within
    finally:
        os.close(within)


@failpoint("share.open", "download.open")
def _open_in(within: int, name: str) -> BinaryIO:
    descriptor = os.open(name, OPEN_FLAGS | os.O_NONBLOCK, dir_fd=within)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise FileNotFoundError(name)
    return os.fdopen(descriptor, "rb")


def parse_range(asked: str | None, size: int) -> ByteRange:
    """Return the bytes that a Range header asks for: all, if it is not valid or asks for several ranges.

    Raises:
        RangeUnsatisfiable: It begins after the end of the file.
    """
    whole = ByteRange(0, size - 1, size, partial=False)
    match = ONE_RANGE.fullmatch((asked or "").replace(" ", ""))
    if match is None or match.groups() == ("", ""):
        return whole
    first, last = match.groups()
    if not first:
        begin, end = max(0, size - int(last)), size - 1
    else:
        begin, end = int(first), min(int(last), size - 1) if last else size - 1
        if last and int(last) < begin:
            return whole
    if begin >= size or end < begin:
        raise RangeUnsatisfiable(headers={"Content-Range": f"bytes */{size}"})
    return ByteRange(begin, end, size, partial=True)
