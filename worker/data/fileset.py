"""Tokenize the files of a corpus into one corpus of the cache: in parallel, and each file once.

The corpus has the files of `worker.data.corpus` and ``files.json``: the counts of each file, in order. The files are
cut into parts of up to ``PART_BYTES``; a part is some files, or a piece of a larger one. Processes tokenize the parts;
this one appends them in order. A file that a corpus of the cache already has is copied from there. A killed build
continues after the last appended part, and a part that was being made continues after its last journal entry. No file
stays open, however many there are.
"""

import hashlib
import json
import os
import queue
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Self, TypeVar

import numpy as np
import numpy.typing as npt

from trainyard.contract.allowed_paths import OutsideRoots
from trainyard.contract.cache import CorpusCache
from trainyard.contract.corpus_files import NamedFile, file_sketch, shown
from trainyard.contract.corpus_report import REPORT, SourceReport
from trainyard.contract.failpoints import failpoint
from trainyard.contract.file_identity import Compression, compression_of, is_plain_text
from trainyard.contract.rundir import read_json, write_json
from trainyard.worker.data.corpus import (
    RECENT_CHANGE_SECONDS,
    Corpus,
    CorpusMeta,
    cache_key,
    content_digest,
    files_label,
    open_built,
    open_corpus,
    require_usable,
)
from trainyard.worker.data.file import Piece, open_regular
from trainyard.worker.data.file_counts import FILES, FileCounts, FileKey, read_counts, write_counts
from trainyard.worker.data.jsonl import MAX_BAD_LINE_EXAMPLES, DataInvalid, ParseStats, require_unchanged
from trainyard.worker.data.part import PROGRESS_SECONDS, PartFiles, tokenize_part
from trainyard.worker.data.readers import detect_plain_text, find_document_end
from trainyard.worker.data.report import name_files, write_report
from trainyard.worker.data.shards import (
    JOURNAL,
    JOURNAL_SECONDS,
    OFFSETS,
    TOKENS,
    ArrayFiles,
    build_directory,
    memmap_array,
)
from trainyard.worker.data.tokenization import ProgressCallback, no_progress, token_bytes
from trainyard.worker.data.tokenizers import Tokenizer

PART_BYTES, MIN_PART_BYTES = 16 << 20, 1 << 19
"""Files are tokenized together up to these sizes: large enough to pay for starting a part, small enough to repeat. Of
what is left, a part is at most 1 / PARTS_PER_PROCESS of the share of each process. So the last parts are small, and no
process waits long for another one."""

PARTS_PER_PROCESS = 3

COPY_TOKENS = 1 << 22
HASH_BYTES = 1 << 22
Result = TypeVar("Result")


@dataclass(frozen=True)
class FileSetOptions:
    """How files are tokenized. ``tokenizer_path``, ``special_tokens``: those of ``tokenizer``, for other processes.

    ``processes``: None for one per core. ``roots``: the directories below which the files must be, if any are given.
    """

    tokenizer: Tokenizer
    tokenizer_path: str
    cache: Path
    text_field: str = "text"
    max_bad_lines: float = 0.01
    special_tokens: str = "text"
    processes: int | None = None
    progress: ProgressCallback = no_progress
    roots: tuple[Path, ...] = ()


def open_files(files: Sequence[NamedFile], options: FileSetOptions) -> Corpus:
    """Return the token shards of ``files``, in this order, built first if they are not in the cache.

    Raises the errors of `worker.data.corpus.open_corpus`, and TokenizerProcessEnded. The messages name the file.
    """
    corpus = _open_file(files[0], options) if len(files) == 1 else _open_several(files, options)
    _update_names(corpus, files)
    return corpus


def _open_file(file: NamedFile, options: FileSetOptions) -> Corpus:
    return open_corpus(
        file.path,
        options.tokenizer,
        cache=options.cache,
        text_field=options.text_field,
        max_bad_lines=options.max_bad_lines,
        progress=options.progress,
        roots=options.roots,
    )


