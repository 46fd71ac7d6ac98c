"""Open paths of users below allowed directories, so that a change of a link after the check has no effect.

A user may replace a file or directory by a link at any moment. So a check of a path proves nothing about what is
opened afterwards: `open_inside` resolves the path, checks it, and opens exactly that place without following a link.
"""

import ctypes
import errno
import io
import json
import os
import stat
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

OPENAT2 = 437
"""Number of the system call, the same on every architecture of Linux that torch runs on."""

RESOLVE_NO_MAGICLINKS, RESOLVE_NO_SYMLINKS, RESOLVE_BENEATH = 0x02, 0x04, 0x08

NO_OPENAT2 = (errno.ENOSYS, errno.EPERM)
"""Errors of kernels before 5.6, and of sandboxes that do not know the call."""

READ_FLAGS = os.O_RDONLY | os.O_NONBLOCK
"""O_NONBLOCK: without it, opening a FIFO without a writer would never return."""


class OutsideRoots(PermissionError):
    """The path leads out of the allowed directories. ``reason`` continues a sentence that begins with the path."""

    def __init__(self, path: str | Path, reason: str) -> None:
        super().__init__(errno.EACCES, f"{reason} the directories this service may use", str(path))
        self.reason = reason


class _OpenHow(ctypes.Structure):
    _fields_ = (("flags", ctypes.c_uint64), ("mode", ctypes.c_uint64), ("resolve", ctypes.c_uint64))


def format_roots(roots: Iterable[Path]) -> str:
    """Return directories as the value of an environment variable: a JSON list, because a path may have a colon."""
    return json.dumps([str(root) for root in roots])


def parse_roots(text: str) -> list[str]:
    """Parse a JSON list of directories, or directories separated by colons (release 0.1, and settings)."""
    try:
        listed = json.loads(text)
    except ValueError:
        listed = None
    if isinstance(listed, list) and all(isinstance(root, str) for root in listed):
        return [root for root in listed if root]
    return [root for root in text.split(":") if root]


def outside_reason(path: str | Path, roots: Iterable[Path], content: bool = True) -> str | None:
    """Return why ``path``, with links resolved, is not below one of ``roots``, or None if it is.

    ``content``: check the links directly in a directory too, because a file of a tokenizer or of weights may be a link.
    """
    allowed = tuple(roots)
    try:
        real = Path(path).resolve()
        if not _below(real, allowed):
            return "lies outside"
        links = _links(real) if content else []
        outside = [link for link in links if not _below(Path(link.path).resolve(), allowed)]
    except (OSError, RuntimeError, ValueError):
        return "cannot be resolved inside"
    return "holds a link that leads outside" if outside else None


def outside_files(files: Iterable[Path], roots: Iterable[Path]) -> Path | None:
    """Return the first of ``files`` that, with links resolved, is not below one of ``roots``, or None.

    Each file is checked for a link; each directory is resolved once.
    """
    allowed = tuple(roots)
    directories: dict[Path, bool] = {}
    for file in files:
        if file.parent not in directories:
            directories[file.parent] = _below(file.parent.resolve(), allowed)
        if not directories[file.parent] or (file.is_symlink() and not _below(file.resolve(), allowed)):
            return file
    return None


def open_inside(path: str | Path, roots: Sequence[Path], flags: int = READ_FLAGS, *, create: bool = False) -> int:
    """Open ``path`` below one of ``roots`` and return its descriptor. Without roots, any path may be opened.

    Links that stay inside are followed. ``create``: make the directory ``path``, and those above it, if they are
    missing. Raises OutsideRoots if it leads out of the roots, also if a link is changed while it is opened, and other
    kinds of OSError as `os.open` does.
    """
    flags |= os.O_CLOEXEC
    if not roots:
        if create:
            Path(path).mkdir(parents=True, exist_ok=True)
        return os.open(path, flags)
    try:
        real = Path(path).resolve()
    except RuntimeError:
        raise OutsideRoots(path, "cannot be resolved inside") from None
    root = next((folder for folder in (root.resolve() for root in roots) if real.is_relative_to(folder)), None)
    if root is None:
        raise OutsideRoots(path, "lies outside")
    # The roots are the administrator's, so they may be opened by name. Everything below them is the users'.
    top = os.open(root, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        return _open_below(top, real.relative_to(root), flags, create=create)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.EXDEV):
            # It held no link when it was resolved.
            raise OutsideRoots(path, "was replaced by a link and may lead outside") from None
        error.filename = str(path)
        raise
    finally:
        os.close(top)


