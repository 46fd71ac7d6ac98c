"""Prepare the training data: tokenizer, token shards, packed rows.

A process without devices does it before a run starts (`prepare_corpus`, `worker.prepare`). The run opens the same
(`prepare_data`): rank 0 builds what is missing by then, and the other ranks wait.
"""

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainyard.contract.allowed_paths import OutsideRoots
from trainyard.contract.corpus_files import (
    CorpusFilesInvalid,
    NamedFile,
    corpus_paths,
    expand,
    file_sketch,
    files_fingerprint,
    is_single_file,
    shown,
    stored_fingerprint,
)
from trainyard.contract.events import Event, PhaseChanged, WarningEvent
from trainyard.contract.failpoints import hit
from trainyard.contract.file_identity import FileFingerprint
from trainyard.contract.prepared import CorpusPart, PrepareTask, corpus_parts, mark_prepared
from trainyard.contract.run_identity import RunIdentity
from trainyard.contract.rundir import RunDir
from trainyard.contract.spec import DataSpec, JobSpec
from trainyard.contract.status import Phase, Reason
from trainyard.contract.tokenizer_info import TokenizerInvalid
from trainyard.worker.data.byte_lengths import ByteLengths, BytesUnknown
from trainyard.worker.data.corpus import Corpus, read_as_text_warning
from trainyard.worker.data.fileset import FileSetOptions, TokenizerProcessEnded, open_files
from trainyard.worker.data.jsonl import DataInvalid, ParseStats
from trainyard.worker.data.mixture import MixturePattern, MixtureSampler, load_pattern, row_parts
from trainyard.worker.data.packing import PackedDataset, SplitBy, SplitSpec, documents_within
from trainyard.worker.data.sampler import StepSampler
from trainyard.worker.data.tokenizers import Tokenizer, limit_threads, load_tokenizer
from trainyard.worker.errors import StopRequested, TrainingError, save_error
from trainyard.worker.paths import DATA_ROOTS, data_roots, held_out_field, outside_error

if TYPE_CHECKING:
    # The process that prepares a corpus has no ranks, and does not load torch.
    from trainyard.worker.distributed import DistributedContext

SplitChooser = Callable[[Corpus, Tokenizer], SplitBy]

CORPUS_CACHE_VARIABLE = "TRAINYARD_CORPUS_CACHE"
PROGRESS_SECONDS = 1.0


@dataclass(frozen=True)
class TrainingSource:
    """One source of the corpus: its files, their tokens, and the rows of the training split."""

    name: str
    files: list[NamedFile]
    corpus: Corpus
    rows: PackedDataset
    weight: float | None

    @property
    def tokens_per_row(self) -> float:
        """Mean number of predictions of a row."""
        return self.rows.tokens / len(self.rows)


@dataclass(frozen=True)
class HeldOutSet:
    """A held-out set: the name that its results have, the number of its files, and its rows."""

    name: str
    files: int
    rows: PackedDataset


