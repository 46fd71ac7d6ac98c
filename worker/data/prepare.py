"""Prepare the training data: tokenizer, token shards, packed rows. Rank 0 builds what is missing; other ranks wait."""

import hashlib
import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from trainyard.contract.allowed_paths import OutsideRoots
from trainyard.contract.events import Event, PhaseChanged, WarningEvent
from trainyard.contract.failpoints import hit
from trainyard.contract.file_identity import FileFingerprint
from trainyard.contract.run_identity import RunIdentity
from trainyard.contract.rundir import RunDir
from trainyard.contract.spec import JobSpec
from trainyard.contract.status import Phase, Reason
from trainyard.contract.tokenizer_info import TokenizerInvalid
from trainyard.worker.data.corpus import Corpus, open_corpus, read_as_text_warning
from trainyard.worker.data.jsonl import DataInvalid
from trainyard.worker.data.packing import PackedDataset, SplitSpec
from trainyard.worker.data.tokenizers import Tokenizer, limit_threads, load_tokenizer
from trainyard.worker.distributed import DistributedContext
from trainyard.worker.errors import StopRequested, TrainingError, save_error
from trainyard.worker.paths import DATA_ROOTS, data_roots, outside_error

CORPUS_CACHE_VARIABLE = "TRAINYARD_CORPUS_CACHE"
PROGRESS_SECONDS = 1.0


@dataclass(frozen=True)
class TrainingData:
    """Everything that a run trains on. ``spec`` has its vocabulary size set; ``eval_set`` may be None.

    ``roots``: the directories below which the run may read, see `worker.paths.data_roots`.
    """

    spec: JobSpec
    tokenizer: Tokenizer
    corpus: Corpus
    train_set: PackedDataset
    eval_set: PackedDataset | None
    roots: tuple[Path, ...] = ()

    @cached_property
    def identity(self) -> RunIdentity:
        """The data and model identity, which a checkpoint must match to be resumed."""
        data, meta = self.spec.data, self.corpus.meta
        parts: list[Any] = [meta.content, meta.text_field, data.eval_fraction]
        if data.special_tokens == "tokens" or meta.added_tokens:
            # Other ids than release 0.1 made of the same text. Without these, its runs can be resumed.
            parts.append({"special_tokens": self.tokenizer.matching})
        content = json.dumps(parts)
        return RunIdentity(
            model=asdict(self.spec.model),
            tokenizer=self.tokenizer.fingerprint,
            corpus=hashlib.sha256(content.encode()).hexdigest(),
            seed=self.spec.training.seed,
            max_seq_len=data.max_seq_len,
            packing=data.packing,
            corpus_file=self._corpus_file(),
            vocabulary=self.tokenizer.vocab_size,
        )

    def _corpus_file(self) -> dict[str, Any]:
        """Return the fingerprint of the file as it is now, or {} if it is not the file that was read."""
        try:
            fingerprint = FileFingerprint.of(Path(self.spec.data.data_path), self.roots)
        except OSError:
            return {}
        return asdict(fingerprint) if fingerprint.bytes == self.corpus.meta.bytes else {}


def prepare_data(
    spec: JobSpec,
    run: RunDir,
    ranks: DistributedContext,
    emit: Callable[[Event], None],
    stop_requested: Callable[[], bool],
) -> TrainingData:
    """Open the data, built first if it is not in the cache. Raises TrainingError or StopRequested on every rank."""
    progress = _ProgressReporter(emit, stop_requested)
    ranks.broadcast_from_rank0(lambda: _open_or_fail(spec, run, progress).train_set.tokens)
    # Everything is built now. A rank that stopped here would stop alone, so stop requests are ignored.
    data = _open_or_fail(spec, run, _ProgressReporter(emit, lambda: False))
    _report_corpus(data, emit)
    return data


