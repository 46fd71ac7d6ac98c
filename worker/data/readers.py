"""The documents of a corpus file, whatever its form: JSONL, plain text, either of them packed, or parquet.

Constant memory: one line or one document at a time.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Protocol, Self

from trainyard.contract.file_identity import (
    BLANK,
    BOM,
    Compression,
    is_plain_text,
)
from trainyard.worker.data import jsonl
from trainyard.worker.data.file import CorpusFile
from trainyard.worker.data.jsonl import (
    BadLineError,
    Document,
    ParseStats,
    text_of,
)
from trainyard.worker.data.parquet import ParquetReader

SKIPPED_LINES = 1 << 16
"""Lines that are passed over between two signs of life."""


class Reader(Protocol):
    """An open corpus file that is read once.

    ``tally`` and ``digest`` (sha256 of the file as it is) are complete once `documents` has been read to its end;
    ``done`` of ``size`` bytes of the file are read.
    """

    stats: ParseStats

    @property
    def bytes_read(self) -> int:
        """Bytes read."""

    @property
    def size(self) -> int:
        """Bytes of the file when it was opened."""

    @property
    def digest(self) -> str:
        """sha256 of the bytes read so far."""

    def skip(self, past: ParseStats, seen: Callable[[], None]) -> None:
        """Go on behind what ``past`` counts, which becomes ``tally``. ``seen`` is called now and then."""

    def documents(self, text_field: str) -> Iterator[Document]:
        """Each document in order; all else is counted in ``tally``. DataInvalid where the file changes."""

    def __enter__(self) -> Self: ...

    def __exit__(self, *_: object) -> None: ...


def open_reader(path: Path) -> Reader:
    """Open a corpus. Raises DataInvalid for what is no regular file, no UTF-8, damaged, or takes a missing package."""
    source = CorpusFile(path)
    if source.packing is Compression.PARQUET:
        return ParquetReader(source)
    return TextReader(source) if is_plain_text(path.name, source.head()) else LineReader(source)


def detect_plain_text(path: Path) -> bool:
    """Whether documents are separated by blank lines: the same bytes under another name are another corpus."""
    if not is_plain_text(path.name, b""):
        return False
    with CorpusFile(path) as source:
        return source.packing is not Compression.PARQUET and is_plain_text(path.name, source.head())


class LineReader:
    """JSONL: one document a line. See `Reader`."""

    def __init__(self, source: CorpusFile) -> None:
        self.source = source
        self.stats = ParseStats()
        self._lines = self._raw_lines()

    @property
    def bytes_read(self) -> int:
        """Bytes of the file read."""
        return self.source.bytes_read

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return self.source.size

    @property
    def digest(self) -> str:
        """sha256 of the bytes read so far."""
        return self.source.digest

    def skip(self, past: ParseStats, seen: Callable[[], None]) -> None:
        """See `Reader`. Lines are found again, and hashed with the rest; nothing is parsed."""
        for number, _ in enumerate(islice(self._lines, past.lines), start=1):
            if number % SKIPPED_LINES == 0:
                seen()
        self.stats = replace(past)

    def documents(self, text_field: str) -> Iterator[Document]:
        """See `Reader`."""
        for number, raw in enumerate(self._lines, start=self.stats.lines + 1):
            self.stats.lines = number
            if raw is not None and not raw.strip(BLANK):
                self.stats.blank_lines += 1
                continue
            try:
                text = text_of(raw, text_field)
            except BadLineError as bad:
                self.stats.add_bad(number, str(bad))
                continue
            self.stats.documents += 1
            yield Document(number, text)
        self.source.finish()

    def _raw_lines(self) -> Iterator[bytes | None]:
        """Lines without a byte order mark; None for one that is too long."""
        limit, mark = jsonl.MAX_LINE_BYTES, BOM
        while block := self._line(limit):
            whole = len(block) < limit or block.endswith(b"\n")
            if mark:
                block, mark = block.removeprefix(mark), b""
            if whole:
                yield block
            else:
                self._skip_line(limit)
                yield None

    def _skip_line(self, limit: int) -> None:
        while (block := self._line(limit)) and not block.endswith(b"\n"):
            pass

    def _line(self, limit: int) -> bytes:
        try:
            return self.source.stream.readline(limit)
        except Exception:
            # Only now, as a context manager around each line would take as long as the line.
            with self.source.open():
                raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.source.__exit__()


class TextReader(LineReader):
    """Plain text: documents are separated by blank lines. A document is known by its first line. See `Reader`.

    Lines of a document are joined as they are, but for carriage returns before a newline.
    """

    def documents(self, text_field: str) -> Iterator[Document]:
        """See `Reader`. A document has no fields, so ``text_field`` says nothing."""
        del text_field
        for first, raw in self._paragraphs():
            try:
                text = plain_text_of(raw)
            except BadLineError as bad:
                self.stats.add_bad(first, str(bad))
                continue
            self.stats.documents += 1
            yield Document(first, text)
        self.source.finish()

    def _paragraphs(self) -> Iterator[tuple[int, bytes | None]]:
        """(number of its first line, its bytes) of each document; None for one that is too long."""
        held: list[bytes] = []
        first, size = 0, 0
        for number, raw in enumerate(self._lines, start=self.stats.lines + 1):
            self.stats.lines = number
            if raw is not None and not raw.strip(BLANK):
                self.stats.blank_lines += 1
                if first:
                    yield first, _joined(held, size)
                held, first, size = [], 0, 0
                continue
            first = first or number
            size += jsonl.MAX_LINE_BYTES if raw is None else len(raw)
            if size < jsonl.MAX_LINE_BYTES:
                held.append(raw or b"")
        if first:
            yield first, _joined(held, size)


def _joined(held: list[bytes], size: int) -> bytes | None:
    return None if size >= jsonl.MAX_LINE_BYTES else b"".join(held)


def plain_text_of(raw: bytes | None) -> str:
    """The text of one document. Raises BadLine with the reason."""
    if raw is None:
        raise BadLineError(f"longer than {jsonl.MAX_LINE_BYTES >> 20} MiB: separate documents by blank lines")
    try:
        text = raw.decode()
    except UnicodeDecodeError as error:
        raise BadLineError(f"not UTF-8 at byte {error.start + 1}") from None
    return text.replace("\r\n", "\n").removesuffix("\n")