@dataclass(frozen=True)
class TrainingData:
    """Everything that a run trains on. ``spec`` has its vocabulary size set.

    ``train_set`` has the rows of all sources, one source after the other. ``roots``: the directories below which the
    run may read, see `worker.paths.data_roots`.
    """

    spec: JobSpec
    tokenizer: Tokenizer
    sources: tuple[TrainingSource, ...]
    train_set: PackedDataset
    eval_sets: tuple[HeldOutSet, ...]
    split_by: SplitBy = "text"
    roots: tuple[Path, ...] = ()

    @property
    def documents(self) -> int:
        return sum(source.corpus.meta.documents for source in self.sources)

    @property
    def tokens(self) -> int:
        """Tokens of the corpus, with BOS and EOS of each document."""
        return sum(source.corpus.meta.tokens for source in self.sources)

    @cached_property
    def byte_lengths(self) -> ByteLengths | BytesUnknown:
        """The bytes of text that each token stands for, or why they are unknown."""
        try:
            return self.tokenizer.byte_lengths()
        except BytesUnknown as unknown:
            return unknown

    @cached_property
    def stats(self) -> ParseStats:
        """The counts of the lines of all sources."""
        total = ParseStats()
        for source in self.sources:
            total.add(source.corpus.stats)
        return total

    def sampler(self, global_batch: int, seed: int) -> StepSampler:
        """Return the order of the rows. All ranks may call it at once."""
        if not self.spec.data.is_mixture:
            return StepSampler(len(self.train_set), global_batch, seed)
        sizes = tuple(len(source.rows) for source in self.sources)
        pattern = MixturePattern(load_pattern(self._row_parts, self.sources[0].corpus), len(sizes))
        return MixtureSampler(len(self.train_set), global_batch, seed, sizes, pattern)

    def tokens_per_step(self, sampler: StepSampler) -> float:
        """Return the mean number of predictions of a step."""
        if not self.spec.data.is_mixture:
            return self.train_set.tokens / sampler.steps_per_epoch
        per_row = sum(part * source.tokens_per_row for part, source in zip(self._row_parts, self.sources, strict=True))
        return sampler.global_batch * per_row / sum(self._row_parts)

    @cached_property
    def _row_parts(self) -> list[int]:
        return row_parts([source.weight or 0.0 for source in self.sources], [s.tokens_per_row for s in self.sources])

    @cached_property
    def identity(self) -> RunIdentity:
        """The data and model identity, which a checkpoint must match to be resumed."""
        data = self.spec.data
        return RunIdentity(
            model=asdict(self.spec.model),
            tokenizer=self.tokenizer.fingerprint,
            corpus=_sources_fingerprint(self),
            seed=self.spec.training.seed,
            max_seq_len=data.max_seq_len,
            packing=data.packing,
            corpus_file=self._corpus_file(),
            vocabulary=self.tokenizer.vocab_size,
        )

    @property
    def is_one_file(self) -> bool:
        """Whether the corpus was given as one file."""
        # As in release 0.1, whose runs must be resumable. A directory with one file does not count: it may get another.
        return self.spec.data.sources is None and is_single_file(paths_of(self.spec))

    def _corpus_file(self) -> dict[str, Any]:
        """Return the fingerprint of the corpus as it is now, or {} if the corpus has changed or has too many files."""
        try:
            if self.is_one_file:
                fingerprint = FileFingerprint.of(Path(str(paths_of(self.spec))), self.roots)
                return asdict(fingerprint) if fingerprint.bytes == self.sources[0].corpus.meta.bytes else {}
            named = [(source, file) for source in self.sources for file in source.files]
            names = [f"{source.name}/{file.name}" for source, file in named]
            sizes = [file.path.stat().st_size for _, file in named]
            sketches = [sketch for source in self.sources for sketch in _sketches(source, self.roots)]
            return stored_fingerprint(files_fingerprint(names, sizes, sketches))
        except OSError:
            return {}


def _sketches(source: TrainingSource, roots: Sequence[Path]) -> list[str]:
    return source.corpus.sketches or [file_sketch(file.path, roots) for file in source.files]


def paths_of(spec: JobSpec) -> str | list[str]:
    """Return ``data_path``, of a spec without ``sources``."""
    assert spec.data.data_path is not None
    return spec.data.data_path


def _sources_fingerprint(data: TrainingData) -> str:
    corpora = [source.corpus for source in data.sources]
    if data.is_one_file:
        return _file_fingerprint(data.spec.data, corpora[0], data.tokenizer, data.split_by)
    content = [
        [source.name, source.weight, corpus.meta.content, corpus.meta.text_field, *(file.name for file in source.files)]
        for source, corpus in zip(data.sources, corpora, strict=True)
    ]
    return _fingerprint(content, data.spec.data, corpora, data.tokenizer, data.split_by)


