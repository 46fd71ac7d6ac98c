"""Estimate of a run's size from a sample of its corpus. Pure."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from trainyard.contract.spec import JobSpec


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
    """Return a held-out set whose files have this size together, and of which at most ``max_tokens`` are evaluated."""
    if size is None:
        return PlannedEvalSet(name, files, None, None)
    share = min(1.0, max_tokens / size.targets) if max_tokens is not None else 1.0
    return PlannedEvalSet(name, files, max(1, round(share * size.documents)), round(share * size.targets))


def plan_split(name: str, files: int, size: RunSize | None, fraction: float) -> PlannedEvalSet:
    """Return the held-out documents of a source of this size."""
    if size is None:
        return PlannedEvalSet(name, files, None, None)
    targets = size.targets / (1 - fraction) * fraction
    return PlannedEvalSet(name, files, max(1, round(fraction * size.documents)), round(targets))


def join_sizes(spec: JobSpec, sizes: Sequence[RunSize | None]) -> RunSize | None:
    """Return the size of a run over all sources, or None if that of a source is unknown."""
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


def estimate_size(spec: JobSpec, lengths: Sequence[float], bad_lines: int, scale: float) -> RunSize | None:
    """Return the run's size, or None if the sample has no document.

    Args:
        spec: the job's spec.
        lengths: tokens of each sampled document, including its beginning and end.
        bad_lines: sampled lines that are no document.
        scale: size of the file relative to the sample.
    """
    train_fraction = 1.0 - spec.data.eval_fraction
    rows = scale * train_fraction * _rows(lengths, spec.data.max_seq_len, spec.data.packing == "document")
    if not lengths or rows <= 0:
        return None
    samples = max(1, round(rows))
    steps_per_epoch = math.ceil(samples / spec.rows_per_step)
    targets = sum(length - 1 for length in lengths)
    # At least one, as with the samples: an eval_fraction near 1 leaves less of the sample.
    trained = max(1, round(scale * train_fraction * targets))
    return RunSize(
        documents=round(scale * len(lengths)),
        tokens=round(scale * sum(lengths)),
        bad_lines=round(scale * bad_lines),
        samples=samples,
        targets=trained,
        steps_per_epoch=steps_per_epoch,
        steps=_steps(spec, steps_per_epoch, trained),
        attention_length=sum(_squares(length, spec.data.max_seq_len) for length in lengths) / targets,
    )


def _squares(length: float, max_seq_len: int) -> float:
    """Return the sum of the squared lengths of a document's segments."""
    full = math.ceil((length - 1) / (max_seq_len - 1)) - 1
    return full * max_seq_len**2 + (length - full * (max_seq_len - 1)) ** 2


def _rows(lengths: Sequence[float], max_seq_len: int, packed: bool) -> float:
    stride = max_seq_len - 1
    segments = [math.ceil((length - 1) / stride) for length in lengths]
    if not packed:
        return float(sum(segments))
    # Each cut repeats one token. Two segments of more than half a row never share one.
    tokens = sum(lengths) + sum(count - 1 for count in segments)
    last_lengths = (length - (count - 1) * stride for length, count in zip(lengths, segments, strict=True))
    over_half = sum(count - 1 + (last > max_seq_len / 2) for count, last in zip(segments, last_lengths, strict=True))
    return max(tokens / max_seq_len, float(over_half))
