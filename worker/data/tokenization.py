"""Tokenize the documents of a file into a sink: read, encoded and stored at the same time, in constant memory.

The processes that tokenize parts of a corpus import this module and little more, because each of them pays for it.
"""

import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from trainyard.contract.tokenizer_info import TokenizerInvalid
from trainyard.worker.data.jsonl import Document, ParseStats
from trainyard.worker.data.readers import Reader
from trainyard.worker.data.tokenizers import Ids, Tokenizer, backtracking_message

BATCH_CHARACTERS = 1 << 20
"""Size of an encode batch, in characters."""

ENCODE_SECONDS = 120.0
"""If a batch takes longer, a regular expression backtracks. Other batches take seconds."""

ProgressCallback = Callable[[int, int], None]
"""Called with (bytes done, total bytes) after each batch, and with 0 bytes done while the file is hashed or another
process builds the same corpus. It may raise to stop the build."""


def no_progress(done: int, total: int) -> None:
    pass


def token_bytes(tokenizer: Tokenizer) -> int:
    """Return the size of a stored token id."""
    return 2 if tokenizer.vocab_size <= 1 << 16 else 4


class TokenSink(Protocol):
    """Receives the token ids of documents, in order."""

    def add(self, documents: Sequence[Ids], stats: ParseStats) -> None:
        """Add documents; ``stats`` counts the corpus up to the last of them."""


def tokenize_file(
    reader: Reader,
    tokenizer: Tokenizer,
    text_field: str,
    sink: TokenSink,
    progress: ProgressCallback,
    found: ParseStats | None = None,
) -> ParseStats:
    """Tokenize the rest of ``reader`` into ``sink``; return the counts of the whole file.

    A text that gives no token is a bad line too. ``found`` counts these, and the special tokens.
    """
    found = found or ParseStats()
    batches = encode_batches(reader, text_field)
    waiting = lambda: progress(reader.bytes_read, reader.size)  # noqa: E731 - `bytes_read` grows
    with closing(_encode_ahead(batches, tokenizer, waiting)) as encoded_batches:
        for batch, encoded in encoded_batches:
            for document, ids in zip(batch.documents, encoded, strict=True):
                if not len(ids):
                    found.add_bad(document.line, "the tokenizer makes no token of its text")
            _count_added_tokens(batch.documents, encoded, tokenizer, found)
            sink.add([ids for ids in encoded if len(ids)], batch.stats.with_encoding(found))
            progress(reader.bytes_read, reader.size)
    return reader.stats.with_encoding(found)


def _count_added_tokens(
    documents: Sequence[Document], encoded: Sequence[Ids], tokenizer: Tokenizer, found: ParseStats
) -> None:
    if tokenizer.special_pattern is not None:
        for document in documents:
            if marks := len(tokenizer.special_pattern.findall(document.text)):
                found.special_tokens += marks
                found.special_texts += 1
    if tokenizer.ordinary_ids:
        ordinary = np.array(sorted(tokenizer.ordinary_ids), np.uint32)
        found.added_tokens += sum(int(np.isin(ids, ordinary).sum()) for ids in encoded)


@dataclass(frozen=True)
class EncodeBatch:
    """Documents that are encoded together, and the counts of the file up to the last of them."""

    documents: list[Document]
    stats: ParseStats


def _encode_ahead(
    batches: Iterator[EncodeBatch], tokenizer: Tokenizer, waiting: Callable[[], None]
) -> Generator[tuple[EncodeBatch, list[Ids]], None, None]:
    """Yield each batch with its ids, in order. While one is encoded, the one before is stored and the next is read.

    At most two batches are in memory. While this waits, ``waiting`` is called once a second and may raise.
    """
    pending: tuple[EncodeBatch, _Encoding] | None = None
    try:
        for batch in batches:
            submitted = batch, _Encoding(tokenizer, batch, pending[1] if pending is not None else None)
            if pending is not None:
                yield pending[0], pending[1].ids(waiting)
            pending = submitted
        if pending is not None:
            yield pending[0], pending[1].ids(waiting)
    finally:
        if pending is not None:
            pending[1].cancel()


class _Encoding:
    """A batch that is encoded in a thread of its own, after the batch before it.

    The thread does not keep the process from ending: it may be in a search that takes for ever.
    """

    def __init__(self, tokenizer: Tokenizer, batch: EncodeBatch, before: "_Encoding | None") -> None:
        self._tokenizer = tokenizer
        self._batch = batch
        self._future: Future[list[Ids]] = Future()
        self._thread = threading.Thread(target=self._run, args=(before,), name="encode", daemon=True)
        self._thread.start()

    def _run(self, before: "_Encoding | None") -> None:
        if before is not None:
            before.wait()
        if not self._future.set_running_or_notify_cancel():
            return
        try:
            self._future.set_result(self._tokenizer.encode_batch([document.text for document in self._batch.documents]))
        except BaseException as error:
            self._future.set_exception(error)

    def wait(self) -> None:
        """Wait until the batch is encoded."""
        self._thread.join()

    def cancel(self) -> None:
        """Cancel the batch if it has not begun; otherwise wait for it if it is certain to end."""
        if not self._future.cancel() and not getattr(self._tokenizer, "patterns", ()):
            self._thread.join()

    def ids(self, waiting: Callable[[], None]) -> list[Ids]:
        """Return the ids of each document. Raises what the tokenizer raises, and TokenizerInvalid if it never ends."""
        deadline = time.monotonic() + ENCODE_SECONDS
        while True:
            try:
                return self._future.result(timeout=1.0)
            except TimeoutError:
                waiting()
            patterns = getattr(self._tokenizer, "patterns", ())
            if patterns and time.monotonic() > deadline:
                first, last = self._batch.documents[0].line, self._batch.documents[-1].line
                why = f"lines {first} to {last} took more than {ENCODE_SECONDS:g} s"
                raise TokenizerInvalid(backtracking_message("the tokenizer", patterns, why))


def encode_batches(reader: Reader, text_field: str) -> Iterator[EncodeBatch]:
    """Yield batches of documents of about ``BATCH_CHARACTERS`` characters."""
    batch: list[Document] = []
    characters = 0
    for document in reader.documents(text_field):
        batch.append(document)
        characters += len(document.text)
        if characters >= BATCH_CHARACTERS:
            yield EncodeBatch(batch, replace(reader.stats))
            batch, characters = [], 0
    if batch:
        yield EncodeBatch(batch, replace(reader.stats))
