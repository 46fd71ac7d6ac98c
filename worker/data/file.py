"""A corpus file as a byte stream: hashed as it is on disk, and decompressed while it is read.

The first bytes decide the format, not the file name: gzip, zstandard, parquet, or else UTF-8 text.
"""

import errno
import gzip
import hashlib
import importlib
import io
import os
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from trainyard.contract.allowed_paths import OutsideRoots, open_regular_inside
from trainyard.contract.corpus_files import shown
from trainyard.contract.file_identity import Compression, compression_of
from trainyard.worker.data.jsonl import DataInvalid, ParseStats, require_unchanged

BUFFER_BYTES = 1 << 20

ZSTD_CHUNK_BYTES = 1 << 10
"""Compressed bytes per decompress call. Four bytes may hold a block of 128 KiB, so a call returns at most 32 MiB."""

UNPACKED_FLOOR, UNPACKED_PER_BYTE = 64 << 20, 256
"""A packed file may grow to UNPACKED_FLOOR bytes, and UNPACKED_PER_BYTE more for each byte read. Text shrinks to about
a tenth; a file that exceeds this was made to fill the disk."""

BLOCK_BYTES = 1 << 20
"""Unit in which a file that is not read in order is compared with what was hashed."""


class PrefixDiffers(Exception):
    """The file does not begin with the bytes that the interrupted build has read."""


@dataclass(frozen=True)
class ReadPosition:
    """The number of bytes that were read of a file, and their sha256 as hex."""

    bytes: int
    sha256: str

    @classmethod
    def start(cls) -> Self:
        return cls(0, hashlib.sha256().hexdigest())


@dataclass(frozen=True)
class Piece:
    """Bytes ``start`` to ``end`` of an unpacked text file. A document begins at ``start``, and one ends at ``end``."""

    start: int
    end: int

    @property
    def bytes(self) -> int:
        return self.end - self.start


