"""The proof of a resume: a few rows that are scored when a checkpoint is saved, and again when it is gone on from."""

import math
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch

from trainyard.contract.events import Event, ResumeVerified, WarningEvent
from trainyard.contract.spec import TrainingSpec
from trainyard.worker.data.loader import to_device
from trainyard.worker.data.packing import Batch, Integers, PackedDataset
from trainyard.worker.data.sampler import FeistelPermutation
from trainyard.worker.training.state import TrainState

ROWS, POSITIONS = 4, 32
"""So many rows, and the beginning of each: scoring them takes a hundredth or two of what a save takes."""

TOLERANCE = {"float32": 1e-4, "float16": 2e-3, "bfloat16": 1e-2}
"""Nats by which the loss may differ on another device, another number of threads or another build of torch."""


@dataclass(frozen=True)
class ResumeCheck:
    """``rows`` are the first ones of the first epoch: a function of corpus and seed alone. Rank 0 scores them."""

    dataset: PackedDataset
    rows: Integers
    dtype: str
    device: torch.device

    @classmethod
    def of(cls, table: PackedDataset, training: TrainingSpec, device: torch.device) -> Self:
        """The probe of a run over ``table``."""
        first = np.arange(min(ROWS, len(table)))
        return cls(table, FeistelPermutation(len(table), training.seed, 0)(first), training.dtype, device)

    def score(self, trainee: TrainState) -> dict[str, Any]:
        """What a checkpoint keeps: {"loss": mean cross-entropy, without dropout, "dtype": ...}; {} if not finite."""
        loss_sum, tokens = trainee.loss_sum([to_device(self.batch(), self.device)])
        loss = loss_sum / max(1, tokens)
        return {"loss": loss, "dtype": self.dtype} if math.isfinite(loss) else {}

    def batch(self) -> Batch:
        """The beginnings of the rows. What is cut off stands behind them, where nothing in them looks."""
        whole = self.dataset.batch(self.rows)
        positions, segments = whole.position_ids, whole.segment_ids
        return Batch(
            whole.input_ids[:, :POSITIONS].contiguous(),
            positions[:, :POSITIONS].contiguous() if positions is not None else None,
            segments[:, :POSITIONS].contiguous() if segments is not None else None,
            whole.labels[:, :POSITIONS].contiguous(),
        )


def compare_scores(step: int, before: dict[str, Any], now: dict[str, Any]) -> list[Event]:
    """What is to be said of a resume at ``step``: the proof, or doubt; nothing where the checkpoint has no probe."""
    if "loss" not in before:
        return []
    expected, found = float(before["loss"]), now.get("loss")
    difference = found - expected if found is not None else None
    proof = ResumeVerified(step=step, expected=expected, found=found, difference=difference)
    tolerance = max(TOLERANCE.get(str(kind), 0.0) for kind in (before.get("dtype"), now.get("dtype")))
    if difference is not None and abs(difference) <= tolerance:
        return [proof]
    message = (
        f"the checkpoint of step {step} scores {_number(found)} on the rows on which it scored {expected:.6f} when it "
        f"was saved; up to {tolerance:g} is what another device may make of it. Its files are sound, so look for "
        "another version of torch or of this program, another dtype, or failing hardware"
    )
    return [proof, WarningEvent(code="resume_differs", message=message, step=step, data=proof.model_dump(mode="json"))]


def _number(value: float | None) -> str:
    return "no finite number" if value is None else f"{value:.6f}"
