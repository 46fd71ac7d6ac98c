"""Tokenize a corpus file into token shards in the cache, and the command that checks a corpus.

A tokenized corpus is a directory in the cache, named by a hash of its content, tokenizer, text field and format:
``tokens.bin`` (each document as BOS, text, EOS; uint16 or uint32), ``offsets.bin`` (int64, the start of each document,
and the total), ``meta.json``, and ``report.json`` (see `contract.corpus_report`). It is built in a temporary directory
under a lock and published by rename: ranks and jobs that need the same corpus build it once, and a killed build is
never mistaken for a corpus. The next build resumes it.
"""

import argparse
import hashlib
import io
import json
import os
import shutil
import sys
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from trainyard.contract.cache import CorpusCache, building_of
from trainyard.contract.corpus_files import CorpusFilesInvalid, NamedFile, expand, shown
from trainyard.contract.locks import FileLock, LockBusy
from trainyard.contract.rundir import read_json, write_json
from trainyard.contract.stdio import run_command
from trainyard.contract.tokenizer_info import TokenizerInvalid, special_tokens_warning
from trainyard.contract.units import counted
from trainyard.worker.data.file import PrefixDiffers, open_regular
from trainyard.worker.data.file_counts import FileCounts
from trainyard.worker.data.jsonl import (
    MAX_BAD_LINE_EXAMPLES,
    BadLineGrouper,
    DataInvalid,
    ParseStats,
    VerboseParseStats,
    require_unchanged,
)
from trainyard.worker.data.readers import detect_plain_text, open_reader
from trainyard.worker.data.report import write_report
from trainyard.worker.data.shards import ShardWriter, build_directory, memmap_array
from trainyard.worker.data.tokenization import (
    ProgressCallback,
    no_progress,
    token_bytes,
    tokenize_file,
)
from trainyard.worker.data.tokenizers import Ids, Tokenizer, load_tokenizer

FORMAT = 1
"""Part of the cache key: increment it when the files change, so that old shards are never misread."""

RECENT_CHANGE_SECONDS = 2.0
"""The digest of a file changed within this time is not cached: another write may leave the same mtime."""


@dataclass(frozen=True)
class CorpusMeta:
    """Contents of meta.json. ``tokens`` includes BOS and EOS; ``named`` holds (line, reason) of the first bad lines.

    ``special_tokens``, ``special_texts``, ``added_tokens``: see `ParseStats`; None in a corpus made by release 0.1.
    """

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
    special_tokens: int | None = None
    special_texts: int | None = None
    added_tokens: int = 0

    @classmethod
    def read(cls, path: Path) -> Self:
        raw: dict[str, Any] = json.loads(path.read_bytes())
        named = tuple((int(line), str(reason)) for line, reason in raw.pop("named"))
        return cls(named=named, **raw)

    @classmethod
    def of(
        cls, stats: ParseStats, *, content: str, size: int, tokens: int, tokenizer: Tokenizer, text_field: str
    ) -> Self:
        """Return the metadata of a corpus of ``size`` bytes with these counts."""
        return cls(
            content=content,
            bytes=size,
            tokenizer=tokenizer.fingerprint,
            text_field=text_field,
            vocab_size=tokenizer.vocab_size,
            token_bytes=token_bytes(tokenizer),
            documents=stats.documents,
            tokens=tokens,
            lines=stats.lines,
            blank_lines=stats.blank_lines,
            bad_lines=stats.bad_lines,
            named=tuple(stats.examples),
            special_tokens=stats.special_tokens,
            special_texts=stats.special_texts,
            added_tokens=stats.added_tokens,
        )

    @property
    def stats(self) -> ParseStats:
        return ParseStats(
            lines=self.lines,
            blank_lines=self.blank_lines,
            bad_lines=self.bad_lines,
            documents=self.documents,
            examples=list(self.named),
            special_tokens=self.special_tokens or 0,
            special_texts=self.special_texts or 0,
            added_tokens=self.added_tokens,
        )


