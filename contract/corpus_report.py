"""Contents of a tokenized corpus: the JSON that preparation stores next to the token shards, and the API returns.

A `SourceReport` describes the token shards of one source. It is ``report.json`` in their directory in the cache
(`contract.cache`), so the service reads it without a tokenizer. A `CorpusReport` has one per source: it is the field
``report`` of ``GET /corpora/{id}``, made by `read_report`.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Self

from pydantic import BaseModel, ConfigDict, ValidationError

from trainyard.contract.cache import CorpusCache
from trainyard.contract.rundir import read_json

REPORT = "report.json"

MAX_LISTED_FILES = 100
"""Files that a report lists with their counts; all are counted."""

MAX_BAD_DOCUMENTS = 100
"""Bad documents that a report names; all are counted."""

SAMPLES = 3
MAX_SAMPLE_CHARACTERS = 2000


class ReportPart(BaseModel):
    """The settings of every part of a report. Readers ignore unknown keys, so a report of a newer release is valid."""

    model_config = ConfigDict(frozen=True, extra="ignore")


class FileReport(ReportPart):
    """A file of a source. ``file``: its path below the directory that was given, or its file name.

    ``bytes``: on disk. ``tokens``: with BOS and EOS of each document.
    """

    file: str
    bytes: int
    documents: int
    tokens: int
    bad_documents: int


class BadDocument(ReportPart):
    """A document that is left out. ``line``: from 1; the first line of plain text, the row of a parquet file."""

    file: str
    line: int
    reason: str


class LengthBucket(ReportPart):
    """Documents of ``min`` to ``max`` tokens, without BOS and EOS."""

    min: int
    max: int
    documents: int


class SampleDocument(ReportPart):
    """A document chosen at random. ``document``: its number in the file, from 1, without the bad ones.

    ``tokens``: without BOS and EOS. ``text``: what the tokens stand for, at most MAX_SAMPLE_CHARACTERS; ``truncated``
    if there is more.
    """

    file: str
    document: int
    tokens: int
    text: str
    truncated: bool


class SourceReport(ReportPart):
    """A source of a corpus.

    Attributes:
        name: of the source; ``data`` for the files of a ``data_path``.
        files: their number. The first MAX_LISTED_FILES are in ``listed``.
        bytes: of the files, on disk.
        documents: without the bad ones.
        tokens: with BOS and EOS of each document, as they are stored and trained on.
        text_bytes: UTF-8 bytes of the text that the tokens stand for; null if the tokens have no fixed number of bytes.
        bytes_per_token: of the text, without BOS and EOS; null if it is unknown.
        single_byte_share: share of ``text_bytes`` that are tokens of one byte, a part of a character; null as above.
        vocab_size, vocab_used: tokens that the tokenizer has, and those of them that the corpus contains.
        lengths: documents by their number of tokens, in ranges of powers of two, without a gap.
        bad_documents: their number. The first MAX_BAD_DOCUMENTS are in ``bad``, by file and line.
        duplicates: documents with the text of an earlier one of the same source.
        special_tokens, special_texts: special tokens written in the texts, and the texts that have one; null if they
            were not counted.
        tokenizer: the fingerprint of the tokenizer.
    """

    name: str
    files: int
    listed: tuple[FileReport, ...]
    bytes: int
    documents: int
    tokens: int
    text_bytes: int | None
    bytes_per_token: float | None
    single_byte_share: float | None
    vocab_size: int
    vocab_used: int
    lengths: tuple[LengthBucket, ...]
    bad_documents: int
    bad: tuple[BadDocument, ...]
    samples: tuple[SampleDocument, ...]
    duplicates: int
    special_tokens: int | None = None
    special_texts: int | None = None
    text_field: str
    tokenizer: str

    @classmethod
    def read(cls, directory: Path) -> Self | None:
        """Return the report in the directory of a corpus, or None if it has none that can be read."""
        try:
            raw = read_json(directory / REPORT)
            return None if raw is None else cls.model_validate(raw)
        except (OSError, ValueError, ValidationError):
            return None


class CorpusReport(ReportPart):
    """The sources of a corpus, and their sums. ``bytes_per_token``, ``single_byte_share``: of all sources together."""

    files: int
    bytes: int
    documents: int
    tokens: int
    text_bytes: int | None
    bytes_per_token: float | None
    single_byte_share: float | None
    bad_documents: int
    duplicates: int
    sources: tuple[SourceReport, ...]

    @classmethod
    def of(cls, sources: Sequence[SourceReport]) -> Self:
        """Return the report of these sources."""
        known = [source.text_bytes for source in sources if source.text_bytes is not None]
        text_bytes = sum(known) if len(known) == len(sources) else None
        text_tokens = sum(source.tokens - 2 * source.documents for source in sources)
        single = sum((source.single_byte_share or 0.0) * (source.text_bytes or 0) for source in sources)
        return cls(
            files=sum(source.files for source in sources),
            bytes=sum(source.bytes for source in sources),
            documents=sum(source.documents for source in sources),
            tokens=sum(source.tokens for source in sources),
            text_bytes=text_bytes,
            bytes_per_token=None if text_bytes is None or not text_tokens else text_bytes / text_tokens,
            single_byte_share=single / text_bytes if text_bytes else None,
            bad_documents=sum(source.bad_documents for source in sources),
            duplicates=sum(source.duplicates for source in sources),
            sources=tuple(sources),
        )


def read_report(cache: Path, keys: Mapping[str, str]) -> CorpusReport | None:
    """Return the report of the sources whose token shards have these keys in the cache, by the names of the sources.

    Return None if one of them has no report: it is not in the cache any more, or an older release tokenized it.
    """
    found = [(name, SourceReport.read(CorpusCache(cache).directory(key))) for name, key in keys.items()]
    sources = [report.model_copy(update={"name": name}) for name, report in found if report is not None]
    return CorpusReport.of(sources) if len(sources) == len(found) else None