def _open_several(files: Sequence[NamedFile], options: FileSetOptions) -> Corpus:
    options.cache.mkdir(parents=True, exist_ok=True)
    keys = identify_files(files, options)
    content = hashlib.sha256(json.dumps([[key.content, key.plain] for key in keys]).encode()).hexdigest()
    key = cache_key(f"files {content}", options.tokenizer, options.text_field, plain=False)
    corpus = open_built(
        options.cache,
        key,
        lambda: options.progress(0, 0),
        lambda directory: FileSetBuild(files, keys, content, directory, options).run(),
    )
    corpus.stats = _named_stats(files, corpus)
    corpus.sketches = [key.sketch for key in keys]
    require_usable(files_label(files), corpus.stats, options.text_field, options.max_bad_lines)
    return corpus


def describe(corpus: Corpus, files: Sequence[NamedFile], options: FileSetOptions) -> SourceReport:
    """Return the report of a corpus made of ``files``. If an older release made the corpus, make its report first."""
    report = _update_names(corpus, files)
    if report is None:
        counts = _counts_of(corpus.directory)
        with corpus.lock():
            waiting = partial(options.progress, 0, corpus.meta.bytes)
            report = write_report(corpus.directory, files, counts, options.tokenizer, options.text_field, waiting)
    return report


def _update_names(corpus: Corpus, files: Sequence[NamedFile]) -> SourceReport | None:
    """Name ``files`` in the stored report, if there is one, and return it."""
    report = SourceReport.read(corpus.directory)
    if report is None:
        return None
    named = name_files(report, files, _counts_of(corpus.directory))
    if named != report:
        write_json(corpus.directory / REPORT, named.model_dump(mode="json"))
    return named


def file_counts(corpus: Corpus) -> list[FileCounts] | None:
    """Return the counts of each file of a corpus, or None if it was made of one file."""
    return read_counts(corpus.directory / FILES)


def _named_stats(files: Sequence[NamedFile], corpus: Corpus) -> ParseStats:
    """Return the counts of the corpus; the first bad lines also name their files, which the cache does not know."""
    stats = corpus.meta.stats
    if stats.bad_lines:
        counts = file_counts(corpus) or []
        stats.examples = [
            (line, f"{reason} (in {shown(Path(file.name))})")
            for file, entry in zip(files, counts, strict=True)
            for line, reason in entry.stats.examples
        ][:MAX_BAD_LINE_EXAMPLES]
    return stats


def identify_files(files: Sequence[NamedFile], options: FileSetOptions) -> list[FileKey]:
    """Return the keys of ``files``. If no file has changed since the last time, only their times are read."""
    identities = [_stat_identity(file) for file in files]
    # The name decides whether a file is plain text, and a link may give the same file another name.
    named = [[*identity, is_plain_text(file.path.name, b"")] for identity, file in zip(identities, files, strict=True)]
    name = hashlib.sha256(json.dumps(named).encode()).hexdigest()[:32]
    stored = options.cache / f"content-{name}.json"
    known = read_json(stored)
    if known is not None and len(known.get("files", ())) == len(files):
        return [FileKey(str(content), bool(plain), str(sketch)) for content, plain, sketch in known["files"]]
    total = sum(identity[2] for identity in identities)
    stopped = threading.Event()

    def require_running(*_: int) -> None:
        if stopped.is_set():
            raise InterruptedError

    def identify(file: NamedFile) -> FileKey:
        with open_regular(file.path, options.roots) as opened:
            content = content_digest(file.path, options.cache, require_running, opened)
            plain = detect_plain_text(file.path, opened)
        return FileKey(content, plain, file_sketch(file.path, options.roots))

    with ThreadPoolExecutor(min(8, _cores())) as pool:
        futures = [pool.submit(identify, file) for file in files]
        try:
            keys = [_wait(future, lambda: options.progress(0, total)) for future in futures]
        except BaseException:
            stopped.set()
            pool.shutdown(cancel_futures=True)
            raise
    # A file that was changed a moment ago may be changed again within the same clock tick.
    if all(time.time() - identity[4] / 1e9 > RECENT_CHANGE_SECONDS for identity in identities):
        write_json(
            stored,
            {"files": [[key.content, key.plain, key.sketch] for key in keys], "path": str(files[0].path)},
            indent=None,
        )
    return keys