class Corpus:
    """Memory-mapped token shards: document i is ``tokens[offsets[i] : offsets[i + 1]]``.

    ``use`` is a shared lock: the corpus is not evicted from the cache while this object lives. ``stats``: the counts of
    its lines. ``sketches``: of its files, if it was made of several; see `contract.corpus_files.file_sketch`.
    """

    def __init__(self, directory: Path, use: FileLock) -> None:
        weakref.finalize(self, use.release)
        self.directory = directory
        self.meta = CorpusMeta.read(directory / "meta.json")
        self.stats = self.meta.stats
        self.sketches: list[str] = []
        dtype = np.uint16 if self.meta.token_bytes == 2 else np.uint32
        self.tokens: npt.NDArray[Any] = memmap_array(directory / "tokens.bin", dtype, self.meta.tokens)
        self.offsets: npt.NDArray[np.int64] = memmap_array(directory / "offsets.bin", np.int64, self.meta.documents + 1)

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the build lock, to add files to the directory."""
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
    roots: Sequence[Path] = (),
) -> Corpus:
    """Return the token shards of ``path``, built first if they are not in ``cache``.

    ``path`` is opened once, below one of ``roots`` if any are given: everything is read from the file that was checked.

    Raises:
        DataInvalid: ``path`` is not a readable corpus, changed while it was read, holds no document, or has a larger
            share of bad lines than ``max_bad_lines``.
        OutsideRoots: ``path`` leads out of the roots.
        OSError: the cache cannot be written, for example because the disk is full.
    """
    cache.mkdir(parents=True, exist_ok=True)
    with open_regular(path, roots) as file:
        return _open_corpus(path, file, tokenizer, cache, text_field, max_bad_lines, progress or no_progress)


def _open_corpus(
    path: Path,
    file: io.BufferedReader,
    tokenizer: Tokenizer,
    cache: Path,
    text_field: str,
    max_bad_lines: float,
    progress: ProgressCallback,
) -> Corpus:
    content = content_digest(path, cache, progress, file)
    key = cache_key(content, tokenizer, text_field, plain=detect_plain_text(path, file))
    corpus = open_built(
        cache,
        key,
        partial(progress, 0, os.fstat(file.fileno()).st_size),
        lambda directory: _build(path, file, tokenizer, text_field, content, directory, progress),
    )
    require_usable(path, corpus.stats, text_field, max_bad_lines)
    return corpus


def open_built(cache: Path, key: str, waiting: Callable[[], None], build: Callable[[Path], None]) -> Corpus:
    """Open a corpus of the cache. If it is not there, ``build`` makes its directory, under the corpus's lock."""
    use = CorpusCache(cache).use(key, waiting)
    try:
        directory = cache / key
        if not (directory / "meta.json").exists():
            with build_lock(directory.with_suffix(".lock"), waiting):
                if not (directory / "meta.json").exists():
                    try:
                        build(directory)
                    except PrefixDiffers:
                        # The stored part belongs to a corpus with other bytes.
                        shutil.rmtree(building_of(directory))
                        build(directory)
        return Corpus(directory, use)
    except BaseException:
        use.release()
        raise


def cache_key(content: str, tokenizer: Tokenizer, text_field: str, *, plain: bool) -> str:
    # Plain text has no fields, and the same bytes read as JSONL are different documents.
    parts = [FORMAT, content, tokenizer.fingerprint, *(["", "plain text"] if plain else [text_field])]
    if tokenizer.matching:
        # Only this part of a key is an object, so no text_field can produce the same key.
        parts.append({"special_tokens": tokenizer.matching})
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


def require_usable(path: Path | str, stats: ParseStats, text_field: str, max_bad_lines: float) -> None:
    """Raise DataInvalid if there is nothing to train on, or if there are too many bad lines."""
    if stats.documents == 0:
        raise DataInvalid(f"{shown(path)} {stats.empty_reason(text_field)}")
    share = stats.bad_lines / (stats.bad_lines + stats.documents)
    if share > max_bad_lines:
        raise DataInvalid(
            f"{shown(path)} has {stats.describe_bad()}. That is {share:.2%} of its lines, and max_bad_lines allows "
            f"{max_bad_lines:.2%}: mend the lines, or raise max_bad_lines"
        )


def content_digest(path: Path, cache: Path, progress: ProgressCallback, opened: io.BufferedReader | None = None) -> str:
    """Return the file's sha256, cached in ``cache`` by the file's inode, size and times.

    ``opened``: the same file, opened before.
    """
    with nullcontext(opened) if opened is not None else open_regular(path) as file:
        before = os.fstat(file.fileno())
        identity = [before.st_dev, before.st_ino, before.st_size, before.st_mtime_ns, before.st_ctime_ns]
        name = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:32]
        waiting = partial(progress, 0, before.st_size)
        # One of 256 locks, so that their number is bounded.
        with build_lock(cache / f"content-{name[:2]}.lock", waiting):
            known = read_json(cache / f"content-{name}.json")
            if known is not None:
                return str(known["sha256"])
            digest = _hash_file(file, waiting)
            after = os.fstat(file.fileno())
            if (after.st_size, after.st_mtime_ns) != (before.st_size, before.st_mtime_ns):
                require_unchanged(path)
            # A write within the file system's clock resolution leaves the same times: do not cache a fresh file.
            if time.time() - before.st_ctime > RECENT_CHANGE_SECONDS:
                write_json(cache / f"content-{name}.json", {"sha256": digest, "path": str(path)})
    return digest


