"""The size of a run from a glance at its corpus. Pure."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from trainyard.contract.spec import JobSpec


@dataclass(frozen=True)
class RunSize:
    """How much a run reads and does. ``targets``: predictions in one pass over the rows."""

    documents: int
    tokens: int
    bad_lines: int
    samples: int
    targets: int
    steps_per_epoch: int
    steps: int

    @property
    def tokens_per_step(self) -> float:
        """Predictions in a step, on average."""
        return self.targets / self.steps_per_epoch

    @property
    def trained_tokens(self) -> float:
        """Predictions of the whole run."""
        return self.steps * self.tokens_per_step


def estimate_size(spec: JobSpec, lengths: Sequence[float], bad_lines: int, scale: float) -> RunSize | None:
    """The size, from the tokens of each document that was looked at; None where there is none.

    Args:
        spec: what is asked for.
        lengths: tokens of each document in the sample, beginning and end included.
        bad_lines: lines of the sample that are no document.
        scale: the whole file is so many times the sample.
    """
    kept = 1.0 - spec.data.eval_fraction
    rows = scale * kept * _rows(lengths, spec.data.max_seq_len, spec.data.packing == "document")
    if not lengths or rows <= 0:
        return None
    samples = max(1, round(rows))
    steps_per_epoch = math.ceil(samples / spec.rows_per_step)
    training = spec.training
    return RunSize(
        documents=round(scale * len(lengths)),
        tokens=round(scale * sum(lengths)),
        bad_lines=round(scale * bad_lines),
        samples=samples,
        targets=round(scale * kept * sum(length - 1 for length in lengths)),
        steps_per_epoch=steps_per_epoch,
        steps=training.max_steps if training.max_steps is not None else training.epochs * steps_per_epoch,
    )


def _rows(lengths: Sequence[float], max_seq_len: int, packed: bool) -> float:
    """Rows that the documents fill: one a piece, or as many as their tokens need when pieces are put together."""
    stride = max_seq_len - 1
    pieces = [math.ceil((length - 1) / stride) for length in lengths]
    if not packed:
        return float(sum(pieces))
    # Each cut repeats one token. Two pieces of more than half a row never share one.
    tokens = sum(lengths) + sum(count - 1 for count in pieces)
    lasts = (length - (count - 1) * stride for length, count in zip(lengths, pieces, strict=True))
    large = sum(count - 1 + (last > max_seq_len / 2) for count, last in zip(pieces, lasts, strict=True))
    return max(tokens / max_seq_len, float(large))
