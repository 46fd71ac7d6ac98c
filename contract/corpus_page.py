"""The report of a corpus as text for a terminal: `trainyard corpus show`, of the service or of this host's cache."""

from collections.abc import Iterator

from trainyard.contract.corpus_report import CorpusReport, SourceReport
from trainyard.contract.units import counted, human_bytes

BAR_WIDTH = 30
MAX_TEXT_LINES, MAX_LINE_CHARACTERS = 6, 100
MAX_FILES = 10


def report_lines(report: CorpusReport) -> list[str]:
    """Return the page: the sums if there are several sources, then each source."""
    lines: list[str] = []
    if len(report.sources) > 1:
        lines.append(
            f"{len(report.sources)} sources: {counted(report.files, 'file')}, {human_bytes(report.bytes)}, "
            f"{counted(report.documents, 'document')}, {counted(report.tokens, 'token')}"
        )
    for source in report.sources:
        lines += _source(source)
    return [_printable(line) for line in lines]


def fit_text(report: CorpusReport | SourceReport) -> str:
    """Return how well the tokenizer fits the texts, e.g. ``4.12 bytes per token; 0.3 % of the bytes ...``."""
    if report.bytes_per_token is None or report.single_byte_share is None:
        return "unknown fit: its tokens have no fixed number of bytes"
    share = f"{100 * report.single_byte_share:.2g} %"
    return f"{report.bytes_per_token:.2f} bytes per token; {share} of the bytes are parts of characters without a token"


def _source(source: SourceReport) -> Iterator[str]:
    copies = f", {source.duplicates:,} with the text of an earlier one" if source.duplicates else ", none twice"
    yield f"{source.name}: {counted(source.files, 'file')}, {human_bytes(source.bytes)}"
    yield f"  documents  {source.documents:,}{copies}"
    yield f"  tokens     {source.tokens:,}, with the beginning and end of each document"
    yield f"  tokenizer  {fit_text(source)}; {source.vocab_used:,} of {counted(source.vocab_size, 'token')} occur"
    if source.special_tokens:
        texts = counted(source.special_texts or 0, "text")
        yield f"  special    {counted(source.special_tokens, 'special token')} written in {texts}"
    yield from _lengths(source)
    yield from _bad(source)
    for sample in source.samples:
        place = f"{sample.file}, document {sample.document:,}, {counted(sample.tokens, 'token')}"
        yield f"  sample     {place}"
        yield from (f"    | {line}" for line in _excerpt(sample.text, sample.truncated))
    yield from _files(source)


def _lengths(source: SourceReport) -> Iterator[str]:
    most = max((bucket.documents for bucket in source.lengths), default=0)
    for number, bucket in enumerate(source.lengths):
        label = "lengths" if not number else ""
        numbers = f"{bucket.min:,}" if bucket.min == bucket.max else f"{bucket.min:,} to {bucket.max:,}"
        bar = "#" * -(-bucket.documents * BAR_WIDTH // most)
        yield f"  {label:<11}{numbers:>22} tokens  {bucket.documents:>12,}  {bar}"


def _bad(source: SourceReport) -> Iterator[str]:
    if source.bad_documents:
        yield f"  bad        {counted(source.bad_documents, 'document')} left out"
    for bad in source.bad:
        yield f"    {bad.file}, line {bad.line:,}: {bad.reason}"
    if more := source.bad_documents - len(source.bad):
        yield f"    and {more:,} more"


def _files(source: SourceReport) -> Iterator[str]:
    if source.files < 2:
        return
    for number, file in enumerate(source.listed[:MAX_FILES]):
        label = "files" if not number else ""
        bad = f", {file.bad_documents:,} bad" if file.bad_documents else ""
        counts = f"{counted(file.documents, 'document')}, {counted(file.tokens, 'token')}{bad}"
        yield f"  {label:<11}{file.file}: {human_bytes(file.bytes)}, {counts}"
    if source.files > MAX_FILES:
        yield f"             and {source.files - MAX_FILES:,} more"


def _excerpt(text: str, truncated: bool) -> Iterator[str]:
    lines = text.splitlines() or [""]
    for line in lines[:MAX_TEXT_LINES]:
        yield line if len(line) <= MAX_LINE_CHARACTERS else f"{line[:MAX_LINE_CHARACTERS]}..."
    if truncated or len(lines) > MAX_TEXT_LINES:
        yield "..."


def _printable(line: str) -> str:
    # Texts and names come from other people: they must not control the terminal.
    return "".join(character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in line)