def _stat_identity(file: NamedFile) -> list[int]:
    status = _stat(file)
    return [status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns]


def _size(file: NamedFile) -> int:
    return _stat(file).st_size


def _stat(file: NamedFile) -> os.stat_result:
    try:
        return file.path.stat()
    except OSError as error:
        raise DataInvalid(f"{shown(file.path)} cannot be read: {error.strerror}") from error


def _wait(future: Future[Result], waiting: Callable[[], None]) -> Result:
    """Return the result of ``future``; call ``waiting``, which may raise, while there is none."""
    while True:
        with suppress(TimeoutError):
            return future.result(timeout=PROGRESS_SECONDS)
        if future.done():
            return future.result()
        waiting()


def _cores() -> int:
    return len(os.sched_getaffinity(0))


@dataclass(frozen=True)
class _Part:
    """Consecutive files that one process tokenizes, or that are copied from ``source``, from its file ``first``.

    ``start``: the index of the first file. ``piece``: only this piece of the only file.
    """

    start: int
    files: tuple[NamedFile, ...]
    keys: tuple[FileKey, ...]
    bytes: int
    source: Path | None = None
    first: int = 0
    piece: Piece | None = None

    @property
    def starts_file(self) -> bool:
        """Whether its first file is not begun by an earlier part."""
        return self.piece is None or self.piece.start == 0

    def directory(self, building: Path) -> Path:
        # With the index of its first file: another part may have the same files.
        names = [
            self.start,
            [[key.content, key.plain] for key in self.keys],
            self.piece and [*vars(self.piece).values()],
        ]
        return building / f".part-{hashlib.sha256(json.dumps(names).encode()).hexdigest()[:16]}"


