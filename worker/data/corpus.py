"""From a corpus file to token shards on disk, once, and the command that checks a corpus.

A corpus is kept below the cache directory under a key of its content, the tokenizer, the text field and the format:
``tokens.bin`` (every document as beginning, text, end; uint16 or uint32), ``offsets.bin`` (int64, where each document
begins, and the end), ``meta.json``. It is built in a directory of its own under a lock and published by rename, so
ranks and jobs that want the same one build it once, and a build that was killed leaves nothing that could be taken for
a corpus. The next build of the same goes on where it ended.
"""

import argparse
import hashlib
import io
import json
import os
import sys
import time
import weakref
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol, Self

import numpy as np
import numpy.typing as npt

from trainyard.contract.cache import CorpusCache
from trainyard.contract.locks import FileLock, LockBusy
from trainyard.contract.rundir import read_json, write_json
from trainyard.contract.tokenizer_info import TokenizerInvalid
from trainyard.worker.data.file import open_regular
from trainyard.worker.data.jsonl import (
    BadLineGrouper,
    DataInvalid,
    Document,
    ParseStats,
    VerboseParseStats,
    require_unchanged,
)
from trainyard.worker.data.readers import Reader, detect_plain_text, open_reader
from trainyard.worker.data.shards import ShardWriter, build_directory, memmap_array
from trainyard.worker.data.tokenizers import Ids, Tokenizer, load_tokenizer

FORMAT = 1
"""Part of the key: a change of what is stored makes new shards and never misreads old ones."""

BATCH_CHARACTERS = 1 << 20
"""Text handed to the tokenizer at once."""

RECENT_CHANGE_SECONDS = 2.0
"""A file that changed less than so long ago may change again without a trace in its times."""

ProgressCallback = Callable[[int, int], None]
"""Called with (bytes done, bytes in total): after each batch of documents, and with 0 done while the file is hashed or
another process builds the same corpus. It may raise, which ends the work."""


@dataclass(frozen=True)
class CorpusMeta:
    """What the shards hold. ``tokens`` counts beginnings and ends too; ``named`` are the first bad lines and why."""

    content: str
    bytes: int
    tokenizer: str
    text_field: str
    vocab_size: int
    token_bytes: int
    documents: int
    tokens: int
    lines: int
    blank_lines: int
    bad_lines: int
    named: tuple[tuple[int, str], ...]

    @classmethod
    def read(cls, path: Path) -> Self:
        """From meta.json."""
        raw: dict[str, Any] = json.loads(path.read_bytes())
        named = tuple((int(line), str(why)) for line, why in raw.pop("named"))
        return cls(named=named, **raw)

    @property
    def tally(self) -> ParseStats:
        """The counts of lines."""
        return ParseStats(self.lines, self.blank_lines, self.bad_lines, self.documents, list(self.named))


class Corpus:
    """Token shards, memory-mapped: document i is ``tokens[offsets[i] : offsets[i + 1]]``.

    ``use`` keeps it in the cache for as long as this object lives.
    """

    def __init__(self, directory: Path, use: FileLock) -> None:
        weakref.finalize(self, use.release)
        self.directory = directory
        self.meta = CorpusMeta.read(directory / "meta.json")
        dtype = np.uint16 if self.meta.token_bytes == 2 else np.uint32
        self.tokens: npt.NDArray[Any] = memmap_array(directory / "tokens.bin", dtype, self.meta.tokens)
        self.offsets: npt.NDArray[np.int64] = memmap_array(directory / "offsets.bin", np.int64, self.meta.documents + 1)

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Held while something is added beside the shards."""
        with build_lock(self.directory.with_suffix(".lock"), lambda: None):
            yield


def open_corpus(
    path: Path,
    tokenizer: Tokenizer,
    *,
    cache: Path,
    text_field: str = "text",
    max_bad_lines: float = 0.01,
    progress: ProgressCallback | None = None,
) -> Corpus:
    """The token shards of ``path``, built first where the ``cache`` does not have them yet.

    Raises:
        DataInvalid: ``path`` is no readable corpus, changed while it was read, holds no document, or more than a
            share of ``max_bad_lines`` of its lines is unreadable.
        OSError: the cache cannot be written, for instance for want of space.
    """
    cache.mkdir(parents=True, exist_ok=True)
    progress = progress or _no_progress
    content = content_digest(path, cache, progress)
    key = _key(content, tokenizer.fingerprint, text_field, plain=detect_plain_text(path))
    waiting = partial(progress, 0, path.stat().st_size)
    use = CorpusCache(cache).use(key, waiting)
    try:
        directory = cache / key
        if not (directory / "meta.json").exists():
            with build_lock(directory.with_suffix(".lock"), waiting):
                if not (directory / "meta.json").exists():
                    _build(path, tokenizer, text_field, content, directory, progress)
        corpus = Corpus(directory, use)
    except BaseException:
        use.release()
        raise
    require_usable(path, corpus.meta.tally, text_field, max_bad_lines)
    return corpus


def _key(content: str, tokenizer: str, text_field: str, *, plain: bool) -> str:
    """Name of the shards. Plain text has no fields, and the same bytes as JSONL are other documents."""
    parts = [FORMAT, content, tokenizer, *(["", "plain text"] if plain else [text_field])]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


def require_usable(path: Path, tally: ParseStats, text_field: str, max_bad_lines: float) -> None:
    """Raise DataInvalid where there is nothing to train on, or too many bad lines."""
    if tally.documents == 0:
        raise DataInvalid(f"{path} {tally.empty_reason(text_field)}")
    share = tally.bad_lines / (tally.bad_lines + tally.documents)
    if share > max_bad_lines:
        raise DataInvalid(
            f"{path} has {tally.describe_bad()}. That is {share:.2%} of its lines, and max_bad_lines allows "
            f"{max_bad_lines:.2%}: mend the lines, or raise max_bad_lines"
        )


def content_digest(path: Path, cache: Path, progress: ProgressCallback) -> str:
    """sha256 of the file. Remembered below ``cache`` for as long as the file's inode, size and times are the same."""
    with open_regular(path) as file:
        before = os.fstat(file.fileno())
        identity = [before.st_dev, before.st_ino, before.st_size, before.st_mtime_ns, before.st_ctime_ns]
        name = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:32]
        waiting = partial(progress, 0, before.st_size)
        # One lock for every 256th file, so that their number stays bounded.
        with build_lock(cache / f"content-{name[:2]}.lock", waiting):
            known = read_json(cache / f"content-{name}.json")
            if known is not None:
                return str(known["sha256"])
            digest = _digest(file, waiting)
            after = os.fstat(file.fileno())
            if (after.st_size, after.st_mtime_ns) != (before.st_size, before.st_mtime_ns):
                require_unchanged(path)
            # A write within the clock's grain of the last one does not show in the times: a fresh file is forgotten.
            if time.time() - before.st_ctime > RECENT_CHANGE_SECONDS:
                write_json(cache / f"content-{name}.json", {"sha256": digest, "path": str(path)})
    return digest


