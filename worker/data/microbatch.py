"""The micro-batch: the rows that one rank runs through the model at once."""

from dataclasses import dataclass
from typing import Protocol

import torch


class ModelInputs(Protocol):
    """One micro-batch of one rank on its device: B rows of S tokens."""

    @property
    def input_ids(self) -> torch.Tensor:
        """[B, S] token ids."""

    @property
    def position_ids(self) -> torch.Tensor | None:
        """[B, S] positions, from 0 in each segment; None if each row is one segment."""

    @property
    def segment_ids(self) -> torch.Tensor | None:
        """[B, S] segment numbers; attention stays within a segment. None if each row is one segment."""

    @property
    def offsets(self) -> torch.Tensor | None:
        """[P + 1] int32, the start of each segment among all tokens, see `model.varlen_attention`; or None."""

    @property
    def labels(self) -> torch.Tensor:
        """[B, S] the next token, or -100."""


@dataclass(frozen=True)
class MicroBatch:
    """Model inputs, and the factor that turns their summed loss into their part of the step's loss."""

    batch: ModelInputs
    factor: float
    rows: tuple[int, ...] = ()
    tokens: int = 0