class FileSetBuild:
    """One build of a file set, in the directory whose lock the caller holds."""

    def __init__(
        self,
        files: Sequence[NamedFile],
        keys: Sequence[FileKey],
        content: str,
        directory: Path,
        options: FileSetOptions,
    ) -> None:
        self._files, self._keys, self._content = files, keys, content
        self._directory, self._options = directory, options
        self._token_bytes = token_bytes(options.tokenizer)
        self._dtype: type[np.generic] = np.uint16 if self._token_bytes == 2 else np.uint32
        self._counts: list[FileCounts] = []
        self._finished: list[Path] = []
        self._journaled_at = time.monotonic()
        self._done_bytes = 0
        self._sizes = [_size(file) for file in files]
        self._total_bytes = sum(self._sizes)
        self._pieces: dict[int, list[Piece]] = {}
        self._hashed, self._digests = -1, dict[Piece, str]()

    def run(self) -> None:
        with ExitStack() as stack:
            building = stack.enter_context(build_directory(self._directory, resumable=True))
            self._counts, sizes = _read_journal(building, self._token_bytes)
            self._done_bytes = sum(entry.bytes for entry in self._counts)
            arrays = ArrayFiles(building, (TOKENS, OFFSETS), sizes)
            stack.callback(arrays.close)
            if sizes is None:
                arrays.append(np.zeros(0, self._dtype), np.zeros(1, np.int64))
            parts = self._parts(stack)
            for part in parts:
                if part.piece is not None:
                    self._pieces.setdefault(part.start, []).append(part.piece)
            try:
                for part, counts in self.tokenized_parts(parts, building):
                    self.append(arrays, part, counts, building)
            except BaseException:
                with suppress(OSError):
                    self._write_journal(arrays, building)
                raise
            arrays.flush()
            self._remove_parts(building)
            self._write_meta(building)
            options = self._options
            waiting, threads = lambda: self._report(0), self._processes()
            write_report(building, self._files, self._counts, options.tokenizer, options.text_field, waiting, threads)

    def _parts(self, stack: ExitStack) -> list[_Part]:
        """Cut what is left: runs of cached files of one corpus, runs of other files, and pieces of large ones."""
        cached = _CachedFiles(self._options, stack)
        start, done = len(self._counts), 0
        if start and self._counts[-1].bytes < self._sizes[start - 1]:
            start, done = start - 1, self._counts[-1].bytes
        numbers = range(start, len(self._files))
        # A file that has been begun is continued, also if the cache has it by now.
        found = [None if number == start and done else cached.find(self._keys[number]) for number in numbers]
        left = sum(self._sizes[number] for number, place in zip(numbers, found, strict=True) if place is None) - done
        parts = _PartList(self._processes(), self._options.roots)
        for number, place in zip(numbers, found, strict=True):
            parts.add(number, self._files[number], self._keys[number], Piece(done, self._sizes[number]), place, left)
            left -= 0 if place else self._sizes[number] - done
            done = 0
        return parts.finish()

    def _processes(self) -> int:
        return self._options.processes or _cores()

    def tokenized_parts(self, parts: Sequence[_Part], building: Path) -> Iterator[tuple[_Part, list[FileCounts]]]:
        """Yield each part in order, once its directory is complete."""
        fresh = [part for part in parts if part.source is None]
        processes = min(len(fresh), self._processes())
        if processes <= 1:
            for part in parts:
                yield part, self._cached_counts(part) if part.source else self.tokenize_here(part, building)
            return
        with TokenizerProcesses(self._options, processes) as workers:
            # A file that cannot be cut may be as long as all others together.
            longest_first = sorted(fresh, key=lambda part: -part.bytes if part.bytes > 2 * PART_BYTES else 0)
            jobs = {id(part): workers.submit(part, building) for part in longest_first}
            for part in parts:
                if part.source is not None:
                    yield part, self._cached_counts(part)
                else:
                    counts = _wait(jobs.pop(id(part)), lambda: self._report(workers.bytes_done))
                    workers.bytes_done -= part.bytes
                    yield part, counts

    def tokenize_here(self, part: _Part, building: Path) -> list[FileCounts]:
        return tokenize_part(
            part.directory(building), _part_files(part, self._options), self._options.tokenizer, self._report
        )

    def _report(self, done: int) -> None:
        # Never 0, which means that nothing was begun.
        self._options.progress(max(1, self._done_bytes + done), self._total_bytes)

    def _cached_counts(self, part: _Part) -> list[FileCounts]:
        assert part.source is not None
        counts = _counts_of(part.source)[part.first : part.first + len(part.files)]
        return [replace(entry, plain=key.plain) for entry, key in zip(counts, part.keys, strict=True)]

    @failpoint("fileset.append")
    def append(self, arrays: ArrayFiles, part: _Part, counts: list[FileCounts], building: Path) -> None:
        """Append the tokens of a part to the corpus, and journal now and then."""
        if part.piece is not None and counts[0].content != self._digest_of(part):
            require_unchanged(part.files[0].path)
        source = part.source or part.directory(building)
        skipped = _counts_of(part.source)[: part.first] if part.source is not None else []
        _append_documents(arrays, source, skipped, counts, self._dtype, sum(entry.tokens for entry in self._counts))
        if part.piece is not None:
            counts = [replace(counts[0], content=part.keys[0].content)]
        if not part.starts_file:
            counts = [self._counts.pop().followed_by(counts[0])]
        self._counts += counts
        self._done_bytes += part.bytes
        if part.source is None:
            self._finished.append(source)
        self._report(0)
        if time.monotonic() - self._journaled_at >= JOURNAL_SECONDS:
            self._write_journal(arrays, building)

    def _digest_of(self, part: _Part) -> str:
        """Return the sha256 of a piece, as it was in the file that has the digest of its key."""
        assert part.piece is not None
        if self._hashed != part.start:
            self._hashed, self._digests = (
                part.start,
                hash_pieces(
                    part.files[0], part.keys[0], self._pieces[part.start], self._options.roots, lambda: self._report(0)
                ),
            )
        return self._digests[part.piece]

    def _write_journal(self, arrays: ArrayFiles, building: Path) -> None:
        # Data first, then the entry, then the parts that it makes unnecessary.
        arrays.flush()
        write_counts(building / JOURNAL, self._counts)
        for directory in self._finished:
            shutil.rmtree(directory, ignore_errors=True)
        self._finished = []
        self._journaled_at = time.monotonic()

    def _remove_parts(self, building: Path) -> None:
        for directory in building.glob(".part-*"):
            shutil.rmtree(directory)

    def _write_meta(self, building: Path) -> None:
        write_counts(building / FILES, self._counts)
        total = ParseStats()
        for entry in self._counts:
            total.add(entry.stats)
        options = self._options
        meta = CorpusMeta.of(
            total,
            content=self._content,
            size=sum(entry.bytes for entry in self._counts),
            tokens=sum(entry.tokens for entry in self._counts),
            tokenizer=options.tokenizer,
            text_field=options.text_field,
        )
        write_json(building / "meta.json", asdict(meta))