def _hash_file(file: io.BufferedReader, waiting: Callable[[], None]) -> str:
    sha256 = hashlib.sha256()
    while block := file.read(1 << 22):
        sha256.update(block)
        waiting()
    return sha256.hexdigest()


@contextmanager
def build_lock(path: Path, waiting: Callable[[], None]) -> Iterator[None]:
    """Hold the lock file ``path``. While it waits, ``waiting`` is called once a second and may raise."""
    with FileLock(path) as lock:
        while True:
            try:
                lock.take(seconds=1.0)
                break
            except LockBusy:
                waiting()
        yield


def _build(
    path: Path,
    file: io.BufferedReader,
    tokenizer: Tokenizer,
    text_field: str,
    content: str,
    directory: Path,
    progress: ProgressCallback,
) -> None:
    """Build the shards and publish them as ``directory``, whose lock the caller holds.

    Raises PrefixDiffers if an interrupted build, which was to be continued, has stored another corpus.
    """
    with build_directory(directory, resumable=True) as building:
        with (
            open_reader(path, file) as reader,
            ShardWriter(building, tokenizer, token_bytes(tokenizer), lambda: reader.position) as shards,
        ):
            if (entry := shards.resumed_from) is not None:
                reader.skip(entry.stats, entry.position, lambda: progress(reader.bytes_read, reader.size))
            stats = tokenize_file(reader, tokenizer, text_field, shards, progress)
            if reader.digest != content:
                require_unchanged(path)
        meta = CorpusMeta.of(
            stats,
            content=content,
            size=reader.size,
            tokens=shards.tokens,
            tokenizer=tokenizer,
            text_field=text_field,
        )
        write_json(building / "meta.json", asdict(meta))
        counts = FileCounts(content, False, reader.size, shards.tokens, stats)
        named = NamedFile(path.name, path)
        write_report(building, [named], [counts], tokenizer, text_field, lambda: progress(reader.size, reader.size))


