"""Describe a tokenized corpus in one pass over its tokens, in constant memory. The result is ``report.json``."""

import random
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from trainyard.contract.corpus_files import NamedFile
from trainyard.contract.corpus_report import (
    MAX_BAD_DOCUMENTS,
    MAX_LISTED_FILES,
    MAX_SAMPLE_CHARACTERS,
    REPORT,
    SAMPLES,
    BadDocument,
    FileReport,
    LengthBucket,
    SampleDocument,
    SourceReport,
)
from trainyard.contract.rundir import write_json
from trainyard.worker.data.byte_lengths import ByteLengths, BytesUnknown
from trainyard.worker.data.documents import Hashes, HashFile, Integers, blocks, count_distinct, text_hashes
from trainyard.worker.data.file_counts import FileCounts
from trainyard.worker.data.shards import OFFSETS, TOKENS, memmap_array
from trainyard.worker.data.tokenizers import Tokenizer

SOURCE = "data"
"""Name of a source that has none; see `contract.spec.DataSpec.training_sources`."""

BLOCK_TOKENS = 1 << 18
"""Tokens that a thread reads at once: their hashes fit into the cache of a core."""

Item = TypeVar("Item")
Result = TypeVar("Result")

MAX_SAMPLE_TOKENS = 4 * MAX_SAMPLE_CHARACTERS
"""Enough for the characters, if each of their bytes is a token."""


def write_report(
    directory: Path,
    files: Sequence[NamedFile],
    counts: Sequence[FileCounts],
    tokenizer: Tokenizer,
    text_field: str,
    on_block: Callable[[], None],
    threads: int = 1,
) -> SourceReport:
    """Describe the token shards in ``directory``, made of ``files``, and write report.json into it.

    ``on_block`` is called for each block of tokens, and may raise. ``threads`` read the tokens.
    """
    tokens, documents = sum(entry.tokens for entry in counts), sum(entry.stats.documents for entry in counts)
    dtype = np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32
    shards = _Shards(
        memmap_array(directory / TOKENS, dtype, tokens), memmap_array(directory / OFFSETS, np.int64, documents + 1)
    )
    lengths = _byte_lengths(tokenizer)
    found = _read_tokens(shards, directory, tokenizer.vocab_size, lengths, on_block, threads)
    text_bytes, single_bytes = None, 0
    if lengths is not None:
        text_bytes = int(found.token_counts @ lengths.lengths) - found.inserted_spaces
        single_bytes = int(found.token_counts[_character_parts(tokenizer, lengths)].sum())
    text_tokens = tokens - 2 * documents
    unnamed = SourceReport(
        name=SOURCE,
        files=len(files),
        listed=(),
        bytes=sum(entry.bytes for entry in counts),
        documents=documents,
        tokens=tokens,
        text_bytes=text_bytes,
        bytes_per_token=None if text_bytes is None or not text_tokens else text_bytes / text_tokens,
        single_byte_share=single_bytes / text_bytes if text_bytes else None,
        vocab_size=tokenizer.vocab_size,
        vocab_used=int((found.token_counts > 0).sum()),
        lengths=_buckets(found.length_counts),
        bad_documents=sum(entry.stats.bad_lines for entry in counts),
        bad=(),
        samples=tuple(_sample(shards, number, tokenizer) for number in _sampled_documents(documents)),
        duplicates=found.duplicates,
        special_tokens=sum(entry.stats.special_tokens for entry in counts),
        special_texts=sum(entry.stats.special_texts for entry in counts),
        text_field=text_field,
        tokenizer=tokenizer.fingerprint,
    )
    report = name_files(unnamed, files, counts)
    write_json(directory / REPORT, report.model_dump(mode="json"))
    return report


def name_files(report: SourceReport, files: Sequence[NamedFile], counts: Sequence[FileCounts]) -> SourceReport:
    """Return the report with the names of ``files``.

    The cache knows the content of files and not their names: the next run may read the same texts from renamed files.
    """
    named = list(zip(files, counts, strict=True))
    listed = tuple(
        FileReport(
            file=file.name,
            bytes=entry.bytes,
            documents=entry.stats.documents,
            tokens=entry.tokens,
            bad_documents=entry.stats.bad_lines,
        )
        for file, entry in named[:MAX_LISTED_FILES]
    )
    bad = (
        BadDocument(file=file.name, line=line, reason=reason)
        for file, entry in named
        for line, reason in entry.stats.examples
    )
    ends = np.cumsum([entry.stats.documents for entry in counts])
    samples = []
    for sample, number in zip(report.samples, _sampled_documents(report.documents), strict=True):
        index = int(np.searchsorted(ends, number, side="right"))
        in_file = number - (int(ends[index - 1]) if index else 0) + 1
        samples.append(sample.model_copy(update={"file": files[index].name, "document": in_file}))
    changes = {"listed": listed, "bad": tuple(islice(bad, MAX_BAD_DOCUMENTS)), "samples": tuple(samples)}
    return report.model_copy(update=changes)


