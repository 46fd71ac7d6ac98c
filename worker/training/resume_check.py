"""Check of a resume: the loss of a few fixed rows, at the save of a checkpoint and after it is loaded."""

import math
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch

from trainyard.contract.events import Event, ResumeVerified, WarningEvent
from trainyard.contract.failpoints import hit
from trainyard.contract.spec import TrainingSpec
from trainyard.model.loss import IGNORED
from trainyard.worker.data.documents import Integers
from trainyard.worker.data.loader import to_device
from trainyard.worker.data.packing import Batch, PackedDataset
from trainyard.worker.data.sampler import FeistelPermutation
from trainyard.worker.training.state import TrainState

ROWS, POSITIONS = 4, 32
"""Number of rows, and of the first positions of each. Scoring them takes 1 to 2 % of the time of a save."""

TOLERANCE = {"float32": 1e-4, "float16": 2e-3, "bfloat16": 1e-2}
"""Nats by which the loss may differ on another device, number of threads or build of torch."""


@dataclass(frozen=True)
class ResumeCheck:
    """Scores ``rows``, the first ones of the first epoch: a function of corpus and seed alone. For rank 0 only."""

    dataset: PackedDataset
    rows: Integers
    dtype: str
    device: torch.device

    @classmethod
    def from_dataset(cls, dataset: PackedDataset, training: TrainingSpec, device: torch.device) -> Self:
        first = np.arange(min(ROWS, len(dataset)))
        return cls(dataset, FeistelPermutation(len(dataset), training.seed, 0)(first), training.dtype, device)

    def score(self, state: TrainState) -> dict[str, Any]:
        """Return {"loss": mean cross-entropy without dropout, "dtype": ...}, or {} if the loss is not finite."""
        hit("resume_check.score")
        batch = to_device(self.batch(), self.device)
        with state.scoring() as loss_sum:
            loss = float(loss_sum(batch)) / max(1, int((batch.labels != IGNORED).sum()))
        return {"loss": loss, "dtype": self.dtype} if math.isfinite(loss) else {}

    def batch(self) -> Batch:
        """Return the first positions of the rows. Attention is causal, so what is cut off has no influence on them."""
        whole = self.dataset.batch(self.rows)
        positions, segments = whole.position_ids, whole.segment_ids
        return Batch(
            whole.input_ids[:, :POSITIONS].contiguous(),
            positions[:, :POSITIONS].contiguous() if positions is not None else None,
            segments[:, :POSITIONS].contiguous() if segments is not None else None,
            whole.labels[:, :POSITIONS].contiguous(),
        )


def compare_scores(step: int, before: dict[str, Any], now: dict[str, Any]) -> list[Event]:
    """Return the events about a resume at ``step``: the comparison, and a warning if the scores differ too much.

    No events if the checkpoint was saved without a score.
    """
    if "loss" not in before:
        return []
    expected, found = float(before["loss"]), now.get("loss")
    difference = found - expected if found is not None else None
    verified = ResumeVerified(step=step, expected=expected, found=found, difference=difference)
    tolerance = max(TOLERANCE.get(str(kind), 0.0) for kind in (before.get("dtype"), now.get("dtype")))
    if difference is not None and abs(difference) <= tolerance:
        return [verified]
    score = "no finite number" if found is None else f"{found:.6f}"
    message = (
        f"the checkpoint of step {step} scores {score} on the rows on which it scored {expected:.6f} when it "
        f"was saved; a difference of up to {tolerance:g} is normal on another device. Its files are valid, so look for "
        "another version of torch or of this program, another dtype, or failing hardware"
    )
    data = verified.model_dump(mode="json")
    return [verified, WarningEvent(code="resume_differs", message=message, step=step, data=data)]