class _ProgressReporter:
    def __init__(self, emit: Callable[[Event], None], stop_requested: Callable[[], bool]) -> None:
        self._emit = emit
        self._stop_requested = stop_requested
        self._emitted_at = time.monotonic()

    def __call__(self, done: int, total: int) -> None:
        if self._stop_requested():
            raise StopRequested
        if time.monotonic() - self._emitted_at >= PROGRESS_SECONDS:
            self._emitted_at = time.monotonic()
            self._emit(PhaseChanged(phase=Phase.PREPARING_DATA, done=done, total=total))


def _open_or_fail(spec: JobSpec, run: RunDir, progress: _ProgressReporter) -> TrainingData:
    try:
        return _open(spec, run, progress)
    except DataInvalid as error:
        raise TrainingError(
            Reason.DATA_INVALID, str(error), "`trainyard corpus check FILE` lists every bad line."
        ) from error
    except TokenizerInvalid as error:
        raise TrainingError(Reason.SPEC_INVALID, f"data.tokenizer_path: {error}") from error
    except OSError as error:
        raise save_error(error, "the corpus's token shards") from error


def _open(spec: JobSpec, run: RunDir, progress: _ProgressReporter) -> TrainingData:
    hit("prepare.open")
    data = spec.data
    limit_threads(data.num_workers)
    roots = data_roots(run)
    try:
        tokenizer = load_tokenizer(data.tokenizer_path, data.special_tokens, roots)
    except OutsideRoots as error:
        raise outside_error("data.tokenizer_path", error.reason, DATA_ROOTS) from error
    spec = _with_vocabulary(spec, tokenizer)
    cache = Path(os.environ.get(CORPUS_CACHE_VARIABLE) or run.corpus_cache)

    def open_shards(field: str, path: str) -> Corpus:
        try:
            return open_corpus(
                Path(path),
                tokenizer,
                cache=cache,
                text_field=data.text_field,
                max_bad_lines=data.max_bad_lines,
                progress=progress,
                roots=roots,
            )
        except OutsideRoots as error:
            raise outside_error(field, error.reason, DATA_ROOTS) from error

    def open_rows(corpus: Corpus, split: SplitSpec) -> PackedDataset:
        return PackedDataset.open(corpus, max_seq_len=data.max_seq_len, packing=data.packing, split=split)

    corpus = open_shards("data.data_path", data.data_path)
    if data.eval_data_path is not None:
        eval_set = open_rows(open_shards("data.eval_data_path", data.eval_data_path), SplitSpec())
        return TrainingData(spec, tokenizer, corpus, open_rows(corpus, SplitSpec()), eval_set, roots)
    if data.eval_fraction > 0:
        train_set, eval_set = (open_rows(corpus, SplitSpec(part, data.eval_fraction)) for part in ("train", "eval"))
        return TrainingData(spec, tokenizer, corpus, train_set, eval_set, roots)
    return TrainingData(spec, tokenizer, corpus, open_rows(corpus, SplitSpec()), None, roots)


def _with_vocabulary(spec: JobSpec, tokenizer: Tokenizer) -> JobSpec:
    try:
        model = spec.model.with_vocab_size(tokenizer.vocab_size)
    except ValueError as error:
        hint = "Leave model.vocab_size out: it is taken from the tokenizer."
        raise TrainingError(Reason.SPEC_INVALID, f"model.vocab_size: {error}", hint) from error
    return spec.model_copy(update={"model": model})


def _report_corpus(data: TrainingData, emit: Callable[[Event], None]) -> None:
    meta = data.corpus.meta
    if meta.bad_lines:
        details = {"bad_lines": meta.bad_lines, "named": [list(pair) for pair in meta.named]}
        message = f"{data.spec.data.data_path} has {meta.stats.describe_bad()}; they are left out"
        emit(WarningEvent(code="bad_lines", message=message, data=details))
    if warning := read_as_text_warning(data.tokenizer, meta.stats):
        details = {"special_tokens": meta.special_tokens, "special_texts": meta.special_texts}
        emit(WarningEvent(code="special_tokens", message=f"{data.spec.data.data_path}: {warning}", data=details))