@dataclass(frozen=True)
class _Shards:
    """Token shards: document i is ``tokens[offsets[i] : offsets[i + 1]]``, with BOS and EOS."""

    tokens: npt.NDArray[Any]
    offsets: Integers


@dataclass(frozen=True)
class _TokenFacts:
    """``token_counts`` [vocabulary]; ``length_counts`` [i]: documents of 2**i to 2**(i + 1) - 1 tokens of text.

    ``inserted_spaces``: see `worker.data.byte_lengths.ByteLengths`.
    """

    token_counts: Integers
    length_counts: Integers
    duplicates: int
    inserted_spaces: int


def _byte_lengths(tokenizer: Tokenizer) -> ByteLengths | None:
    try:
        return tokenizer.byte_lengths()
    except BytesUnknown:
        return None


def _character_parts(tokenizer: Tokenizer, lengths: ByteLengths) -> list[int]:
    """Return the ids of the tokens that are one byte of a character of several bytes: alone they are invalid UTF-8."""
    return [
        number for number in np.flatnonzero(lengths.lengths == 1).tolist() if tokenizer.decode([number]) == "\ufffd"
    ]


@dataclass(frozen=True)
class _Block:
    """What `_TokenFacts` needs of the tokens of a block of documents. ``hashes`` [documents]."""

    token_counts: Integers
    length_counts: Integers
    inserted_spaces: int
    hashes: Hashes


def _read_tokens(
    shards: _Shards,
    directory: Path,
    vocab_size: int,
    lengths: ByteLengths | None,
    on_block: Callable[[], None],
    threads: int,
) -> _TokenFacts:
    documents = len(shards.offsets) - 1
    added = lengths.added if lengths is not None and lengths.inserts_space else None
    spaces = 0
    token_counts, length_counts = np.zeros(vocab_size, np.int64), np.zeros(64, np.int64)
    read = partial(_read_block, shards, vocab_size, added)
    with HashFile(directory) as hashes:
        for block in _in_threads(read, blocks(shards.offsets, BLOCK_TOKENS), threads):
            token_counts += block.token_counts
            length_counts += block.length_counts
            spaces += block.inserted_spaces
            hashes.append(block.hashes)
            on_block()
        distinct = count_distinct(hashes.read(documents))
    return _TokenFacts(token_counts, length_counts, documents - distinct, spaces)


def _read_block(
    shards: _Shards, vocab_size: int, added: npt.NDArray[np.bool_] | None, documents: tuple[int, int]
) -> _Block:
    first, last = documents
    offsets = shards.offsets[first : last + 1]
    tokens = shards.tokens[int(offsets[0]) : int(offsets[-1])]
    # frexp is exact, and a text has at least one token.
    exponents = np.frexp((np.diff(offsets) - 2).astype(np.float64))[1] - 1
    return _Block(
        np.bincount(tokens, minlength=vocab_size),
        np.bincount(exponents, minlength=64),
        0 if added is None else int((added[tokens[:-1]] & ~added[tokens[1:]]).sum()),
        text_hashes(shards.tokens, offsets),
    )


def _in_threads(work: Callable[[Item], Result], items: Iterable[Item], threads: int) -> Iterator[Result]:
    """Yield the results in order. At most two for each thread are in memory."""
    waiting: deque[Future[Result]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        try:
            for item in items:
                if len(waiting) == 2 * threads:
                    yield waiting.popleft().result()
                waiting.append(pool.submit(work, item))
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)


def _buckets(length_counts: Integers) -> tuple[LengthBucket, ...]:
    used = np.flatnonzero(length_counts)
    if not len(used):
        return ()
    return tuple(
        LengthBucket(min=2**power, max=2 ** (power + 1) - 1, documents=int(length_counts[power]))
        for power in range(int(used[0]), int(used[-1]) + 1)
    )


def _sampled_documents(documents: int) -> list[int]:
    """Return the numbers of the sampled documents, in order. The same corpus always has the same samples."""
    return sorted(random.Random(documents).sample(range(documents), min(SAMPLES, documents)))  # noqa: S311 - no secret


def _sample(shards: _Shards, number: int, tokenizer: Tokenizer) -> SampleDocument:
    ids = shards.tokens[int(shards.offsets[number]) + 1 : int(shards.offsets[number + 1]) - 1]
    text = tokenizer.decode(ids[:MAX_SAMPLE_TOKENS].tolist())
    truncated = len(text) > MAX_SAMPLE_CHARACTERS or len(ids) > MAX_SAMPLE_TOKENS
    return SampleDocument(file="", document=0, tokens=len(ids), text=text[:MAX_SAMPLE_CHARACTERS], truncated=truncated)
