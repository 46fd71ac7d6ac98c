"""The micro-batch: what one rank runs through the model at once."""

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
        """[B, S] positions, from 0 in each piece; None: each row is one piece."""

    @property
    def segment_ids(self) -> torch.Tensor | None:
        """[B, S] number of the piece; tokens see only their own. None: each row is one piece."""

    @property
    def offsets(self) -> torch.Tensor | None:
        """[P + 1] int32, the start of each segment among all tokens, see `model.varlen_attention`; or None."""

    @property
    def labels(self) -> torch.Tensor:
        """[B, S] the next token, or -100."""


@dataclass(frozen=True)
class MicroBatch:
    """A micro-batch and the factor that turns its summed loss into its part of the step's loss."""

    batch: ModelInputs
    factor: float
    rows: tuple[int, ...] = ()
    tokens: int = 0
