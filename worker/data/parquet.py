"""Read the documents of a parquet file, one per row. Needs pyarrow, imported only for such a file.

The column is read as a dictionary: a few bytes may repeat one text a million times, and memory holds it once.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from trainyard.contract.corpus_files import shown
from trainyard.contract.json_lines import BadLineError
from trainyard.worker.data import jsonl
from trainyard.worker.data.file import CorpusFile, ReadPosition, SourceReader, import_optional
from trainyard.worker.data.jsonl import DataInvalid, Document, ParseStats

BATCH_ROWS = 256

ROW_BYTES = 16
"""Bytes that a row counts in addition to its text: a small file may have any number of empty rows."""

MAX_GROUP_BYTES = 2 << 30
"""Decompressed bytes of the column in one row group, which is decoded as a whole."""


class ParquetReader(SourceReader):
    """A `worker.data.readers.Reader` whose lines are rows."""

    def __init__(self, source: CorpusFile) -> None:
        super().__init__(source)
        self._rows_done, self._rows, self._unpacked = 0, 1, 0
        try:
            self._arrow = import_optional("pyarrow", source.path)
            self._parquet = import_optional("pyarrow", source.path, "pyarrow.parquet")
        except DataInvalid:
            source.raw.close()
            raise

    @property
    def bytes_read(self) -> int:
        """An estimate: the file's size times the share of rows read."""
        return self.size * self._rows_done // max(1, self._rows)

    def skip(self, stats: ParseStats, position: ReadPosition, on_progress: Callable[[], None]) -> None:
        del on_progress  # quick: whole row groups are skipped without being read
        self.source.expect(position)
        self.stats = replace(stats)

    def documents(self, text_field: str) -> Iterator[Document]:
        skipped = self.stats.lines
        for number, value in enumerate(self._values(text_field, skipped), start=skipped + 1):
            self.stats.lines = number
            try:
                text = _text_of(value, text_field)
            except BadLineError as bad:
                self.stats.add_bad(number, str(bad))
                continue
            self.stats.documents += 1
            yield Document(number, text)

    def _values(self, text_field: str, skipped: int) -> Iterator[bytes | None]:
        """Yield the value of each row after the first ``skipped``."""
        path = self.source.path
        # Parquet is not read in order, so the file is hashed in a pass before, and compared block by block.
        blocks = self.source.verified_blocks()
        try:
            header = self._parquet.ParquetFile(blocks)
            self._rows = header.metadata.num_rows
            self._require_column(header, text_field)
            file = self._parquet.ParquetFile(blocks, metadata=header.metadata, read_dictionary=[text_field])
            groups = self._groups_after(header.metadata, skipped)
            for batch in file.iter_batches(batch_size=BATCH_ROWS, row_groups=groups, columns=[text_field]):
                yield from self._decode(batch.column(0).slice(min(len(batch), max(0, skipped - self._rows_done))))
                self._rows_done += len(batch)
        except (self._arrow.ArrowException, OSError) as error:
            raise DataInvalid(
                f"{shown(path)} cannot be read as parquet: {' '.join(str(error).split())[:200]}"
            ) from None

    def _groups_after(self, metadata: Any, skipped: int) -> list[int]:
        """Return the row groups that hold a row after the first ``skipped``; count the rows before them as done."""
        for first in range(metadata.num_row_groups):
            rows = metadata.row_group(first).num_rows
            if self._rows_done + rows > skipped:
                return list(range(first, metadata.num_row_groups))
            self._rows_done += rows
        return []

    def _require_column(self, file: Any, text_field: str) -> None:
        schema, path = file.schema_arrow, self.source.path
        if schema.names.count(text_field) != 1:
            listed = ", ".join(schema.names[:20])
            raise DataInvalid(
                f"{shown(path)} has no single column {text_field!r} but {listed}: set text_field to one of them"
            )
        kind, types = schema.field(text_field).type, self._arrow.types
        kind = kind.value_type if types.is_dictionary(kind) else kind
        if not (types.is_string(kind) or types.is_large_string(kind)):
            raise DataInvalid(f"{shown(path)}: column {text_field!r} holds {kind} and must hold strings")
        column = file.metadata.schema.names.index(text_field)
        for number in range(file.metadata.num_row_groups):
            size = file.metadata.row_group(number).column(column).total_uncompressed_size
            if size > MAX_GROUP_BYTES:
                raise DataInvalid(
                    f"{shown(path)}: row group {number + 1} holds {size >> 20} MiB of {text_field!r}, and "
                    f"{MAX_GROUP_BYTES >> 20} are read at most: write it with smaller row groups"
                )

    def _decode(self, column: Any) -> Iterator[bytes | None]:
        """Yield the UTF-8 bytes of each row, or None for null."""
        binary = self._arrow.large_binary()
        for index in column.indices.to_pylist():
            # One at a time: the decoded rows may be far larger than the dictionary.
            value = None if index is None else column.dictionary[index].cast(binary).as_py()
            self._unpacked += ROW_BYTES + len(value or b"")
            self.source.require_bounded(self._unpacked, self.size)
            yield value


def _text_of(value: bytes | None, text_field: str) -> str:
    if value is None:
        raise BadLineError(f"{text_field!r} is not a string but null")
    if not value:
        raise BadLineError(f"{text_field!r} is empty")
    if len(value) >= jsonl.MAX_LINE_BYTES:
        raise BadLineError(f"longer than {jsonl.MAX_LINE_BYTES >> 20} MiB")
    try:
        return value.decode()
    except UnicodeDecodeError as error:
        raise BadLineError(f"not UTF-8 at byte {error.start + 1}") from None
