"""What keeps a bad gradient from the weights: decided on the device, so that no step waits to be read.

A step whose gradient is not finite is never applied. Whether later ones are is the policy's business: until somebody
has read what happened (`worker.gate` judges it), the brake holds all of them where the run must fail or go back.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from trainyard.worker.gate import SKIPS_IN_A_ROW, SKIPS_IN_ALL, Policy, Trouble


@dataclass
class Brake:
    """Counts on the device as `gate.judge` does on the host, so that both stop at the same step.

    ``holding`` false: it holds bad steps alone. So it must be with a loss scale, whose overflows are no trouble, and
    whose steps are read one by one.
    """

    policy: Policy
    holding: bool
    device: torch.device

    def __post_init__(self) -> None:
        self.release(Trouble())

    def release(self, before: Trouble) -> None:
        """Apply steps again, after so much trouble."""
        self._in_a_row = torch.tensor(before.in_a_row, device=self.device)
        self._skipped = torch.tensor(before.skipped, device=self.device)
        self._held = torch.zeros((), dtype=torch.bool, device=self.device)

    def hold(self, norm: Tensor) -> Tensor:
        """1.0 where the step with this gradient norm must not be applied, else 0.0: float32 scalar on the device."""
        bad = ~norm.isfinite()
        if self.holding:
            self._in_a_row = torch.where(bad, self._in_a_row + 1, 0)
            self._skipped = self._skipped + bad
            exhausted = (self._in_a_row > SKIPS_IN_A_ROW) | (self._skipped > SKIPS_IN_ALL)
            self._held = self._held | ((bad & exhausted) if self.policy == "skip" else bad)
        return (bad | self._held).float()
