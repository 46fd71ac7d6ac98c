"""Bits per byte: a loss that does not depend on the tokenizer.

It is the summed loss in bits over the UTF-8 bytes of the text that the predicted tokens stand for. Special tokens are
predicted too, but stand for no bytes.
"""

import math
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from trainyard.model.loss import IGNORED
from trainyard.worker.data.byte_lengths import ByteLengths
from trainyard.worker.data.microbatch import ModelInputs


@dataclass(frozen=True)
class ByteCounter:
    """Counts the bytes of the predicted tokens on the device, without waiting for it.

    ``lengths`` [V + 1] int64: of token i at i + 1, and 0 for positions without a label. ``added`` [V] bool: see
    `worker.data.byte_lengths.ByteLengths`; None if the tokenizer inserts no space.
    """

    lengths: Tensor
    added: Tensor | None

    @classmethod
    def of(cls, table: ByteLengths, device: torch.device) -> Self:
        lengths = torch.cat((torch.zeros(1, dtype=torch.int64), torch.from_numpy(table.lengths)))
        added = torch.from_numpy(table.added).to(device) if table.inserts_space else None
        return cls(lengths.to(device), added)

    def count(self, batch: ModelInputs) -> Tensor:
        """Return the bytes of the labels of ``batch``: int64 scalar."""
        total = self.lengths[(batch.labels + 1).clamp(min=0)].sum()
        if self.added is None:
            return total
        begins = self.added[batch.input_ids] & ~self.added[batch.labels.clamp(min=0)] & (batch.labels != IGNORED)
        return total - begins.sum()


def bits_per_byte(loss_sum: float, text_bytes: float) -> float | None:
    """Return the bits per byte of a summed loss in nats; None if it is not finite or there are no bytes."""
    value = loss_sum / math.log(2) / text_bytes if text_bytes > 0 else math.nan
    return value if math.isfinite(value) else None
