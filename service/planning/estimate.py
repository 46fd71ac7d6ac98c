"""Estimate of a run's size from a sample of its corpus, or from the report of a tokenized corpus. Pure."""

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from trainyard.contract.corpus_report import SourceReport
from trainyard.contract.spec import JobSpec

SPREAD = 16
"""A range of lengths in a report is divided into this number of equal parts."""


@dataclass(frozen=True)
class RunSize:
    """Size of a run. ``targets``: predictions in one pass over the sequences.

    ``special_tokens``: occurrences of special tokens in the texts, in ``special_texts`` of them.
    ``attention_length``: see `model.costs.flops_per_token`.
    """

    documents: int
    tokens: int
    bad_lines: int
    samples: int
    targets: int
    steps_per_epoch: int
    steps: int
    attention_length: float
    special_tokens: int = 0
    special_texts: int = 0

    @property
    def tokens_per_step(self) -> float:
        """Average number of predictions in a step."""
        return self.targets / self.steps_per_epoch

    @property
    def trained_tokens(self) -> float:
        """Number of predictions in the whole run."""
        return self.steps * self.tokens_per_step


@dataclass(frozen=True)
class PlannedSource:
    """A source in the plan. ``share`` of the tokens that the run reads; ``passes`` over the source. None: unknown."""

    name: str
    files: int
    documents: int | None
    tokens: int | None
    share: float | None
    passes: float | None


@dataclass(frozen=True)
class PlannedEvalSet:
    """A held-out set in the plan. ``tokens``: those that are predicted. None: unknown."""

    name: str
    files: int
    documents: int | None
    tokens: int | None


def plan_eval_set(name: str, files: int, size: RunSize | None, max_tokens: int | None) -> PlannedEvalSet:
    """Return the planned held-out set of files of ``size`` together; at most ``max_tokens`` are evaluated."""
    if size is None:
        return PlannedEvalSet(name, files, None, None)
    share = min(1.0, max_tokens / size.targets) if max_tokens is not None else 1.0
    return PlannedEvalSet(name, files, max(1, round(share * size.documents)), round(share * size.targets))


def plan_split(name: str, files: int, size: RunSize | None, fraction: float) -> PlannedEvalSet:
    """Return the planned held-out set that is split from a source of ``size``."""
    if size is None:
        return PlannedEvalSet(name, files, None, None)
    targets = size.targets / (1 - fraction) * fraction
    return PlannedEvalSet(name, files, max(1, round(fraction * size.documents)), round(targets))


def join_sizes(spec: JobSpec, sizes: Sequence[RunSize | None]) -> RunSize | None:
    """Return the size of a run on all sources, or None if the size of a source is unknown."""
    known = [size for size in sizes if size is not None]
    if len(known) < len(sizes) or len(known) == 1:
        return known[0] if len(sizes) == len(known) == 1 else None
    samples = sum(size.samples for size in known)
    steps_per_epoch = math.ceil(samples / spec.rows_per_step)
    return RunSize(
        documents=sum(size.documents for size in known),
        tokens=sum(size.tokens for size in known),
        bad_lines=sum(size.bad_lines for size in known),
        samples=samples,
        targets=sum(size.targets for size in known),
        steps_per_epoch=steps_per_epoch,
        steps=_steps(spec, steps_per_epoch, sum(size.targets for size in known)),
        attention_length=sum(size.attention_length * size.targets for size in known) / sum(s.targets for s in known),
        special_tokens=sum(size.special_tokens for size in known),
        special_texts=sum(size.special_texts for size in known),
    )


def plan_sources(
    spec: JobSpec, files: Sequence[int], sizes: Sequence[RunSize | None], total: RunSize | None
) -> Iterator[PlannedSource]:
    """Yield each source of the plan. ``files``: the number of files of each; ``total``: the size of the whole run."""
    sources = spec.data.training_sources
    weights = sum(source.weight or 0.0 for source in sources)
    for source, count, size in zip(sources, files, sizes, strict=True):
        share = None if source.weight is None else source.weight / weights
        passes = None
        if size is not None and total is not None:
            share = size.targets / total.targets if share is None else share
            passes = share * total.trained_tokens / size.targets
        documents, tokens = (None, None) if size is None else (size.documents, size.tokens)
        yield PlannedSource(source.name, count, documents, tokens, share, passes)