def _file_fingerprint(data: DataSpec, corpus: Corpus, tokenizer: Tokenizer, split_by: SplitBy) -> str:
    content = [corpus.meta.content, corpus.meta.text_field]
    return _fingerprint(content, data, [corpus], tokenizer, split_by)


def _fingerprint(
    content: list[Any], data: DataSpec, corpora: Sequence[Corpus], tokenizer: Tokenizer, split_by: SplitBy
) -> str:
    # Fields with the default of release 0.1 are left out, so that its runs can be resumed.
    parts = [*content, data.eval_fraction]
    if data.special_tokens == "tokens" or any(corpus.meta.added_tokens for corpus in corpora):
        parts.append({"special_tokens": tokenizer.matching})
    if data.eval_fraction > 0 and split_by != "number":
        parts.append({"split_by": split_by})
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def prepare_data(
    spec: JobSpec,
    run: RunDir,
    ranks: "DistributedContext",
    emit: Callable[[Event], None],
    stop_requested: Callable[[], bool],
    saved_corpora: Callable[[], Iterable[str]] = tuple,
) -> TrainingData:
    """Open the data, built first if it is not in the cache. Raises TrainingError or StopRequested on every rank.

    Every rank gets the same data. ``saved_corpora``: corpus fingerprints of the checkpoints that the run may start
    from, the first choice first. Their evaluation split is kept, also if release 0.1 made it.
    """

    def choose_split(corpus: Corpus, tokenizer: Tokenizer) -> SplitBy:
        splits: tuple[SplitBy, ...] = ("number", "text")
        known = {_file_fingerprint(spec.data, corpus, tokenizer, by): by for by in splits}
        return next((known[saved] for saved in saved_corpora() if saved in known), "text")

    progress = _ProgressReporter(emit, stop_requested)

    def build() -> SplitBy:
        with _marked(spec.data, _cache(run)) as mark:
            data = _open_or_fail(spec, run, progress, choose_split)
            mark(data)
        return data.split_by

    split_by = ranks.broadcast_from_rank0(build)
    # Everything is built now. A rank that stopped here would stop alone, so stop requests are ignored.
    data = _open_or_fail(spec, run, _ProgressReporter(emit, lambda: False), lambda *_: split_by)
    _require_same_data(data, ranks)
    _report_corpus(data, emit)
    return data


def _require_same_data(data: TrainingData, ranks: "DistributedContext") -> None:
    """Raise TrainingError on every rank if the ranks have opened different files.

    A file may be added or changed while the ranks open the corpus, and another node may see a directory as it was a
    minute ago. The ranks would train on different data.
    """
    opened = (data.tokenizer.fingerprint, _shards(data))
    if any(other != opened for other in ranks.gather_objects(opened)):
        message = f"{data.spec.data.corpus_name} or its tokenizer changed while the ranks opened it"
        hint = "Wait until it is complete, on every node, then start again."
        raise TrainingError(Reason.DATA_INVALID, message, hint)


def prepare_corpus(
    spec: JobSpec, run: RunDir, task: PrepareTask, emit: Callable[[Event], None], stop_requested: Callable[[], bool]
) -> TrainingData:
    """Build the data that a run of ``spec`` opens, without any device. Raises TrainingError or StopRequested."""
    data = _open_or_fail(spec, run, _ProgressReporter(emit, stop_requested), lambda *_: "text", task.processes)
    try:
        mark_prepared(_cache(run), task.parts, _shards(data))
    except OSError as error:
        raise save_error(error, "the corpus cache") from error
    _report_corpus(data, emit)
    return data


def _cache(run: RunDir) -> Path:
    return Path(os.environ.get(CORPUS_CACHE_VARIABLE) or run.corpus_cache)


