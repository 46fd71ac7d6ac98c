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

from trainyard.contract.events import Event, PhaseChanged, Warned
from trainyard.contract.file_identity import Sketch
from trainyard.contract.run_identity import Identity
from trainyard.contract.rundir import RunDir
from trainyard.contract.spec import JobSpec
from trainyard.contract.status import Phase, Reason
from trainyard.contract.tokenizer_info import TokenizerInvalid
from trainyard.worker.data.corpus import Corpus, open_corpus
from trainyard.worker.data.jsonl import DataInvalid
from trainyard.worker.data.packing import RowTable, Split
from trainyard.worker.data.paths import check_roots
from trainyard.worker.data.tokenizers import Tokenizer, limit_threads, load
from trainyard.worker.distributed import Ranks
from trainyard.worker.errors import Failure, StopAsked, not_saved

CACHE = "TRAINYARD_CORPUS_CACHE"
TOLD_SECONDS = 1.0


@dataclass(frozen=True)
class Material:
    """``spec`` has its vocabulary filled in; ``evaluation`` is None where nothing is held out."""

    spec: JobSpec
    tokenizer: Tokenizer
    corpus: Corpus
    rows: RowTable
    evaluation: RowTable | None

    @cached_property
    def identity(self) -> Identity:
        """What makes another run of a checkpoint."""
        data, meta = self.spec.data, self.corpus.meta
        content = json.dumps([meta.content, meta.text_field, data.eval_fraction])
        return Identity(
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
            found = Sketch.of(Path(self.spec.data.data_path))
        except OSError:
            return {}
        return asdict(found) if found.bytes == self.corpus.meta.bytes else {}


def prepare(
    spec: JobSpec, run: RunDir, ranks: Ranks, say: Callable[[Event], None], stop_asked: Callable[[], bool]
) -> Material:
    """Open everything, built first where it is not in the cache. Raises Failure, or StopAsked, on every rank."""
    ranks.from_leader(lambda: _open_or_fail(spec, run, _Teller(say, stop_asked)).rows.tokens)
    # Everything is there now, and a rank that stopped here would stop alone.
    material = _open_or_fail(spec, run, _Teller(say, lambda: False))
    _tell_bad_lines(material, say)
    return material


class _Teller:
    """Tells how far the tokenization is, and ends it when the run is to stop."""

    def __init__(self, say: Callable[[Event], None], stop_asked: Callable[[], bool]) -> None:
        self._say = say
        self._stop_asked = stop_asked
        self._told_at = time.monotonic()

    def __call__(self, done: int, total: int) -> None:
        if self._stop_asked():
            raise StopAsked
        if time.monotonic() - self._told_at >= TOLD_SECONDS:
            self._told_at = time.monotonic()
            self._say(PhaseChanged(phase=Phase.PREPARING_DATA, done=done, total=total))


def _open_or_fail(spec: JobSpec, run: RunDir, teller: _Teller) -> Material:
    try:
        return _open(spec, run, teller)
    except DataInvalid as error:
        raise Failure(Reason.DATA_INVALID, str(error), "`trainyard corpus check FILE` lists every bad line.") from error
    except TokenizerInvalid as error:
        raise Failure(Reason.SPEC_INVALID, f"data.tokenizer_path: {error}") from error
    except OSError as error:
        raise not_saved(error, "the corpus's token shards") from error


def _open(spec: JobSpec, run: RunDir, teller: _Teller) -> Material:
    data = spec.data
    limit_threads(data.num_workers)
    tokenizer = load(data.tokenizer_path)
    spec = _with_vocabulary(spec, tokenizer)
    cache = Path(os.environ.get(CACHE) or run.corpus_cache)

    def shards(path: str) -> Corpus:
        # Of the second corpus too: the first one may have taken hours.
        check_roots(spec, run)
        return open_corpus(
            Path(path),
            tokenizer,
            cache=cache,
            text_field=data.text_field,
            max_bad_lines=data.max_bad_lines,
            progress=teller,
        )

    def rows(of: Corpus, split: Split) -> RowTable:
        return RowTable.open(of, max_seq_len=data.max_seq_len, packing=data.packing, split=split)

    corpus = shards(data.data_path)
    if data.eval_data_path is not None:
        held_out = rows(shards(data.eval_data_path), Split())
        return Material(spec, tokenizer, corpus, rows(corpus, Split()), held_out)
    if data.eval_fraction > 0:
        train, held_out = (rows(corpus, Split(part, data.eval_fraction)) for part in ("train", "eval"))
        return Material(spec, tokenizer, corpus, train, held_out)
    return Material(spec, tokenizer, corpus, rows(corpus, Split()), None)


def _with_vocabulary(spec: JobSpec, tokenizer: Tokenizer) -> JobSpec:
    try:
        model = spec.model.with_vocab_size(tokenizer.vocab_size)
    except ValueError as error:
        hint = "Leave model.vocab_size out: it is taken from the tokenizer."
        raise Failure(Reason.SPEC_INVALID, f"model.vocab_size: {error}", hint) from error
    return spec.model_copy(update={"model": model})


def _tell_bad_lines(material: Material, say: Callable[[Event], None]) -> None:
    meta = material.corpus.meta
    if meta.bad_lines:
        data = {"bad_lines": meta.bad_lines, "named": [list(pair) for pair in meta.named]}
        message = f"{material.spec.data.data_path} has {meta.tally.describe_bad()}; they are left out"
        say(Warned(code="bad_lines", message=message, data=data))
