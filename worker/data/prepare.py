"""What is trained on: tokenizer, token shards, rows. Rank 0 builds what is missing while the others wait."""

import hashlib
import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from trainyard.contract.events import Event, PhaseChanged, WarningEvent
from trainyard.contract.file_identity import FileFingerprint
from trainyard.contract.run_identity import RunIdentity
from trainyard.contract.rundir import RunDir
from trainyard.contract.spec import JobSpec
from trainyard.contract.status import Phase, Reason
from trainyard.contract.tokenizer_info import TokenizerInvalid
from trainyard.worker.data.corpus import Corpus, open_corpus
from trainyard.worker.data.jsonl import DataInvalid
from trainyard.worker.data.packing import PackedDataset, SplitSpec
from trainyard.worker.data.tokenizers import Tokenizer, limit_threads, load_tokenizer
from trainyard.worker.distributed import DistributedContext
from trainyard.worker.errors import StopRequested, TrainingError, save_error
from trainyard.worker.paths import check_allowed_paths

CACHE = "TRAINYARD_CORPUS_CACHE"
PROGRESS_SECONDS = 1.0


@dataclass(frozen=True)
class TrainingData:
    """``spec`` has its vocabulary filled in; ``evaluation`` is None where nothing is held out."""

    spec: JobSpec
    tokenizer: Tokenizer
    corpus: Corpus
    train_set: PackedDataset
    eval_set: PackedDataset | None

    @cached_property
    def identity(self) -> RunIdentity:
        """What makes another run of a checkpoint."""
        data, meta = self.spec.data, self.corpus.meta
        content = json.dumps([meta.content, meta.text_field, data.eval_fraction])
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
        """The sketch of the file as it is now; {} where that cannot be the one that was read any more."""
        try:
            found = FileFingerprint.of(Path(self.spec.data.data_path))
        except OSError:
            return {}
        return asdict(found) if found.bytes == self.corpus.meta.bytes else {}


def prepare_data(
    spec: JobSpec, run: RunDir, ranks: DistributedContext, say: Callable[[Event], None], stop_asked: Callable[[], bool]
) -> TrainingData:
    """Open everything, built first where it is not in the cache. Raises Failure, or StopAsked, on every rank."""
    ranks.broadcast_from_rank0(lambda: _open_or_fail(spec, run, _ProgressReporter(say, stop_asked)).train_set.tokens)
    # Everything is there now, and a rank that stopped here would stop alone.
    material = _open_or_fail(spec, run, _ProgressReporter(say, lambda: False))
    _report_bad_lines(material, say)
    return material


class _ProgressReporter:
    """Tells how far the tokenization is, and ends it when the run is to stop."""

    def __init__(self, say: Callable[[Event], None], stop_asked: Callable[[], bool]) -> None:
        self._say = say
        self._stop_asked = stop_asked
        self._told_at = time.monotonic()

    def __call__(self, done: int, total: int) -> None:
        if self._stop_asked():
            raise StopRequested
        if time.monotonic() - self._told_at >= PROGRESS_SECONDS:
            self._told_at = time.monotonic()
            self._say(PhaseChanged(phase=Phase.PREPARING_DATA, done=done, total=total))


def _open_or_fail(spec: JobSpec, run: RunDir, teller: _ProgressReporter) -> TrainingData:
    try:
        return _open(spec, run, teller)
    except DataInvalid as error:
        raise TrainingError(
            Reason.DATA_INVALID, str(error), "`trainyard corpus check FILE` lists every bad line."
        ) from error
    except TokenizerInvalid as error:
        raise TrainingError(Reason.SPEC_INVALID, f"data.tokenizer_path: {error}") from error
    except OSError as error:
        raise save_error(error, "the corpus's token shards") from error


def _open(spec: JobSpec, run: RunDir, teller: _ProgressReporter) -> TrainingData:
    data = spec.data
    limit_threads(data.num_workers)
    tokenizer = load_tokenizer(data.tokenizer_path)
    spec = _with_vocabulary(spec, tokenizer)
    cache = Path(os.environ.get(CACHE) or run.corpus_cache)

    def shards(path: str) -> Corpus:
        # Of the second corpus too: the first one may have taken hours.
        check_allowed_paths(spec, run)
        return open_corpus(
            Path(path),
            tokenizer,
            cache=cache,
            text_field=data.text_field,
            max_bad_lines=data.max_bad_lines,
            progress=teller,
        )

    def rows(of: Corpus, split: SplitSpec) -> PackedDataset:
        return PackedDataset.open(of, max_seq_len=data.max_seq_len, packing=data.packing, split=split)

    corpus = shards(data.data_path)
    if data.eval_data_path is not None:
        held_out = rows(shards(data.eval_data_path), SplitSpec())
        return TrainingData(spec, tokenizer, corpus, rows(corpus, SplitSpec()), held_out)
    if data.eval_fraction > 0:
        train, held_out = (rows(corpus, SplitSpec(part, data.eval_fraction)) for part in ("train", "eval"))
        return TrainingData(spec, tokenizer, corpus, train, held_out)
    return TrainingData(spec, tokenizer, corpus, rows(corpus, SplitSpec()), None)


def _with_vocabulary(spec: JobSpec, tokenizer: Tokenizer) -> JobSpec:
    try:
        model = spec.model.with_vocab_size(tokenizer.vocab_size)
    except ValueError as error:
        hint = "Leave model.vocab_size out: it is taken from the tokenizer."
        raise TrainingError(Reason.SPEC_INVALID, f"model.vocab_size: {error}", hint) from error
    return spec.model_copy(update={"model": model})


def _report_bad_lines(material: TrainingData, say: Callable[[Event], None]) -> None:
    meta = material.corpus.meta
    if meta.bad_lines:
        data = {"bad_lines": meta.bad_lines, "named": [list(pair) for pair in meta.named]}
        message = f"{material.spec.data.data_path} has {meta.tally.describe_bad()}; they are left out"
        say(WarningEvent(code="bad_lines", message=message, data=data))