class CorpusFile:
    """An open corpus file, read once, up to the size it had when it was opened.

    ``stream`` yields the decompressed bytes, or the raw bytes of a parquet file. ``size`` is the size on disk.
    ``opened``: the same file, opened before; ``path`` is then only its name. ``piece``: read only these bytes of it.
    Raises DataInvalid if ``path`` is not a readable regular file of UTF-8 text, or if it needs a missing package.
    """

    def __init__(self, path: Path, opened: io.BufferedReader | None = None, piece: Piece | None = None) -> None:
        self.path, self.piece = path, piece
        self.raw = open_regular(path) if opened is None else _from_start(opened)
        self._stat = os.fstat(self.raw.fileno())
        self.size = self._stat.st_size
        if piece is not None:
            self.raw.seek(piece.start)
            self.size = max(0, min(piece.end, self.size) - piece.start)
        self._hashing_reader = _HashingReader(self.raw, self.size)
        try:
            self.compression = Compression.NONE if piece is not None else compression_of(self.raw.peek(4))
            self.stream = self._open_stream()
            with self.translate_errors():
                if self.compression is not Compression.PARQUET and piece is None:
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

    @property
    def position(self) -> ReadPosition:
        """How far the file was read, before decompression."""
        return ReadPosition(self.bytes_read, self.digest)

    def expect(self, position: ReadPosition) -> None:
        """Let reading raise PrefixDiffers if the file does not begin with the bytes that ``position`` counts."""
        if position.bytes > self.size:
            raise PrefixDiffers
        if position.bytes:
            self._hashing_reader.expect(position)

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
        return io.BufferedReader(_BoundedReader(decompressor, self), BUFFER_BYTES)

    def require_bounded(self, unpacked: int, read: int) -> None:
        """Raise DataInvalid if ``unpacked`` bytes are too many for ``read`` bytes of the file."""
        if unpacked > UNPACKED_FLOOR + UNPACKED_PER_BYTE * read:
            raise DataInvalid(
                f"{shown(self.path)} unpacks to more than {UNPACKED_PER_BYTE} times its size: {unpacked:,} bytes "
                f"of text from {read:,} bytes of {self.compression}. If this is intended, unpack it first "
                "and give the plain file"
            )

    def verified_blocks(self) -> "VerifiedBlocks":
        """Read and hash the whole file, and return it for reading in any order, with the bytes that were hashed."""
        digests = []
        with memoryview(bytearray(BLOCK_BYTES)) as buffer:
            while count := _fill(self._hashing_reader, buffer):
                digests.append(_block_digest(buffer[:count]))
        self._require_same_file()
        if self.bytes_read != self.size:
            require_unchanged(self.path)
        return VerifiedBlocks(self.path, self.raw, self.size, digests)

    @contextmanager
    def translate_errors(self) -> Iterator[None]:
        """Raise DataInvalid for decompression errors in the block; if the file has changed, report that instead."""
        try:
            yield
        except (EOFError, zlib.error, gzip.BadGzipFile, CorruptZstd) as error:
            self._require_same_file()
            raise DataInvalid(
                f"{shown(self.path)} is damaged {self.compression} data near byte {self.bytes_read:,}: {error}. "
                "Make it again"
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

    @property
    def position(self) -> ReadPosition:
        return self.source.position

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
        self._expected: ReadPosition | None = None
        self._file = file
        self._size = size

    def expect(self, position: ReadPosition) -> None:
        """Raise PrefixDiffers if the file does not begin with these bytes: now, or when the last of them is read."""
        if position.bytes < self.bytes_read:
            raise PrefixDiffers
        self._expected = position
        # The first bytes were read already, to detect the format. They may be all the expected ones.
        self._compare()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        end = self._size if self._expected is None else self._expected.bytes
        view = memoryview(buffer)[: end - self.bytes_read]
        count = self._file.readinto(view)
        self.sha256.update(view[:count])
        self.bytes_read += count
        self._compare()
        return count

    def _compare(self) -> None:
        if self._expected is not None and self.bytes_read == self._expected.bytes:
            if self.sha256.hexdigest() != self._expected.sha256:
                raise PrefixDiffers
            self._expected = None


class _BoundedReader(io.RawIOBase):
    """The output of a decompressor, limited by the bytes that were read."""

    def __init__(self, decompressor: Any, source: CorpusFile) -> None:
        super().__init__()
        self._decompressor = decompressor
        self._source = source
        self._unpacked = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        count = int(self._decompressor.readinto(buffer))
        self._unpacked += count
        self._source.require_bounded(self._unpacked, self._source.bytes_read)
        return count


class VerifiedBlocks(io.RawIOBase):
    """A file that is read in any order. Each read is compared with the digests of the blocks it is in.

    Raises DataInvalid if the file has changed since they were made.
    """

    def __init__(self, path: Path, file: io.BufferedReader, size: int, digests: Sequence[bytes]) -> None:
        super().__init__()
        self._path = path
        self._descriptor = file.fileno()
        self._size = size
        self._digests = digests
        self._offset = 0
        self._number, self._block = -1, b""

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._offset

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._offset, os.SEEK_END: self._size}[whence]
        self._offset = max(0, start + offset)
        return self._offset

    def readinto(self, buffer: Any) -> int:
        view, done = memoryview(buffer), 0
        while done < len(view) and self._offset < self._size:
            block = self._verified(self._offset // BLOCK_BYTES)
            part = block[self._offset % BLOCK_BYTES :][: len(view) - done]
            view[done : done + len(part)] = part
            done += len(part)
            self._offset += len(part)
        return done

    def _verified(self, number: int) -> bytes:
        if number != self._number:
            block = os.pread(
                self._descriptor, min(BLOCK_BYTES, self._size - number * BLOCK_BYTES), number * BLOCK_BYTES
            )
            if _block_digest(block) != self._digests[number]:
                require_unchanged(self._path)
            self._number, self._block = number, block
        return self._block


def _block_digest(block: Any) -> bytes:
    return hashlib.sha256(block).digest()


def _fill(file: io.RawIOBase, buffer: memoryview) -> int:
    """Read until ``buffer`` is full or the file ends; return the number of bytes."""
    done = 0
    while done < len(buffer) and (count := file.readinto(buffer[done:])):
        done += count
    return done


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
        raise DataInvalid(f"{shown(path)} can only be read with {package}: pip install {package}") from None


def open_regular(path: Path, roots: Sequence[Path] = ()) -> io.BufferedReader:
    """Open a regular file, below one of ``roots`` if any are given. Never blocks.

    Raises DataInvalid for anything else, and OutsideRoots.
    """
    try:
        file: io.BufferedReader = io.BufferedReader(open_regular_inside(path, roots), BUFFER_BYTES)
    except OutsideRoots:
        raise
    except OSError as error:
        if error.errno == errno.EINVAL:
            raise DataInvalid(f"{shown(path)} is not a regular file: give a JSONL file, one document a line") from None
        raise DataInvalid(f"{shown(path)} cannot be read: {error.strerror or error}") from error
    try:
        head = file.peek(4096)[:4096]
        if compression_of(head) is Compression.NONE:
            require_utf8(path, head)
    except (DataInvalid, OSError):
        file.close()
        raise
    return file


def _from_start(opened: io.BufferedReader) -> io.BufferedReader:
    """Return another reader of an open file, from its first byte. The two must not be read in turns."""
    file: io.BufferedReader = io.BufferedReader(io.FileIO(os.dup(opened.fileno())), BUFFER_BYTES)
    file.seek(0)
    return file


def require_utf8(path: Path, head: bytes) -> None:
    """Raise DataInvalid if the first bytes show that the file is binary or UTF-16."""
    has_utf16_bom = head.startswith((b"\xff\xfe", b"\xfe\xff"))
    # JSON never holds a raw NUL; in UTF-16 about every second byte of it is one.
    if has_utf16_bom or head.count(0) > len(head) // 4:
        raise DataInvalid(f"{shown(path)} is UTF-16 or binary: save it as UTF-8, one JSON object a line")
