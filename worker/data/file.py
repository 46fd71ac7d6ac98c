"""A corpus file as bytes: opened without waiting, counted and hashed as it lies on disk, and decompressed on the way.

What a file is, its first bytes say and not its name: gzip, zstandard and parquet have theirs, all else is UTF-8 text.
"""

import gzip
import hashlib
import importlib
import io
import os
import stat
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

from trainyard.contract.file_identity import Compression, compression_of
from trainyard.worker.data.jsonl import DataInvalid, require_unchanged

BUFFER_BYTES = 1 << 20

ZSTD_CHUNK_BYTES = 1 << 10
"""Compressed bytes handed over at once. A block of 128 KiB may be 4 bytes long, so at most 32 MiB come out of them."""


class CorpusFile:
    """An open corpus file, read once and at most to the size it had when it was opened.

    ``stream`` gives its decompressed bytes; of a parquet file the bytes themselves. ``done`` of ``size`` bytes of the
    file are read; ``digest`` is the sha256 of those. Raises DataInvalid at once for anything that is not a readable
    regular file of UTF-8 text, and where a package is missing that it takes.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.raw = open_regular(path)
        self._before = os.fstat(self.raw.fileno())
        self.size = self._before.st_size
        self._counted = _HashingReader(self.raw, self.size)
        try:
            self.packing = compression_of(self.raw.peek(4))
            self.stream = self._unpacked()
            with self.open():
                if self.packing is not Compression.PARQUET:
                    require_utf8(path, self.head())
        except BaseException:
            self.raw.close()
            raise

    @property
    def bytes_read(self) -> int:
        """Bytes of the file that are read."""
        return self._counted.done

    @property
    def digest(self) -> str:
        """sha256 of the bytes read so far."""
        return self._counted.found.hexdigest()

    def head(self) -> bytes:
        """The first bytes of the stream, before anything of it is read."""
        return self.stream.peek(4096)[:4096]

    def _unpacked(self) -> io.BufferedReader:
        file: io.BufferedReader = io.BufferedReader(self._counted, BUFFER_BYTES)
        if self.packing is Compression.GZIP:
            unpacked: Any = gzip.GzipFile(fileobj=file, mode="rb")
        elif self.packing is Compression.ZSTD:
            unpacked = _ZstdReader(file, import_optional("zstandard", self.path))
        else:
            return file
        return io.BufferedReader(unpacked, BUFFER_BYTES)

    @contextmanager
    def open(self) -> Iterator[None]:
        """Around reads of ``stream``: DataInvalid where it is damaged, or rather where the file changes."""
        try:
            yield
        except (EOFError, zlib.error, gzip.BadGzipFile, CorruptZstd) as error:
            self._require_same_file()
            raise DataInvalid(
                f"{self.path} is damaged {self.packing} data near byte {self.bytes_read:,}: {error}. Make it anew"
            ) from None

    def finish(self) -> None:
        """Count and hash what is left of the file. Raises DataInvalid where it changed while it was read."""
        while self._counted.read(BUFFER_BYTES):
            pass
        self._require_same_file()
        if self.bytes_read != self.size:
            require_unchanged(self.path)

    def _require_same_file(self) -> None:
        after = os.fstat(self.raw.fileno())
        if (after.st_size, after.st_mtime_ns) != (self._before.st_size, self._before.st_mtime_ns):
            require_unchanged(self.path)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.raw.close()


class _HashingReader(io.RawIOBase):
    """The first ``size`` bytes of a file, counted and hashed as they go by."""

    def __init__(self, file: io.BufferedReader, size: int) -> None:
        super().__init__()
        self.done = 0
        self.found = hashlib.sha256()
        self._file = file
        self._size = size

    def readable(self) -> bool:
        """Yes."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill ``buffer`` as far as there is something."""
        view = memoryview(buffer)[: self._size - self.done]
        count = self._file.readinto(view)
        self.found.update(view[:count])
        self.done += count
        return count


class CorruptZstd(ValueError):
    """The stream cannot be decompressed."""


class _ZstdReader(io.RawIOBase):
    """Frames of zstandard, one after the other. The library's own reader takes a file that is cut off for complete."""

    def __init__(self, file: io.BufferedReader, library: Any) -> None:
        super().__init__()
        self._file = file
        self._library = library
        self._frame: Any = None
        self._packed = b""
        self._ready = memoryview(b"")

    def readable(self) -> bool:
        """Yes."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill ``buffer`` as far as something is ready; 0 at the end."""
        while not self._ready:
            packed = self._packed or self._file.read(ZSTD_CHUNK_BYTES)
            if not packed:
                if self._frame is not None:
                    raise CorruptZstd("it ends in the middle of a frame")
                return 0
            self._decompress(packed)
        count = min(len(buffer), len(self._ready))
        memoryview(buffer)[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count

    def _decompress(self, packed: bytes) -> None:
        self._frame = self._frame or self._library.ZstdDecompressor().decompressobj()
        try:
            self._ready = memoryview(self._frame.decompress(packed))
        except self._library.ZstdError as error:
            raise CorruptZstd(str(error)) from None
        self._packed = b""
        if self._frame.eof:
            self._packed, self._frame = self._frame.unused_data, None


def import_optional(package: str, path: Path, module: str | None = None) -> Any:
    """A package that only some corpora need. Raises DataInvalid that says how to get it."""
    try:
        return importlib.import_module(module or package)
    except ImportError:
        raise DataInvalid(f"{path} can only be read with {package}: pip install {package}") from None


def open_regular(path: Path) -> io.BufferedReader:
    """Open a regular file to read. Raises DataInvalid for anything else, without waiting on it."""
    try:
        # O_NONBLOCK: the open of a FIFO nobody writes to would otherwise never return.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise DataInvalid(f"{path} cannot be read: {error.strerror or error}") from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise DataInvalid(f"{path} is not a regular file: give a JSONL file, one document a line")
    file: io.BufferedReader = io.BufferedReader(io.FileIO(descriptor), BUFFER_BYTES)
    try:
        head = file.peek(4096)[:4096]
        if compression_of(head) is Compression.NONE:
            require_utf8(path, head)
    except (DataInvalid, OSError):
        file.close()
        raise
    return file


def require_utf8(path: Path, head: bytes) -> None:
    """Raise DataInvalid where the first bytes of a text show that it is none, or another encoding."""
    marked = head.startswith((b"\xff\xfe", b"\xfe\xff"))
    # JSON never holds a raw NUL, and in UTF-16 about every second byte of it is one.
    if marked or head.count(0) > len(head) // 4:
        raise DataInvalid(f"{path} is UTF-16 or binary: save it as UTF-8, one JSON object a line")