class _PartList:
    """Cuts files into parts: consecutive cached files of one corpus, others of some bytes together, pieces of one."""

    def __init__(self, processes: int, roots: Sequence[Path]) -> None:
        self._processes, self._roots = processes, roots
        self._parts: list[_Part] = []
        self._files: list[NamedFile] = []
        self._keys: list[FileKey] = []
        self._start = self._bytes = self._limit = 0
        self._found: tuple[Path, int] | None = None

    def add(
        self, index: int, file: NamedFile, key: FileKey, rest: Piece, found: tuple[Path, int] | None, left: int
    ) -> None:
        """Add the next file.

        ``rest``: what is to be done of it. ``found``: the corpus of the cache that has it, and its number there.
        ``left``: the bytes that are to be tokenized, from here on.
        """
        limit = self._part_bytes(left)
        if found is None and (rest.start or (rest.bytes > limit and self._processes > 1)):
            pieces = self._cut(file, key, rest, left)
            if rest.start or len(pieces) > 1:
                self._end_part()
                self._parts += [_Part(index, (file,), (key,), piece.bytes, piece=piece) for piece in pieces]
                return
        if not self._continues(rest.bytes, found):
            self._end_part()
            self._start, self._found, self._limit = index, found, limit
        self._files.append(file)
        self._keys.append(key)
        self._bytes += rest.bytes

    def _part_bytes(self, left: int) -> int:
        return min(PART_BYTES, max(MIN_PART_BYTES, left // (PARTS_PER_PROCESS * max(2, self._processes))))

    def _cut(self, file: NamedFile, key: FileKey, rest: Piece, left: int) -> list[Piece]:
        """Cut a file at ends of documents, or leave it whole if it is packed."""
        pieces, start = [], rest.start
        with open_regular(file.path, self._roots) as opened:
            cuttable = compression_of(opened.peek(4)) is Compression.NONE
            while cuttable and self._processes > 1:
                limit = self._part_bytes(left - (start - rest.start))
                end = find_document_end(opened, start + limit, key.plain) if rest.end - start > 1.5 * limit else None
                if end is None or end >= rest.end:
                    break
                pieces.append(Piece(start, end))
                start = end
        return [*pieces, Piece(start, rest.end)]

    def _continues(self, size: int, found: tuple[Path, int] | None) -> bool:
        if not self._files:
            return False
        if found is not None and self._found is not None:
            return found == (self._found[0], self._found[1] + len(self._files))
        return found is None and self._found is None and self._bytes + size <= self._limit

    def _end_part(self) -> None:
        if self._files:
            source, first = self._found or (None, 0)
            self._parts.append(_Part(self._start, tuple(self._files), tuple(self._keys), self._bytes, source, first))
        self._files, self._keys, self._bytes = [], [], 0

    def finish(self) -> list[_Part]:
        self._end_part()
        return self._parts


def hash_pieces(
    file: NamedFile, key: FileKey, pieces: Sequence[Piece], roots: Sequence[Path], on_block: Callable[[], None]
) -> dict[Piece, str]:
    """Return the sha256 of pieces up to the end of a file. Raises DataInvalid if it is not the file of ``key``.

    ``on_block`` is called now and then, and may raise.
    """
    whole, digests = hashlib.sha256(), {}
    with open_regular(file.path, roots) as opened:
        for piece in [Piece(0, pieces[0].start), *pieces]:
            digest, end = hashlib.sha256(), piece.start
            while block := opened.read(min(HASH_BYTES, piece.end - end)):
                whole.update(block)
                digest.update(block)
                end += len(block)
                on_block()
            digests[piece] = digest.hexdigest()
    if whole.hexdigest() != key.content:
        require_unchanged(file.path)
    return digests


def _part_files(part: _Part, options: FileSetOptions) -> PartFiles:
    return PartFiles(part.files, part.keys, options.text_field, part.piece, options.roots)


def _read_journal(building: Path, token_bytes: int) -> tuple[list[FileCounts], tuple[int, int] | None]:
    """Return the appended files and the sizes of the two arrays, or ([], None) if there is no valid journal."""
    try:
        raw = read_json(building / JOURNAL)
        if raw is None:
            return [], None
        counts = [FileCounts.from_json(entry) for entry in raw["files"]]
        documents, tokens = sum(e.stats.documents for e in counts), sum(e.tokens for e in counts)
        sizes = tokens * token_bytes, (documents + 1) * 8
        complete = all(
            (building / name).stat().st_size >= size for name, size in zip((TOKENS, OFFSETS), sizes, strict=True)
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return [], None
    return (counts, sizes) if complete else ([], None)


def _counts_of(directory: Path) -> list[FileCounts]:
    """Return the counts of the files of a corpus in the cache, also if it was made of one file."""
    counts = read_counts(directory / FILES)
    if counts is not None:
        return counts
    meta = CorpusMeta.read(directory / "meta.json")
    return [FileCounts(meta.content, False, meta.bytes, meta.tokens, meta.stats)]


def _append_documents(
    arrays: ArrayFiles,
    source: Path,
    skipped: Sequence[FileCounts],
    counts: Sequence[FileCounts],
    dtype: type[np.generic],
    base: int,
) -> None:
    """Append the documents of ``counts``, which follow ``skipped`` in ``source``, to ``arrays`` of ``base`` tokens."""
    first_document, first_token = sum(e.stats.documents for e in skipped), sum(e.tokens for e in skipped)
    documents, tokens = sum(e.stats.documents for e in counts), sum(e.tokens for e in counts)
    stored_tokens = (source / TOKENS).stat().st_size // np.dtype(dtype).itemsize
    stored_offsets = (source / OFFSETS).stat().st_size // 8
    all_tokens = memmap_array(source / TOKENS, dtype, stored_tokens)
    all_offsets: npt.NDArray[np.int64] = memmap_array(source / OFFSETS, np.int64, stored_offsets)
    none = np.zeros(0, np.int64)
    for start in range(first_token, first_token + tokens, COPY_TOKENS):
        arrays.append(all_tokens[start : min(start + COPY_TOKENS, first_token + tokens)], none)
    ends = all_offsets[first_document + 1 : first_document + documents + 1]
    arrays.append(np.zeros(0, dtype), ends - first_token + base)


class _CachedFiles:
    """The files that corpora of the cache have already, for the same tokenizer and text field.

    A corpus that is used stays locked until ``stack`` is closed, so that it is not removed meanwhile.
    """

    def __init__(self, options: FileSetOptions, stack: ExitStack) -> None:
        self._options, self._stack = options, stack
        self._found: dict[FileKey, tuple[Path, int]] = {}
        self._locked: set[Path] = set()
        for stored in options.cache.glob(f"*/{FILES}"):
            self._add(stored.parent)

    def find(self, key: FileKey) -> tuple[Path, int] | None:
        """Return (directory of a corpus, index of the file in it), or None."""
        found = self._found.get(key)
        if found is None:
            single = self._options.cache / cache_key(
                key.content, self._options.tokenizer, self._options.text_field, plain=key.plain
            )
            found = (single, 0) if (single / "meta.json").exists() else None
        if found is None or not self._lock(found[0]):
            return None
        return found

    def _add(self, directory: Path) -> None:
        try:
            meta, counts = CorpusMeta.read(directory / "meta.json"), _counts_of(directory)
        except (OSError, ValueError, KeyError, TypeError):
            return
        options = self._options
        # The key of the cache has the tokenizer, the special tokens and the text field in it.
        if directory.name != cache_key(f"files {meta.content}", options.tokenizer, options.text_field, plain=False):
            return
        for index, entry in enumerate(counts):
            self._found.setdefault(entry.key, (directory, index))

    def _lock(self, directory: Path) -> bool:
        if directory not in self._locked:
            use = CorpusCache(self._options.cache).use(directory.name, lambda: None)
            self._stack.callback(use.release)
            if not (directory / "meta.json").exists():
                return False
            self._locked.add(directory)
        return True


class TokenizerProcessEnded(Exception):
    """A tokenizing process ended early, for example because the kernel killed it for lack of memory.

    It is no OSError, because an unfinished build is deleted after an OSError. Here the finished part is valid, and the
    next build continues it.
    """

    def __init__(self, status: int, path: Path) -> None:
        how = f"was killed by {signal.Signals(-status).name}" if status < 0 else f"ended with exit code {status}"
        super().__init__(f"a process that tokenizes {shown(path)} {how}")


class TokenizerProcesses:
    """Processes that tokenize parts, each with a share of the cores. ``bytes_done``: of parts not yet appended."""

    def __init__(self, options: FileSetOptions, count: int) -> None:
        self.bytes_done = 0
        self._options = options
        self._free: queue.Queue[subprocess.Popen[str]] = queue.Queue()
        threads = max(1, (options.processes or _cores()) // count)
        environment = {**os.environ, "RAYON_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "true"}
        command = [sys.executable, "-P", "-m", "trainyard.worker.data.part"]
        self.processes = [
            subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
            for _ in range(count)
        ]
        for process in self.processes:
            self._free.put(process)
        self._pool = ThreadPoolExecutor(count)

    def submit(self, part: _Part, building: Path) -> Future[list[FileCounts]]:
        return self._pool.submit(self._run, part, building)

    def _run(self, part: _Part, building: Path) -> list[FileCounts]:
        process = self._free.get()
        try:
            return self._ask(process, part, building)
        finally:
            self._free.put(process)

    def _ask(self, process: subprocess.Popen[str], part: _Part, building: Path) -> list[FileCounts]:
        assert process.stdin is not None
        assert process.stdout is not None
        options = self._options
        request = {
            "directory": str(part.directory(building)),
            "part": _part_files(part, options).to_json(),
            "tokenizer_path": options.tokenizer_path,
            "special_tokens": options.special_tokens,
            "fingerprint": options.tokenizer.fingerprint,
        }
        reported = 0
        with suppress(BrokenPipeError):
            process.stdin.write(json.dumps(request) + "\n")
            process.stdin.flush()
        for line in process.stdout:
            answer = json.loads(line)
            if "files" in answer:
                self.bytes_done += part.bytes - reported
                return [FileCounts.from_json(entry) for entry in answer["files"]]
            if "invalid" in answer:
                raise DataInvalid(answer["invalid"])
            if "outside" in answer:
                raise OutsideRoots(answer["path"], answer["outside"])
            if "failed" in answer:
                raise OSError(answer["errno"], answer["failed"])
            self.bytes_done += answer["done"] - reported
            reported = answer["done"]
        raise TokenizerProcessEnded(process.wait(), part.files[0].path)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            process.kill()
        self._pool.shutdown(cancel_futures=True)
        for process in self.processes:
            assert process.stdin is not None
            # A request that was being written stays in the buffer: its error would hide the one that ends the build.
            with suppress(BrokenPipeError):
                process.stdin.close()
            with process:  # closes its pipes and waits for it
                pass
