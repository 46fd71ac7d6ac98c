"""Read the documents of a corpus file: JSONL, plain text, either of them compressed, or parquet.

Memory is constant: one line or one document at a time.
"""

import io
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Protocol, Self

from trainyard.contract.file_identity import BLANK, BOM, Compression, is_plain_text
from trainyard.contract.json_lines import BadLineError
from trainyard.worker.data import jsonl
from trainyard.worker.data.file import CorpusFile, Piece, ReadPosition, SourceReader
from trainyard.worker.data.jsonl import Document, ParseStats, text_of
from trainyard.worker.data.parquet import ParquetReader

SKIPPED_LINES_PER_PROGRESS = 1 << 16
CUT_BYTES = 1 << 16


class Reader(Protocol):
    """An open corpus file that is read once.

    ``stats`` and ``digest`` are complete once `documents` has been read to its end.
    """

    stats: ParseStats

    @property
    def bytes_read(self) -> int:
        """Bytes of the file read so far."""

    @property
    def size(self) -> int:
        """Bytes of the file when it was opened."""

    @property
    def digest(self) -> str:
        """sha256 of the file's bytes read so far, before decompression."""

    @property
    def position(self) -> ReadPosition:
        """How far the file was read: what an interrupted build compares before it continues."""

    def skip(self, stats: ParseStats, position: ReadPosition, on_progress: Callable[[], None]) -> None:
        """Continue after the lines that ``stats`` counts, and from its counts. Calls ``on_progress`` now and then.

        This and reading raise PrefixDiffers if the file's first bytes are not those that ``position`` counts.
        """

    def documents(self, text_field: str) -> Iterator[Document]:
        """Yield each document in order and count the lines in ``stats``. Raises DataInvalid if the file changes."""

    def __enter__(self) -> Self: ...

    def __exit__(self, *_: object) -> None: ...


def open_reader(path: Path, opened: io.BufferedReader | None = None) -> Reader:
    """Open a corpus. Raises DataInvalid if it is not a regular UTF-8 file, is damaged, or needs a missing package.

    ``opened``: the same file, opened before.
    """
    source = CorpusFile(path, opened)
    if source.compression is Compression.PARQUET:
        return ParquetReader(source)
    return TextReader(source) if is_plain_text(path.name, source.head()) else LineReader(source)


def open_piece(path: Path, opened: io.BufferedReader, piece: Piece, plain: bool) -> Reader:
    """Read a piece of an open text file. Its lines count from 1. ``plain``: blank lines separate the documents."""
    source = CorpusFile(path, opened, piece)
    return TextReader(source) if plain else LineReader(source)


def find_document_end(file: io.BufferedReader, after: int, plain: bool) -> int | None:
    """Return the first position after ``after`` bytes at which a document has ended, or None if none is near.

    ``plain``: as in `open_piece`.
    """
    mark = b"\n\n" if plain else b"\n"
    found = b""
    file.seek(after)
    while len(found) < jsonl.MAX_LINE_BYTES and (block := file.read(CUT_BYTES)):
        start = max(0, len(found) - 1)
        found += block
        if (at := found.find(mark, start)) >= 0:
            return after + at + len(mark)
    return None


def detect_plain_text(path: Path, opened: io.BufferedReader | None = None) -> bool:
    """Return whether blank lines separate the documents. It depends on the file's name too, not only on its bytes."""
    if not is_plain_text(path.name, b""):
        return False
    with CorpusFile(path, opened) as source:
        return source.compression is not Compression.PARQUET and is_plain_text(path.name, source.head())


class LineReader(SourceReader):
    """A `Reader` of JSONL: one document per line."""

    def __init__(self, source: CorpusFile) -> None:
        super().__init__(source)
        self._lines = self._raw_lines()

    @property
    def bytes_read(self) -> int:
        return self.source.bytes_read

    def skip(self, stats: ParseStats, position: ReadPosition, on_progress: Callable[[], None]) -> None:
        self.source.expect(position)
        # The lines are read and hashed again, but not parsed.
        for number, _ in enumerate(islice(self._lines, stats.lines), start=1):
            if number % SKIPPED_LINES_PER_PROGRESS == 0:
                on_progress()
        self.stats = replace(stats)

    def documents(self, text_field: str) -> Iterator[Document]:
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
        """Yield each line, the first one without a byte order mark; None for a line that is too long."""
        piece = self.source.piece
        limit, bom = jsonl.MAX_LINE_BYTES, BOM if piece is None or piece.start == 0 else b""
        while block := self._read_line(limit):
            complete = len(block) < limit or block.endswith(b"\n")
            if bom:
                block, bom = block.removeprefix(bom), b""
            if complete:
                yield block
                continue
            while (block := self._read_line(limit)) and not block.endswith(b"\n"):
                pass
            yield None

    def _read_line(self, limit: int) -> bytes:
        try:
            return self.source.stream.readline(limit)
        except Exception:
            # Entered only on an error: a context manager around each line would double its cost.
            with self.source.translate_errors():
                raise


class TextReader(LineReader):
    """A `Reader` of plain text: blank lines separate the documents. `Document.line` is a document's first line."""

    def documents(self, text_field: str) -> Iterator[Document]:
        del text_field  # plain text has no fields
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
        """Yield (number of the first line, bytes) of each document; None for one that is too long."""
        lines: list[bytes] = []
        first, size = 0, 0
        for number, raw in enumerate(self._lines, start=self.stats.lines + 1):
            self.stats.lines = number
            if raw is not None and not raw.strip(BLANK):
                self.stats.blank_lines += 1
                if first:
                    yield first, _join(lines, size)
                lines, first, size = [], 0, 0
                continue
            first = first or number
            size += jsonl.MAX_LINE_BYTES if raw is None else len(raw)
            if size < jsonl.MAX_LINE_BYTES:
                lines.append(raw or b"")
        if first:
            yield first, _join(lines, size)


def _join(lines: list[bytes], size: int) -> bytes | None:
    return None if size >= jsonl.MAX_LINE_BYTES else b"".join(lines)


def plain_text_of(raw: bytes | None) -> str:
    """Return the text of one plain-text document, without CRLF line ends. Raises BadLineError with the reason."""
    if raw is None:
        raise BadLineError(f"longer than {jsonl.MAX_LINE_BYTES >> 20} MiB: separate documents by blank lines")
    try:
        text = raw.decode()
    except UnicodeDecodeError as error:
        raise BadLineError(f"not UTF-8 at byte {error.start + 1}") from None
    return text.replace("\r\n", "\n").removesuffix("\n")