def _shards(data: TrainingData) -> dict[tuple[str, bool], str]:
    """Return the key of the token shards of each source and held-out set: (name, held out) -> key."""
    shards = {(source.name, False): source.corpus.directory.name for source in data.sources}
    own_files = {source.name for source in data.spec.data.held_out_sources}
    held_out = [(each.name, each.rows.parts[0]) for each in data.eval_sets if each.name in own_files]
    return shards | {(name, True): part.corpus.directory.name for name, part in held_out}


@contextlib.contextmanager
def _marked(data: DataSpec, cache: Path) -> Iterator[Callable[[TrainingData], None]]:
    """Yield a function that marks a corpus that was opened in the block. The marker is a hint: it raises nothing."""
    parts: tuple[CorpusPart, ...] = ()
    with contextlib.suppress(OSError, ValueError):
        parts = corpus_parts(data)  # before the files are read: they may change meanwhile

    def mark(opened: TrainingData) -> None:
        with contextlib.suppress(OSError):
            mark_prepared(cache, parts, _shards(opened))

    yield mark


class _ProgressReporter:
    """Reports the bytes that are done of all corpora of a run, at most once a second.

    Without progress it reports nothing, so that a hang is found. But while nothing of a corpus is done its files are
    hashed, or another process builds it: then the current state is reported again and again.
    """

    def __init__(self, emit: Callable[[Event], None], stop_requested: Callable[[], bool]) -> None:
        self._emit = emit
        self._stop_requested = stop_requested
        self._emitted_at = time.monotonic()
        self._total = self._before = self._last = 0

    def expect(self, total: int) -> None:
        """Set the number of bytes of all corpora."""
        self._total = total

    def finish(self, size: int) -> None:
        """Count a corpus of ``size`` bytes as done."""
        self._before, self._last = self._before + size, 0

    def __call__(self, done: int, _total: int) -> None:
        if self._stop_requested():
            raise StopRequested
        if time.monotonic() - self._emitted_at >= PROGRESS_SECONDS and (done == 0 or done != self._last):
            self._emitted_at, self._last = time.monotonic(), done
            total = max(self._total, self._before + done)
            self._emit(PhaseChanged(phase=Phase.PREPARING_DATA, done=self._before + done, total=total))


def _open_or_fail(
    spec: JobSpec,
    run: RunDir,
    progress: _ProgressReporter,
    choose_split: SplitChooser,
    processes: int | None = None,
) -> TrainingData:
    try:
        return _open(spec, run, progress, choose_split, processes)
    except (DataInvalid, CorpusFilesInvalid) as error:
        raise TrainingError(
            Reason.DATA_INVALID, str(error), "`trainyard corpus check FILE` lists every bad line."
        ) from error
    except TokenizerInvalid as error:
        raise TrainingError(Reason.SPEC_INVALID, f"data.tokenizer_path: {error}") from error
    except TokenizerProcessEnded as error:
        hint = "The finished part is kept. If the host has too little memory, submit it with fewer data.num_workers."
        raise TrainingError(Reason.WORKER_CRASHED, str(error), hint) from error
    except OSError as error:
        raise save_error(error, "the corpus's token shards") from error


