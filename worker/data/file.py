"""A corpus file as a byte stream: hashed as it is on disk, and decompressed while it is read.

The first bytes decide the format, not the file name: gzip, zstandard, parquet, or else UTF-8 text.
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
from trainyard.worker.data.jsonl import DataInvalid, ParseStats, require_unchanged

BUFFER_BYTES = 1 << 20

ZSTD_CHUNK_BYTES = 1 << 10
"""Compressed bytes per decompress call. Four bytes may hold a block of 128 KiB, so a call returns at most 32 MiB."""


class CorpusFile:
    """An open corpus file, read once, up to the size it had when it was opened.

    ``stream`` yields the decompressed bytes, or the raw bytes of a parquet file. ``size`` is the size on disk.
    Raises DataInvalid if ``path`` is not a readable regular file of UTF-8 text, or if it needs a missing package.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.raw = open_regular(path)
        self._stat = os.fstat(self.raw.fileno())
        self.size = self._stat.st_size
        self._hashing_reader = _HashingReader(self.raw, self.size)
        try:
            self.compression = compression_of(self.raw.peek(4))
            self.stream = self._open_stream()
            with self.translate_errors():
                if self.compression is not Compression.PARQUET:
                    require_utf8(path, self.head())
        except BaseException:
            self.raw.close()
            raise

    @property
    def bytes_read(self) -> int:
        """Bytes of the file read so far, before decompression."""
        return self._hashing_reader.bytes_read

    @property
    def digest(self) -> str:
        """sha256 of the bytes read so far, before decompression."""
        return self._hashing_reader.sha256.hexdigest()

    def head(self) -> bytes:
        """Return the first bytes of the stream; call it before anything is read."""
        return self.stream.peek(4096)[:4096]

    def _open_stream(self) -> io.BufferedReader:
        file: io.BufferedReader = io.BufferedReader(self._hashing_reader, BUFFER_BYTES)
        if self.compression is Compression.GZIP:
            decompressor: Any = gzip.GzipFile(fileobj=file, mode="rb")
        elif self.compression is Compression.ZSTD:
            decompressor = _ZstdReader(file, import_optional("zstandard", self.path))
        else:
            return file
        return io.BufferedReader(decompressor, BUFFER_BYTES)

    @contextmanager
    def translate_errors(self) -> Iterator[None]:
        """Raise DataInvalid for decompression errors in the block; if the file has changed, report that instead."""
        try:
            yield
        except (EOFError, zlib.error, gzip.BadGzipFile, CorruptZstd) as error:
            self._require_same_file()
            raise DataInvalid(
                f"{self.path} is damaged {self.compression} data near byte {self.bytes_read:,}: {error}. Make it again"
            ) from None

    def finish(self) -> None:
        """Read and hash the rest of the file. Raises DataInvalid if the file changed while it was read."""
        while self._hashing_reader.read(BUFFER_BYTES):
            pass
        self._require_same_file()
        if self.bytes_read != self.size:
            require_unchanged(self.path)

    def _require_same_file(self) -> None:
        after = os.fstat(self.raw.fileno())
        if (after.st_size, after.st_mtime_ns) != (self._stat.st_size, self._stat.st_mtime_ns):
            require_unchanged(self.path)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.raw.close()


class SourceReader:
    """The part of a `worker.data.readers.Reader` that does not depend on the file's format."""

    def __init__(self, source: CorpusFile) -> None:
        self.source = source
        self.stats = ParseStats()

    @property
    def size(self) -> int:
        return self.source.size

    @property
    def digest(self) -> str:
        return self.source.digest

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.source.__exit__()


class _HashingReader(io.RawIOBase):
    """The first ``size`` bytes of a file, counted and hashed while they are read."""

    def __init__(self, file: io.BufferedReader, size: int) -> None:
        super().__init__()
        self.bytes_read = 0
        self.sha256 = hashlib.sha256()
        self._file = file
        self._size = size

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer)[: self._size - self.bytes_read]
        count = self._file.readinto(view)
        self.sha256.update(view[:count])
        self.bytes_read += count
        return count


class CorruptZstd(ValueError):
    """The stream cannot be decompressed."""


class _ZstdReader(io.RawIOBase):
    """Consecutive zstandard frames. The library's own reader does not report a truncated file."""

    def __init__(self, file: io.BufferedReader, library: Any) -> None:
        super().__init__()
        self._file = file
        self._library = library
        self._frame: Any = None
        self._compressed = b""
        self._decompressed = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._decompressed:
            compressed = self._compressed or self._file.read(ZSTD_CHUNK_BYTES)
            if not compressed:
                if self._frame is not None:
                    raise CorruptZstd("it ends in the middle of a frame")
                return 0
            self._decompress(compressed)
        count = min(len(buffer), len(self._decompressed))
        memoryview(buffer)[:count] = self._decompressed[:count]
        self._decompressed = self._decompressed[count:]
        return count

    def _decompress(self, compressed: bytes) -> None:
        self._frame = self._frame or self._library.ZstdDecompressor().decompressobj()
        try:
            self._decompressed = memoryview(self._frame.decompress(compressed))
        except self._library.ZstdError as error:
            raise CorruptZstd(str(error)) from None
        self._compressed = b""
        if self._frame.eof:
            self._compressed, self._frame = self._frame.unused_data, None


def import_optional(package: str, path: Path, module: str | None = None) -> Any:
    """Import a package that only some corpora need. Raises DataInvalid with the install command if it is missing."""
    try:
        return importlib.import_module(module or package)
    except ImportError:
        raise DataInvalid(f"{path} can only be read with {package}: pip install {package}") from None


def open_regular(path: Path) -> io.BufferedReader:
    """Open a regular file for reading. Raises DataInvalid for anything else, and never blocks."""
    try:
        # O_NONBLOCK: opening a FIFO without a writer would otherwise block forever.
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
    """Raise DataInvalid if the first bytes show that the file is binary or UTF-16."""
    has_utf16_bom = head.startswith((b"\xff\xfe", b"\xfe\xff"))
    # JSON never holds a raw NUL; in UTF-16 about every second byte of it is one.
    if has_utf16_bom or head.count(0) > len(head) // 4:
        raise DataInvalid(f"{path} is UTF-16 or binary: save it as UTF-8, one JSON object a line")