class TokenCounter:
    """A sink that only counts tokens."""

    def __init__(self) -> None:
        self.tokens = 0

    def add(self, documents: Sequence[Ids], stats: ParseStats) -> None:
        """Count the documents' tokens, BOS and EOS included."""
        del stats
        self.tokens += sum(len(ids) + 2 for ids in documents)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``python -m trainyard.worker.data.corpus check PATH...``. Exit code 1: a job would refuse it; 2: usage."""
    parser = argparse.ArgumentParser(prog="trainyard corpus", description="Corpora for pretraining.")
    command = parser.add_subparsers(dest="command", required=True, metavar="check")
    checking = command.add_parser("check", help="read a corpus as a job would, and name its bad lines")
    checking.add_argument("paths", nargs="+", metavar="PATH", help="file, directory or glob, as in data_path")
    checking.add_argument("--text-field", "--text_field", default="text", metavar="KEY", help="key of the text")
    checking.add_argument("--tokenizer", "--tokenizer_path", default="byte", metavar="DIR", help='or "byte"')
    checking.add_argument("--max-bad-lines", "--max_bad_lines", type=_fraction, default=0.01, metavar="SHARE")
    checking.add_argument(
        "--special-tokens", "--special_tokens", choices=["text", "tokens"], default="text", help="as in the job spec"
    )
    checking.add_argument("--json", action="store_true", help="one JSON document")
    options = parser.parse_args(arguments)
    try:
        tokenizer = load_tokenizer(options.tokenizer, options.special_tokens)
        check = check_corpus_json if options.json else check_corpus
        return check(expand(options.paths), tokenizer, options.text_field, options.max_bad_lines)
    except (DataInvalid, CorpusFilesInvalid, TokenizerInvalid, OSError) as error:
        print(f"trainyard corpus: {error}", file=sys.stderr)
        return 1
    return 0


@dataclass
class CheckedFiles:
    """Counts of checked files. ``unreadable``: why a file cannot be read, for each such file."""

    stats: ParseStats = field(default_factory=ParseStats)
    tokens: int = 0
    unreadable: list[str] = field(default_factory=list)

    def require_usable(self, label: str, text_field: str, max_bad_lines: float) -> None:
        """Raise DataInvalid if a job would refuse the corpus."""
        if self.unreadable:
            raise DataInvalid("; ".join(self.unreadable[:MAX_BAD_LINE_EXAMPLES]))
        require_usable(label, self.stats, text_field, max_bad_lines)


def check_files(
    files: Sequence[NamedFile],
    tokenizer: Tokenizer,
    text_field: str,
    emit: Callable[[NamedFile, str], None],
    done: Callable[[NamedFile, ParseStats, int, str | None], None],
) -> CheckedFiles:
    """Read ``files`` as a job would, and return the counts of all.

    ``emit`` gets each bad line, ``done`` each file with its counts, its tokens and why it cannot be read. The check
    continues after a file that cannot be read.
    """
    total = CheckedFiles()
    for file in files:
        grouper, counter, stats, why_not = BadLineGrouper(partial(emit, file)), TokenCounter(), ParseStats(), None
        try:
            with open_reader(file.path) as reader:
                reader.stats = VerboseParseStats(grouper=grouper)
                stats = tokenize_file(
                    reader, tokenizer, text_field, counter, no_progress, VerboseParseStats(grouper=grouper)
                )
        except (DataInvalid, OSError) as error:
            why_not = str(error)
            total.unreadable.append(why_not)
        grouper.end()
        total.stats.add(stats)
        total.tokens += counter.tokens
        done(file, stats, counter.tokens, why_not)
    return total


def check_corpus_json(files: Sequence[NamedFile], tokenizer: Tokenizer, text_field: str, max_bad_lines: float) -> int:
    """Print the result of the check as one JSON document; return the exit code. Several files are listed in it."""
    listed: list[dict[str, Any]] = []

    def add(file: NamedFile, stats: ParseStats, tokens: int, why_not: str | None) -> None:
        listed.append({"path": str(file.path), "why_not": why_not, "tokens": tokens, **_counts(stats)})

    total = check_files(files, tokenizer, text_field, lambda *_: None, add)
    why_not = None
    try:
        total.require_usable(files_label(files), text_field, max_bad_lines)
    except DataInvalid as error:
        why_not = str(error)
    path = str(files[0].path) if len(files) == 1 else None
    result = {"path": path, "usable": why_not is None, "why_not": why_not, "tokens": total.tokens}
    result |= {"warning": read_as_text_warning(tokenizer, total.stats), **_counts(total.stats)}
    print(json.dumps({**result, "files": listed} if len(files) > 1 else result))
    return 0 if why_not is None else 1


def _counts(stats: ParseStats) -> dict[str, Any]:
    counts = asdict(stats)
    named = [{"line": line, "why": reason} for line, reason in counts.pop("examples")]
    return {**counts, "named": named}


def files_label(files: Sequence[NamedFile]) -> str:
    """Return what messages call the corpus: the path of its file, or its first file and how many there are."""
    first = shown(files[0].path)
    return first if len(files) == 1 else f"the corpus of {len(files):,} files from {first}"


def _fraction(text: str) -> float:
    try:
        share = float(text)
    except ValueError:
        share = -1.0
    if not 0 <= share <= 1:
        raise argparse.ArgumentTypeError("must be a number from 0 to 1")
    return share


def read_as_text_warning(tokenizer: Tokenizer, stats: ParseStats) -> str | None:
    """Return a warning if many texts hold special tokens that the tokenizer reads as text, else None."""
    if tokenizer.matching == "tokens":
        return None
    return special_tokens_warning(stats.special_texts, stats.documents, stats.special_tokens)


def check_corpus(files: Sequence[NamedFile], tokenizer: Tokenizer, text_field: str, max_bad_lines: float) -> int:
    """Print every bad line, the counts of each file and those of all; store nothing. Return the exit code.

    Raises DataInvalid if a job would refuse the corpus.
    """
    several = len(files) > 1

    def emit(file: NamedFile, text: str) -> None:
        print(f"{shown(file.path)}: {text}" if several else text)

    def done(file: NamedFile, stats: ParseStats, tokens: int, why_not: str | None) -> None:
        if why_not is None:
            _print_counts(shown(file.path), stats, tokens)
        elif several:
            print(why_not)

    total = check_files(files, tokenizer, text_field, emit, done)
    if several:
        _print_counts(f"total of {len(files):,} files", total.stats, total.tokens)
    if warning := read_as_text_warning(tokenizer, total.stats):
        print(f"warning: {warning}")
    total.require_usable(files_label(files), text_field, max_bad_lines)
    return 0


def _print_counts(label: str, stats: ParseStats, tokens: int) -> None:
    print(
        f"{label}: {counted(stats.documents, 'document')}, {counted(tokens, 'token')}, {counted(stats.lines, 'line')}"
    )
    for count, kind in ((stats.blank_lines, "blank"), (stats.bad_lines, "bad")):
        if count:
            print(counted(count, f"{kind} line"))
    if stats.special_tokens:
        print(f"{counted(stats.special_tokens, 'special token')} in {counted(stats.special_texts, 'text')}")


if __name__ == "__main__":
    sys.exit(run_command("trainyard corpus", main))
