"""Handling of non-finite gradients: `decide_step` on the host, and `DeviceNonFiniteGuard` on the device.

Both apply the same policy, so that they stop at the same step. On CUDA the host reads results some steps later; the
guard keeps bad updates out of the weights until then.
"""

from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Literal, assert_never

import torch
from torch import Tensor

Policy = Literal["fail", "skip", "rollback"]

MAX_CONSECUTIVE_SKIPS = 10
MAX_SKIPS = 100
MAX_ROLLBACKS = 3

MIN_OVERFLOW_SCALE = 1.0
"""Above this fp16 loss scale an overflow of the gradient only lowers the scale. At or below it the step is bad."""


class StepDecision(StrEnum):
    """The decision on a step."""

    APPLIED = "applied"
    OVERFLOWED = "overflowed"
    """The fp16 loss scale was too high: no update and no warning."""
    SKIP = "skip"
    ROLL_BACK = "roll_back"
    FAIL = "fail"


@dataclass(frozen=True)
class NonFiniteCounters:
    """Non-finite steps so far. They are part of every checkpoint, so that a resume keeps counting."""

    in_a_row: int = 0
    skipped: int = 0
    rollbacks: int = 0


def decide_step(
    finite: bool, policy: Policy, counters: NonFiniteCounters, loss_scale: float | None, *, losses_finite: bool = True
) -> tuple[StepDecision, NonFiniteCounters]:
    """Return the decision on a step, and the new counters.

    ``finite``, ``losses_finite``: whether the gradient and all losses are. ``loss_scale``: the fp16 scaler's during the
    step, None without a scaler.
    """
    if finite:
        return StepDecision.APPLIED, replace(counters, in_a_row=0)
    # A loss is computed before it is scaled, so a lower scale does not help against a non-finite one.
    if losses_finite and loss_scale is not None and loss_scale > MIN_OVERFLOW_SCALE:
        return StepDecision.OVERFLOWED, counters
    match policy:
        case "fail":
            return StepDecision.FAIL, counters
        case "skip":
            after = replace(counters, in_a_row=counters.in_a_row + 1, skipped=counters.skipped + 1)
            exhausted = after.in_a_row > MAX_CONSECUTIVE_SKIPS or after.skipped > MAX_SKIPS
            return (StepDecision.FAIL if exhausted else StepDecision.SKIP), after
        case "rollback":
            after = replace(counters, rollbacks=counters.rollbacks + 1)
            return (StepDecision.FAIL if after.rollbacks > MAX_ROLLBACKS else StepDecision.ROLL_BACK), after
        case _:
            assert_never(policy)


def nonfinite_message(step: int, rows: tuple[int, ...], bad_losses: tuple[int, ...]) -> str:
    """Return a message with the step and its rows; if losses are not finite, only with their rows, ``bad_losses``."""
    if bad_losses:
        return f"the loss is not finite at step {step}, in {_row_list(bad_losses)}"
    return f"the gradient is not finite at step {step}, over {_row_list(rows)}; every loss was finite"


def _row_list(rows: tuple[int, ...]) -> str:
    shown = ", ".join(map(str, rows[:8]))
    more = f" and {len(rows) - 8} more" if len(rows) > 8 else ""
    return f"row{'s' if len(rows) > 1 else ''} {shown}{more}"


@dataclass
class DeviceNonFiniteGuard:
    """Counts on the device as `decide_step` does on the host, without a device sync.

    ``is_latching``: after a step that ends the run or rolls it back, all later updates are skipped too. With an fp16
    scaler it must be False: overflows are harmless there, and each step is read at once.
    """

    policy: Policy
    is_latching: bool
    device: torch.device

    def __post_init__(self) -> None:
        self.reset(NonFiniteCounters())

    def reset(self, counters: NonFiniteCounters) -> None:
        """Set the counters and re-enable updates."""
        self._in_a_row = torch.tensor(counters.in_a_row, device=self.device)
        self._skipped = torch.tensor(counters.skipped, device=self.device)
        self._latched = torch.zeros((), dtype=torch.bool, device=self.device)

    def found_inf(self, norm: Tensor) -> Tensor:
        """Return 1.0 if a step with this gradient norm must not be applied, else 0.0; float32 scalar on the device."""
        bad = ~norm.isfinite()
        if self.is_latching:
            self._in_a_row = torch.where(bad, self._in_a_row + 1, 0)
            self._skipped = self._skipped + bad
            exhausted = (self._in_a_row > MAX_CONSECUTIVE_SKIPS) | (self._skipped > MAX_SKIPS)
            self._latched = self._latched | ((bad & exhausted) if self.policy == "skip" else bad)
        return (bad | self._latched).float()