def _digest(file: io.BufferedReader, waiting: Callable[[], None]) -> str:
    found = hashlib.sha256()
    while block := file.read(1 << 22):
        found.update(block)
        waiting()
    return found.hexdigest()


@contextmanager
def build_lock(path: Path, waiting: Callable[[], None]) -> Iterator[None]:
    """Hold the lock on ``path``; ``waiting`` is called each second until then, and may raise."""
    with FileLock(path) as lock:
        while True:
            try:
                lock.take(seconds=1.0)
                break
            except LockBusy:
                waiting()
        yield


def _no_progress(done: int, total: int) -> None:
    """Report nothing."""


def _build(
    path: Path, tokenizer: Tokenizer, text_field: str, content: str, directory: Path, progress: ProgressCallback
) -> None:
    """Write the shards into a directory of their own and publish it as ``directory``. Called under its lock."""
    with build_directory(directory, goes_on=True) as building:
        token_bytes = 2 if tokenizer.vocab_size <= 1 << 16 else 4
        with open_reader(path) as reader, ShardWriter(building, tokenizer, token_bytes) as shards:
            if shards.begun is not None:
                reader.skip(shards.begun.tally, lambda: progress(reader.bytes_read, reader.size))
            tally = tokenize_file(reader, tokenizer, text_field, shards, progress)
            if reader.digest != content:
                require_unchanged(path)
        meta = CorpusMeta(
            content=content,
            bytes=reader.size,
            tokenizer=tokenizer.fingerprint,
            text_field=text_field,
            vocab_size=tokenizer.vocab_size,
            token_bytes=token_bytes,
            documents=tally.documents,
            tokens=shards.tokens,
            lines=tally.lines,
            blank_lines=tally.blank_lines,
            bad_lines=tally.bad_lines,
            named=tuple(tally.examples),
        )
        write_json(building / "meta.json", asdict(meta))


class TokenSink(Protocol):
    """Takes the token ids of documents, in order."""

    def add(self, documents: Sequence[Ids], tally: ParseStats) -> None:
        """Take some more; ``tally`` counts what the corpus holds up to the last of them."""


def tokenize_file(
    reader: Reader,
    tokenizer: Tokenizer,
    text_field: str,
    sink: TokenSink,
    progress: ProgressCallback,
    without: ParseStats | None = None,
) -> ParseStats:
    """Read the rest of ``reader`` into ``sink``; what all of it holds.

    A text without a token is a bad line too: ``without`` counts these.
    """
    without = without or ParseStats()
    with closing(_encoded(encode_batches(reader, text_field), tokenizer)) as encoded_batches:
        for batch, encoded in encoded_batches:
            for document, ids in zip(batch.documents, encoded, strict=True):
                if not len(ids):
                    without.add_bad(document.line, "the tokenizer makes no token of its text")
            sink.add([ids for ids in encoded if len(ids)], batch.tally.minus(without))
            progress(reader.bytes_read, reader.size)
    return reader.stats.minus(without)


