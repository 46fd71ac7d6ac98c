"""What a step with a non-finite gradient does to the run: a pure function of the policy and of what was before."""

from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Literal, assert_never

import torch
from torch import Tensor

Policy = Literal["fail", "skip", "rollback"]

MAX_CONSECUTIVE_SKIPS = 10

MAX_SKIPS = 100

MAX_ROLLBACKS = 3

ORDINARY_SCALE = 1.0

"""Above this loss scale an fp16 overflow of the gradient is the scaler finding its level; at or below it, it is bad."""


class StepDecision(StrEnum):
    """What becomes of a step."""

    APPLIED = "applied"
    OVERFLOWED = "overflowed"
    """The fp16 scaler tried too high a scale: no update, and nothing to speak of."""
    SKIP = "skip"
    ROLL_BACK = "roll_back"
    FAIL = "fail"


@dataclass(frozen=True)
class NonFiniteCounters:
    """Non-finite steps so far; part of every checkpoint, so that a resume does not forget them."""

    in_a_row: int = 0
    skipped: int = 0
    rollbacks: int = 0


def decide_step(
    finite: bool, policy: Policy, before: NonFiniteCounters, loss_scale: float | None, *, losses_finite: bool = True
) -> tuple[StepDecision, NonFiniteCounters]:
    """The verdict on a step, and the count from now on. ``loss_scale`` is the fp16 scaler's during the step.

    ``finite``: the gradient. A loss is not scaled before the backward pass, so one that is not finite is no overflow
    that a lower scale would mend.
    """
    if finite:
        return StepDecision.APPLIED, replace(before, in_a_row=0)
    if losses_finite and loss_scale is not None and loss_scale > ORDINARY_SCALE:
        return StepDecision.OVERFLOWED, before
    match policy:
        case "fail":
            return StepDecision.FAIL, before
        case "skip":
            after = replace(before, in_a_row=before.in_a_row + 1, skipped=before.skipped + 1)
            exhausted = after.in_a_row > MAX_CONSECUTIVE_SKIPS or after.skipped > MAX_SKIPS
            return (StepDecision.FAIL if exhausted else StepDecision.SKIP), after
        case "rollback":
            after = replace(before, rollbacks=before.rollbacks + 1)
            return (StepDecision.FAIL if after.rollbacks > MAX_ROLLBACKS else StepDecision.ROLL_BACK), after
        case _:
            assert_never(policy)


def nonfinite_message(step: int, rows: tuple[int, ...], bad_losses: tuple[int, ...]) -> str:
    """Names the step and the rows of the corpus, those with a non-finite loss where that is known."""
    if bad_losses:
        return f"the loss is not finite at step {step}, in {_named(bad_losses)}"
    return f"the gradient is not finite at step {step}, over {_named(rows)}; every loss was finite"


def _named(rows: tuple[int, ...]) -> str:
    shown = ", ".join(map(str, rows[:8]))
    more = f" and {len(rows) - 8} more" if len(rows) > 8 else ""
    return f"row{'s' if len(rows) > 1 else ''} {shown}{more}"


@dataclass
class DeviceNonFiniteGuard:
    """Counts on the device as `gate.judge` does on the host, so that both stop at the same step.

    ``holding`` false: it holds bad steps alone. So it must be with a loss scale, whose overflows are no trouble, and
    whose steps are read one by one.
    """

    policy: Policy
    is_latching: bool
    device: torch.device

    def __post_init__(self) -> None:
        self.reset(NonFiniteCounters())

    def reset(self, before: NonFiniteCounters) -> None:
        """Apply steps again, after so much trouble."""
        self._in_a_row = torch.tensor(before.in_a_row, device=self.device)
        self._skipped = torch.tensor(before.skipped, device=self.device)
        self._held = torch.zeros((), dtype=torch.bool, device=self.device)

    def found_inf(self, norm: Tensor) -> Tensor:
        """1.0 where the step with this gradient norm must not be applied, else 0.0: float32 scalar on the device."""
        bad = ~norm.isfinite()
        if self.is_latching:
            self._in_a_row = torch.where(bad, self._in_a_row + 1, 0)
            self._skipped = self._skipped + bad
            exhausted = (self._in_a_row > MAX_CONSECUTIVE_SKIPS) | (self._skipped > MAX_SKIPS)
            self._held = self._held | ((bad & exhausted) if self.policy == "skip" else bad)
        return (bad | self._held).float()