def _open(
    spec: JobSpec, run: RunDir, progress: _ProgressReporter, choose_split: SplitChooser, processes: int | None
) -> TrainingData:
    hit("prepare.open")
    data = spec.data
    processes = processes if data.num_workers is None else max(1, data.num_workers)
    limit_threads(processes)
    roots = data_roots(run)
    try:
        tokenizer = load_tokenizer(data.tokenizer_path, data.special_tokens, roots)
    except OutsideRoots as error:
        raise outside_error("data.tokenizer_path", error.reason, DATA_ROOTS) from error
    spec = _with_vocabulary(spec, tokenizer)
    cache = _cache(run)
    files_of = {name: expand(path) for name, path in corpus_paths(data)}
    progress.expect(sum(_size(files) for files in files_of.values()))

    def open_shards(pointer: str, files: list[NamedFile], text_field: str | None) -> Corpus:
        options = FileSetOptions(
            tokenizer,
            data.tokenizer_path,
            cache,
            text_field=text_field or data.text_field,
            max_bad_lines=data.max_bad_lines,
            special_tokens=data.special_tokens,
            processes=processes,
            progress=progress,
            roots=roots,
        )
        try:
            corpus = open_files(files, options)
            progress.finish(_size(files))
            return corpus
        except OutsideRoots as error:
            which = pointer if len(files) == 1 else f"{pointer}: {shown(str(error.filename))}"
            raise outside_error(which, error.reason, DATA_ROOTS) from error

    def open_rows(corpus: Corpus, split: SplitSpec) -> PackedDataset:
        return PackedDataset.open(corpus, max_seq_len=data.max_seq_len, packing=data.packing, split=split)

    splits, by = data.eval_fraction > 0, SplitSpec().by
    sources, eval_sets = [], []
    for source in data.training_sources:
        files = files_of["data_path" if data.sources is None else f"sources/{source.name}"]
        corpus = open_shards(
            "data.data_path" if data.sources is None else f"source {source.name}", files, source.text_field
        )
        if splits and data.sources is None and is_single_file(source.path):
            by = choose_split(corpus, tokenizer)
        try:
            rows = open_rows(corpus, SplitSpec("train", data.eval_fraction, by) if splits else SplitSpec())
        except DataInvalid as error:
            raise error if data.sources is None else DataInvalid(f"source {source.name}: {error}") from error
        sources.append(TrainingSource(source.name, files, corpus, rows, source.weight))
        if splits:
            held_out = open_rows(corpus, SplitSpec("eval", data.eval_fraction, by))
            eval_sets.append(HeldOutSet(source.name, len(files), held_out))
    for wanted in data.held_out_sources:
        files = files_of["eval_data_path" if data.eval_sources is None else f"eval_sources/{wanted.name}"]
        corpus = open_shards(held_out_field(data, wanted), files, wanted.text_field)
        documents = None if wanted.max_tokens is None else documents_within(corpus.offsets, wanted.max_tokens)
        eval_sets.append(HeldOutSet(wanted.name, len(files), open_rows(corpus, SplitSpec(documents=documents))))
    train_set = PackedDataset.concat([source.rows for source in sources])
    return TrainingData(spec, tokenizer, tuple(sources), train_set, tuple(eval_sets), by, roots)


def _size(files: Sequence[NamedFile]) -> int:
    size = 0
    for file in files:
        with contextlib.suppress(OSError):  # the error is raised when the file is opened
            size += file.path.stat().st_size
    return size


def _with_vocabulary(spec: JobSpec, tokenizer: Tokenizer) -> JobSpec:
    try:
        model = spec.model.with_vocab_size(tokenizer.vocab_size)
    except ValueError as error:
        hint = "Leave model.vocab_size out: it is taken from the tokenizer."
        raise TrainingError(Reason.SPEC_INVALID, f"model.vocab_size: {error}", hint) from error
    return spec.model_copy(update={"model": model})


def _report_corpus(data: TrainingData, emit: Callable[[Event], None]) -> None:
    stats, name = data.stats, data.spec.data.corpus_name
    if stats.bad_lines:
        details = {"bad_lines": stats.bad_lines, "named": [list(pair) for pair in stats.examples]}
        message = f"{name}: {stats.describe_bad()}; bad lines are left out"
        emit(WarningEvent(code="bad_lines", message=message, data=details))
    if warning := read_as_text_warning(data.tokenizer, stats):
        details = {"special_tokens": stats.special_tokens, "special_texts": stats.special_texts}
        emit(WarningEvent(code="special_tokens", message=f"{name}: {warning}", data=details))
    if isinstance(unknown := data.byte_lengths, BytesUnknown):
        why = f"the tokens of this tokenizer have no fixed number of bytes: {unknown}"
        emit(WarningEvent(code="bytes_unknown", message=f"bits per byte are not reported, because {why}"))