def _open_below(top: int, path: Path, flags: int, *, create: bool) -> int:
    """Open ``path``, relative to the directory ``top``, without following a link in any of its parts."""
    if not create:
        descriptor = _openat2(top, str(path), flags)
        if descriptor is not None:
            return descriptor
    return _walk(top, path.parts, flags, create=create)


def _openat2(top: int, path: str, flags: int) -> int | None:
    """Open ``path`` by one system call, or return None if the kernel has none for it."""
    how = _OpenHow(flags, 0, RESOLVE_BENEATH | RESOLVE_NO_SYMLINKS | RESOLVE_NO_MAGICLINKS)
    descriptor = int(_syscall()(OPENAT2, top, os.fsencode(path), ctypes.byref(how), ctypes.sizeof(how)))
    if descriptor >= 0:
        return descriptor
    number = ctypes.get_errno()
    # EAGAIN: a directory was renamed during the call.
    if number in (*NO_OPENAT2, errno.EAGAIN):
        return None
    raise OSError(number, os.strerror(number), path)


@cache
def _syscall() -> Any:
    syscall = ctypes.CDLL(None, use_errno=True).syscall
    syscall.restype = ctypes.c_long
    syscall.argtypes = (ctypes.c_long, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p, ctypes.c_size_t)
    return syscall


def _walk(top: int, parts: Sequence[str], flags: int, *, create: bool) -> int:
    """Open part after part, each relative to the directory before it."""
    current = os.open(".", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=top)
    try:
        for number, part in enumerate(parts):
            if create:
                with suppress(FileExistsError):
                    os.mkdir(part, dir_fd=current)
            last = number == len(parts) - 1
            mine = flags if last else os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC
            try:
                following = os.open(part, mine | os.O_NOFOLLOW, dir_fd=current)
            except NotADirectoryError:
                if stat.S_ISLNK(os.stat(part, dir_fd=current, follow_symlinks=False).st_mode):
                    raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), part) from None
                raise
            os.close(current)
            current = following
        if not parts:
            # The root itself.
            following = os.open(".", flags, dir_fd=current)
            os.close(current)
            current = following
    except BaseException:
        os.close(current)
        raise
    return current


def open_regular_inside(path: str | Path, roots: Sequence[Path]) -> io.FileIO:
    """Open a regular file below one of ``roots`` for reading. Never blocks. Raises OSError as `open_inside` does."""
    return _regular(open_inside(path, roots), path)


def open_regular_in(directory: int, name: str) -> io.FileIO:
    """Open a regular file directly in an open directory, not through a link. Never blocks. Raises OSError."""
    return _regular(os.open(name, READ_FLAGS | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=directory), name)


def _regular(descriptor: int, path: str | Path) -> io.FileIO:
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "is not a regular file", str(path))
    return io.FileIO(descriptor)


def link_descriptor(descriptor: int, target: Path) -> None:
    """Link the open file as ``target``, even if its name now refers to another file. Raises OSError."""
    folder = os.open(target.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        # With a descriptor of the target's directory, Python follows the link that /proc has for an open file.
        os.link(f"/proc/self/fd/{descriptor}", target.name, dst_dir_fd=folder)
    finally:
        os.close(folder)


@contextmanager
def directory_inside(path: Path, roots: Sequence[Path] = (), *, create: bool = False) -> Iterator[Path]:
    """Open the directory ``path``; yield a path of it that stays valid if a part of ``path`` is replaced.

    Raises OSError as `open_inside` does. Errors in the block name ``path``.
    """
    with _pinned(open_inside(path, roots, os.O_RDONLY | os.O_DIRECTORY, create=create), path) as pinned:
        yield pinned


@contextmanager
def new_directory(path: Path) -> Iterator[Path]:
    """Create the directory ``path`` and yield a path of it, as `directory_inside` does. Raises OSError."""
    path.mkdir()
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
    with _pinned(os.open(path, flags), path) as pinned:
        yield pinned


@contextmanager
def _pinned(descriptor: int, path: Path) -> Iterator[Path]:
    pinned = f"/proc/self/fd/{descriptor}"
    try:
        yield Path(pinned)
    except OSError as error:
        for attribute in ("filename", "filename2"):
            name = getattr(error, attribute, None)
            if name is not None and Path(name).is_relative_to(pinned):
                setattr(error, attribute, str(path / Path(name).relative_to(pinned)))
        raise
    finally:
        os.close(descriptor)


def _below(real: Path, roots: tuple[Path, ...]) -> bool:
    return any(real.is_relative_to(root) for root in roots)


def _links(directory: Path) -> list[os.DirEntry[str]]:
    if not directory.is_dir():
        return []
    with os.scandir(directory) as entries:
        return [entry for entry in entries if entry.is_symlink()]