@dataclass(frozen=True)
class EncodeBatch:
    """Documents that are encoded at once, and what was read up to the last of them."""

    documents: list[Document]
    tally: ParseStats


def _encoded(
    batched: Iterator[EncodeBatch], tokenizer: Tokenizer
) -> Generator[tuple[EncodeBatch, list[Ids]], None, None]:
    """Each batch with its ids, in order. While the library's threads work on one, the last is stored and the next read.

    At most two batches wait, so memory stays bounded.
    """
    with ThreadPoolExecutor(max_workers=1) as pool:
        waiting: tuple[EncodeBatch, Future[list[Ids]]] | None = None
        for batch in batched:
            following = batch, pool.submit(tokenizer.encode_batch, [document.text for document in batch.documents])
            if waiting is not None:
                yield waiting[0], waiting[1].result()
            waiting = following
        if waiting is not None:
            yield waiting[0], waiting[1].result()


def encode_batches(reader: Reader, text_field: str) -> Iterator[EncodeBatch]:
    """Groups of documents whose texts are about ``BATCH_CHARACTERS`` long together."""
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


class TokenCounter:
    """A sink that keeps nothing but the number of tokens."""

    def __init__(self) -> None:
        self.tokens = 0

    def add(self, documents: Sequence[Ids], tally: ParseStats) -> None:
        """Count documents, each with its beginning and end."""
        del tally
        self.tokens += sum(len(ids) + 2 for ids in documents)


def main(arguments: Sequence[str] | None = None) -> int:
    """``python -m trainyard.worker.data.corpus check FILE``; 1 where a job would refuse the file, 2 on wrong usage."""
    parser = argparse.ArgumentParser(prog="trainyard corpus", description="Corpora for pretraining.")
    command = parser.add_subparsers(dest="command", required=True, metavar="check")
    checking = command.add_parser("check", help="read a corpus as a job would, and name its bad lines")
    checking.add_argument("file", type=Path, metavar="FILE", help="JSONL, .txt, packed or parquet")
    checking.add_argument("--text-field", "--text_field", default="text", metavar="KEY", help="key of the text")
    checking.add_argument("--tokenizer", "--tokenizer_path", default="byte", metavar="DIR", help='or "byte"')
    checking.add_argument("--max-bad-lines", "--max_bad_lines", type=_fraction, default=0.01, metavar="SHARE")
    checking.add_argument("--json", action="store_true", help="one JSON document")
    options = parser.parse_args(arguments)
    try:
        if options.json:
            return log_progress(options.file, options.tokenizer, options.text_field, options.max_bad_lines)
        check_corpus(options.file, options.tokenizer, options.text_field, options.max_bad_lines)
    except (DataInvalid, TokenizerInvalid, OSError) as error:
        print(f"trainyard corpus: {error}", file=sys.stderr)
        return 1
    return 0


def log_progress(file: Path, tokenizer_path: str, text_field: str, max_bad_lines: float) -> int:
    """Print what `check` finds as one JSON document, and return its exit code."""
    tokenizer, count = load_tokenizer(tokenizer_path), TokenCounter()
    with open_reader(file) as reader:
        tally = tokenize_file(reader, tokenizer, text_field, count, _no_progress)
    why_not = None
    try:
        require_usable(file, tally, text_field, max_bad_lines)
    except DataInvalid as error:
        why_not = str(error)
    named = [{"line": line, "why": why} for line, why in tally.examples]
    found = {"path": str(file), "usable": why_not is None, "why_not": why_not, "tokens": count.tokens}
    print(json.dumps({**found, **asdict(tally), "named": named}))
    return 0 if why_not is None else 1


def _fraction(text: str) -> float:
    try:
        share = float(text)
    except ValueError:
        share = -1.0
    if not 0 <= share <= 1:
        raise argparse.ArgumentTypeError("must be a number from 0 to 1")
    return share


def check_corpus(file: Path, tokenizer_path: str, text_field: str, max_bad_lines: float) -> None:
    """Print what a job would find in ``file``. Raises what `open_corpus` would raise. Stores nothing."""
    tokenizer, count, bad = load_tokenizer(tokenizer_path), TokenCounter(), BadLineGrouper(print)
    with open_reader(file) as reader:
        reader.stats = VerboseParseStats(runs=bad)
        tally = tokenize_file(reader, tokenizer, text_field, count, _no_progress, VerboseParseStats(runs=bad))
    bad.end()
    print(f"{file}: {tally.documents:,} documents, {count.tokens:,} tokens, {tally.lines:,} lines")
    for number, what in ((tally.blank_lines, "blank"), (tally.bad_lines, "bad")):
        if number:
            print(f"{number:,} {what} line{'s' if number != 1 else ''}")
    require_usable(file, tally, text_field, max_bad_lines)


if __name__ == "__main__":
    sys.exit(main())