def _steps(spec: JobSpec, steps_per_epoch: int, targets: int) -> int:
    return spec.training.run_steps(steps_per_epoch, targets / steps_per_epoch) or 1


def estimate_size(spec: JobSpec, lengths: Mapping[float, float], bad_lines: int, scale: float) -> RunSize | None:
    """Return the run's size, or None if the sample has no document.

    Args:
        spec: the job's spec.
        lengths: tokens of a document, including its beginning and end -> number of sampled documents of this length.
        bad_lines: sampled lines that are no document.
        scale: size of the file relative to the sample.
    """
    train_fraction = 1.0 - spec.data.eval_fraction
    rows = scale * train_fraction * _rows(lengths, spec.data.max_seq_len, spec.data.packing == "document")
    if not lengths or rows <= 0:
        return None
    samples = max(1, round(rows))
    steps_per_epoch = math.ceil(samples / spec.rows_per_step)
    targets = sum(count * (length - 1) for length, count in lengths.items())
    # At least one, as with the samples: an eval_fraction near 1 leaves less of the sample.
    trained = max(1, round(scale * train_fraction * targets))
    squares = sum(count * _squares(length, spec.data.max_seq_len) for length, count in lengths.items())
    return RunSize(
        documents=round(scale * sum(lengths.values())),
        tokens=round(scale * sum(count * length for length, count in lengths.items())),
        bad_lines=round(scale * bad_lines),
        samples=samples,
        targets=trained,
        steps_per_epoch=steps_per_epoch,
        steps=_steps(spec, steps_per_epoch, trained),
        attention_length=squares / targets,
    )


def size_from_report(spec: JobSpec, report: SourceReport) -> RunSize | None:
    """Return the size of a run on a tokenized source: its tokens and documents are exact, its rows nearly so.

    Return None if the source has no document.
    """
    size = estimate_size(spec, _report_lengths(report), report.bad_documents, 1.0)
    if size is None:
        return None
    marks = {"special_tokens": report.special_tokens or 0, "special_texts": report.special_texts or 0}
    return replace(size, documents=report.documents, tokens=report.tokens, **marks)


def _report_lengths(report: SourceReport) -> dict[float, float]:
    """Return the documents by length: evenly in each range of the report, then scaled to its number of tokens."""
    spread: dict[float, float] = defaultdict(float)
    for bucket in report.lengths:
        for number in range(SPREAD):
            spread[bucket.min + (bucket.max - bucket.min) * (number + 0.5) / SPREAD] += bucket.documents / SPREAD
    known = sum(count * length for length, count in spread.items())
    factor = (report.tokens - 2 * report.documents) / known if known else 1.0
    return {2 + factor * length: count for length, count in spread.items()}


def _squares(length: float, max_seq_len: int) -> float:
    """Return the sum of the squared lengths of a document's segments."""
    full = math.ceil((length - 1) / (max_seq_len - 1)) - 1
    return full * max_seq_len**2 + (length - full * (max_seq_len - 1)) ** 2


def _rows(lengths: Mapping[float, float], max_seq_len: int, packed: bool) -> float:
    stride = max_seq_len - 1
    segments = {length: math.ceil((length - 1) / stride) for length in lengths}
    if not packed:
        return float(sum(count * segments[length] for length, count in lengths.items()))
    # Each cut repeats one token. Two segments of more than half a row never share one.
    tokens = sum(count * (length + segments[length] - 1) for length, count in lengths.items())
    over_half = 0.0
    for length, count in lengths.items():
        last = length - (segments[length] - 1) * stride
        over_half += count * (segments[length] - 1 + (last > max_seq_len / 2))
    return max(tokens / max_seq_len, over_half)
