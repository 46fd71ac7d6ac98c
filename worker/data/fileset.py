"""Tokenize the files of a corpus into one corpus of the cache: in parallel, and each file once.

The corpus has the files of `worker.data.corpus` and ``files.json``: the counts of each file, in order. The files are
cut into parts of up to ``PART_BYTES``. Processes tokenize the parts; this one appends them in order. A file that a
corpus of the cache already has is copied from there. A killed build continues after the last appended file, and a part
that was being made continues after its last journal entry. No file stays open, however many there are.
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
from typing import Any, Self, TypeVar

import numpy as np
import numpy.typing as npt

from trainyard.contract.allowed_paths import OutsideRoots
from trainyard.contract.cache import CorpusCache
from trainyard.contract.corpus_files import NamedFile, file_sketch, shown
from trainyard.contract.corpus_report import REPORT, SourceReport
from trainyard.contract.failpoints import failpoint
from trainyard.contract.rundir import read_json, write_json
from trainyard.contract.tokenizer_info import TokenizerInvalid
from trainyard.worker.data.corpus import (
    RECENT_CHANGE_SECONDS,
    Corpus,
    CorpusMeta,
    ProgressCallback,
    cache_key,
    content_digest,
    files_label,
    no_progress,
    open_built,
    open_corpus,
    require_usable,
    token_bytes,
    tokenize_file,
)
from trainyard.worker.data.file import PrefixDiffers, ReadPosition, open_regular
from trainyard.worker.data.file_counts import FILES, FileCounts, FileKey, read_counts, write_counts
from trainyard.worker.data.jsonl import MAX_BAD_LINE_EXAMPLES, DataInvalid, ParseStats, require_unchanged
from trainyard.worker.data.readers import detect_plain_text, open_reader
from trainyard.worker.data.report import name_files, write_report
from trainyard.worker.data.shards import (
    JOURNAL,
    JOURNAL_SECONDS,
    OFFSETS,
    TOKENS,
    ArrayFiles,
    ShardWriter,
    build_directory,
    memmap_array,
)
from trainyard.worker.data.tokenizers import Tokenizer

PART_BYTES, MIN_PART_BYTES = 16 << 20, 1 << 20
"""Files are tokenized together up to these sizes: large enough to pay for starting a part, small enough to repeat. A
small corpus is cut into PARTS_PER_PROCESS parts for each process, so that none waits for the last part for long."""

PARTS_PER_PROCESS = 4

PROGRESS_SECONDS = 0.25
COPY_TOKENS = 1 << 22
NOTHING_READ = ReadPosition(0, hashlib.sha256().hexdigest())
Result = TypeVar("Result")
PART = "part.json"


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

    Raises what `worker.data.corpus.open_corpus` raises; the messages name the file.
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
    keys = _identify(files, options)
    content = hashlib.sha256(json.dumps([[key.content, key.plain] for key in keys]).encode()).hexdigest()
    key = cache_key(f"files {content}", options.tokenizer, options.text_field, plain=False)
    corpus = open_built(
        options.cache,
        key,
        lambda: options.progress(0, 0),
        lambda directory: _Build(files, keys, content, directory, options).run(),
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


def _identify(files: Sequence[NamedFile], options: FileSetOptions) -> list[FileKey]:
    """Return the keys of ``files``. If no file has changed since the last time, only their times are read."""
    identities = [_stat_identity(file) for file in files]
    name = hashlib.sha256(json.dumps(identities).encode()).hexdigest()[:32]
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
    """Consecutive files that one process tokenizes, or that are copied from ``source``, from its file ``first``."""

    start: int
    files: tuple[NamedFile, ...]
    keys: tuple[FileKey, ...]
    bytes: int
    source: Path | None = None
    first: int = 0

    def directory(self, building: Path) -> Path:
        names = json.dumps([[key.content, key.plain] for key in self.keys])
        return building / f".part-{hashlib.sha256(names.encode()).hexdigest()[:16]}"


class _Build:
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
        self._total_bytes = sum(_size(file) for file in files)

    def run(self) -> None:
        with ExitStack() as stack:
            building = stack.enter_context(build_directory(self._directory, resumable=True))
            self._counts, sizes = _read_journal(building, self._token_bytes)
            self._done_bytes = sum(entry.bytes for entry in self._counts)
            arrays = ArrayFiles(building, (TOKENS, OFFSETS), sizes)
            stack.callback(arrays.close)
            if sizes is None:
                arrays.append(np.zeros(0, self._dtype), np.zeros(1, np.int64))
            parts = self._parts(len(self._counts), stack)
            try:
                for part, counts in self._tokenized(parts, building):
                    self._append(arrays, part, counts, building)
            except BaseException:
                with suppress(OSError):
                    self._write_journal(arrays, building)
                raise
            arrays.flush()
            self._remove_parts(building)
            self._write_meta(building)
            options = self._options
            write_report(
                building, self._files, self._counts, options.tokenizer, options.text_field, lambda: self._report(0)
            )

    def _parts(self, start: int, stack: ExitStack) -> list[_Part]:
        """Cut the files from ``start`` into parts: runs of cached files of one corpus, and runs of other files."""
        cached = _CachedFiles(self._options, stack)
        parts = _PartList(self._part_bytes())
        for index in range(start, len(self._files)):
            file, key = self._files[index], self._keys[index]
            parts.add(index, file, key, _size(file), cached.find(key))
        return parts.finish()

    def _part_bytes(self) -> int:
        share = self._total_bytes // (PARTS_PER_PROCESS * self._processes())
        return min(PART_BYTES, max(MIN_PART_BYTES, share))

    def _processes(self) -> int:
        return self._options.processes or _cores()

    def _tokenized(self, parts: Sequence[_Part], building: Path) -> Iterator[tuple[_Part, list[FileCounts]]]:
        """Yield each part in order, once its directory is complete."""
        fresh = [part for part in parts if part.source is None]
        processes = min(len(fresh), self._processes())
        if processes <= 1:
            for part in parts:
                yield part, self._cached_counts(part) if part.source else self._tokenize_here(part, building)
            return
        with _TokenizerProcesses(self._options, processes) as workers:
            jobs = {part.start: workers.submit(part, building) for part in fresh}
            for part in parts:
                if part.source is not None:
                    yield part, self._cached_counts(part)
                else:
                    counts = _wait(jobs[part.start], lambda: self._report(workers.bytes_done))
                    workers.bytes_done -= part.bytes
                    yield part, counts

    def _tokenize_here(self, part: _Part, building: Path) -> list[FileCounts]:
        options, directory = self._options, part.directory(building)
        return tokenize_part(
            directory, part.files, part.keys, options.tokenizer, options.text_field, self._report, options.roots
        )

    def _report(self, done: int) -> None:
        # Never 0, which means that nothing was begun.
        self._options.progress(max(1, self._done_bytes + done), self._total_bytes)

    def _cached_counts(self, part: _Part) -> list[FileCounts]:
        assert part.source is not None
        counts = _counts_of(part.source)[part.first : part.first + len(part.files)]
        return [replace(entry, plain=key.plain) for entry, key in zip(counts, part.keys, strict=True)]

    @failpoint("fileset.append")
    def _append(self, arrays: ArrayFiles, part: _Part, counts: list[FileCounts], building: Path) -> None:
        """Append the tokens of a part to the corpus, and journal now and then."""
        source = part.source or part.directory(building)
        skipped = _counts_of(part.source)[: part.first] if part.source is not None else []
        _append_documents(arrays, source, skipped, counts, self._dtype, sum(entry.tokens for entry in self._counts))
        self._counts += counts
        self._done_bytes += part.bytes
        if part.source is None:
            self._finished.append(source)
        self._report(0)
        if time.monotonic() - self._journaled_at >= JOURNAL_SECONDS:
            self._write_journal(arrays, building)

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
    """Cuts files into parts: consecutive cached files of one corpus, or others of up to ``part_bytes`` together."""

    def __init__(self, part_bytes: int) -> None:
        self._part_bytes = part_bytes
        self._parts: list[_Part] = []
        self._files: list[NamedFile] = []
        self._keys: list[FileKey] = []
        self._start = self._bytes = 0
        self._found: tuple[Path, int] | None = None

    def add(self, index: int, file: NamedFile, key: FileKey, size: int, found: tuple[Path, int] | None) -> None:
        """Add the next file. ``found``: the corpus of the cache that has it, and its number there."""
        if not self._continues(size, found):
            self._end_part()
            self._start, self._found = index, found
        self._files.append(file)
        self._keys.append(key)
        self._bytes += size

    def _continues(self, size: int, found: tuple[Path, int] | None) -> bool:
        if not self._files:
            return False
        if found is not None and self._found is not None:
            return found == (self._found[0], self._found[1] + len(self._files))
        return found is None and self._found is None and self._bytes + size <= self._part_bytes

    def _end_part(self) -> None:
        if self._files:
            source, first = self._found or (None, 0)
            self._parts.append(_Part(self._start, tuple(self._files), tuple(self._keys), self._bytes, source, first))
        self._files, self._keys, self._bytes = [], [], 0

    def finish(self) -> list[_Part]:
        self._end_part()
        return self._parts


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


def tokenize_part(
    directory: Path,
    files: Sequence[NamedFile],
    keys: Sequence[FileKey],
    tokenizer: Tokenizer,
    text_field: str,
    progress: Callable[[int], None],
    roots: Sequence[Path] = (),
) -> list[FileCounts]:
    """Tokenize ``files`` into token shards in ``directory``, and return their counts. A complete part is only read."""
    stored = read_counts(directory / PART)
    if stored is not None:
        return stored
    write = partial(_write_part, directory, files, keys, tokenizer, text_field, progress, roots)
    if len(files) > 1:
        shutil.rmtree(directory, ignore_errors=True)  # only a part of one file has a journal
    try:
        return write()
    except PrefixDiffers:
        # The stored part belongs to a file with other bytes.
        shutil.rmtree(directory)
        return write()


def _write_part(
    directory: Path,
    files: Sequence[NamedFile],
    keys: Sequence[FileKey],
    tokenizer: Tokenizer,
    text_field: str,
    progress: Callable[[int], None],
    roots: Sequence[Path],
) -> list[FileCounts]:
    directory.mkdir(parents=True, exist_ok=True)
    counts: list[FileCounts] = []
    with ShardWriter(directory, tokenizer, token_bytes(tokenizer), lambda: NOTHING_READ) as shards:
        done = 0
        for file, key in zip(files, keys, strict=True):
            report = partial(_report_after, progress, done)
            counts.append(_tokenize(file, key, shards, tokenizer, text_field, report, roots))
            done += counts[-1].bytes
    write_counts(directory / PART, counts)
    return counts


def _report_after(progress: Callable[[int], None], before: int, size: int) -> None:
    progress(before + size)


def _tokenize(
    file: NamedFile,
    key: FileKey,
    shards: ShardWriter,
    tokenizer: Tokenizer,
    text_field: str,
    progress: Callable[[int], None],
    roots: Sequence[Path],
) -> FileCounts:
    before = shards.tokens
    with open_regular(file.path, roots) as opened, open_reader(file.path, opened) as reader:
        shards.position = lambda: reader.position
        if (entry := shards.resumed_from) is not None:
            before = 0
            reader.skip(entry.stats, entry.position, lambda: progress(reader.bytes_read))
        stats = tokenize_file(reader, tokenizer, text_field, shards, lambda done, _: progress(done))
        if reader.digest != key.content:
            require_unchanged(file.path)
        return FileCounts(key.content, key.plain, reader.size, shards.tokens - before, stats)


class _TokenizerProcesses:
    """Processes that tokenize parts, each with a share of the cores. ``bytes_done``: of parts not yet appended."""

    def __init__(self, options: FileSetOptions, count: int) -> None:
        self.bytes_done = 0
        self._options = options
        self._free: queue.Queue[subprocess.Popen[str]] = queue.Queue()
        threads = max(1, (options.processes or _cores()) // count)
        environment = {**os.environ, "RAYON_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "true"}
        command = [sys.executable, "-P", "-m", "trainyard.worker.data.fileset"]
        self._processes = [
            subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
            for _ in range(count)
        ]
        for process in self._processes:
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
            "files": [[file.name, str(file.path)] for file in part.files],
            "keys": [asdict(key) for key in part.keys],
            "tokenizer_path": options.tokenizer_path,
            "special_tokens": options.special_tokens,
            "fingerprint": options.tokenizer.fingerprint,
            "text_field": options.text_field,
            "roots": [str(root) for root in options.roots],
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
        raise OSError(f"a tokenizer process ended with exit code {process.wait()} at {shown(part.files[0].path)}")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes:
            process.kill()
        self._pool.shutdown(cancel_futures=True)
        for process in self._processes:
            with process:  # closes its pipes and waits for it
                pass


def main() -> int:
    """Tokenize the part that each line of stdin names; write progress and results to stdout, one JSON object a line."""
    from trainyard.worker.data.tokenizers import load_tokenizer

    # A stop of the whole process tree must not end a part before the process that waits for it has stored its journal.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    tokenizer: Tokenizer | None = None
    for line in sys.stdin:
        request = json.loads(line)
        roots = [Path(root) for root in request["roots"]]
        reported_at = 0.0

        def report(done: int) -> None:
            nonlocal reported_at
            if time.monotonic() - reported_at >= PROGRESS_SECONDS:
                reported_at = time.monotonic()
                print(json.dumps({"done": done}), flush=True)

        files = [NamedFile(name, Path(path)) for name, path in request["files"]]
        keys = [FileKey(**key) for key in request["keys"]]
        try:
            if tokenizer is None:
                tokenizer = load_tokenizer(request["tokenizer_path"], request["special_tokens"], roots)
                if tokenizer.fingerprint != request["fingerprint"]:
                    raise DataInvalid("the tokenizer was changed while the corpus was tokenized: start again")
            counts = tokenize_part(
                Path(request["directory"]), files, keys, tokenizer, request["text_field"], report, roots
            )
            answer: dict[str, Any] = {"files": [entry.to_json() for entry in counts]}
        except (DataInvalid, TokenizerInvalid) as error:
            answer = {"invalid": str(error)}
        except OutsideRoots as error:
            answer = {"outside": error.reason, "path": str(error.filename)}
        except OSError as error:
            answer = {"failed": str(error), "errno": error.errno}
        print(json.dumps(answer), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
