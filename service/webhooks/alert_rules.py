"""When a curve is worth a word: rules over points, each with what it remembers of a job. Pure.

A rule speaks once when its condition comes true, and again only after the condition was false in between.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Annotated, Literal, assert_never

from pydantic import BaseModel, ConfigDict, Field

HALF_LIVES_PER_PLATEAU = 8
"""The half-life of a plateau's mean loss is its steps divided by this."""


class Rule(BaseModel):
    """What all rules have in common: frozen, and nothing that nobody asked for."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    @property
    def key(self) -> str:
        """The rule as text: another threshold is another rule."""
        return self.model_dump_json()


class NonFinite(Rule):
    """A loss that is not finite."""

    kind: Literal["nonfinite"]


class NoProgress(Rule):
    """A running job without a new point for so many minutes."""

    kind: Literal["no_progress"]
    minutes: float = Field(gt=0, le=10_080)


class Plateau(Rule):
    """A mean loss that has not fallen by ``min_delta`` below its best for so many steps."""

    kind: Literal["plateau"]
    steps: int = Field(ge=1, le=1_000_000_000)
    min_delta: float = Field(default=0.01, ge=0, le=1_000_000)


class EvalLossBelow(Rule):
    """A held-out loss under a value."""

    kind: Literal["eval_loss_below"]
    value: float = Field(ge=-1_000_000, le=1_000_000)


AnyRule = Annotated[NonFinite | NoProgress | Plateau | EvalLossBelow, Field(discriminator="kind")]


@dataclass(frozen=True)
class Point:
    """A point of the curve, as far as rules look at it."""

    step: int
    loss: float | None
    eval_loss: float | None
    nonfinite: bool


@dataclass(frozen=True)
class RuleState:
    """What a rule remembers. ``inside``: its condition holds, and was told.

    ``total`` and ``weight`` are those of the mean loss at ``step``; ``best`` is its lowest, at ``best_step``.
    """

    inside: bool = False
    step: int = 0
    total: float = 0.0
    weight: float = 0.0
    best: float | None = None
    best_step: int = 0


@dataclass(frozen=True)
class Firing:
    """What a rule has to say, in one sentence; ``data`` for programs."""

    message: str
    step: int
    data: dict[str, float | int | None] = field(default_factory=dict)


def advance(rule: AnyRule, seen: RuleState, points: Sequence[Point]) -> tuple[RuleState, list[Firing]]:
    """Go over new points, in the order in which they were said."""
    firings: list[Firing] = []
    for point in points:
        seen, firing = _apply(rule, seen, point)
        firings += [firing] if firing is not None else []
    return seen, firings


def no_progress(
    rule: NoProgress, seen: RuleState, step: int, since: datetime, now: datetime
) -> tuple[RuleState, Firing | None]:
    """Look at the clock: the last progress of a running job was at ``since``, at ``step``."""
    minutes = (now - since).total_seconds() / 60
    if minutes < rule.minutes:
        return replace(seen, inside=False), None
    if seen.inside:
        return seen, None
    firing = Firing(f"no progress for {minutes:.3g} min: the last step is {step:,}", step, {"minutes": minutes})
    return replace(seen, inside=True), firing


def _apply(rule: AnyRule, seen: RuleState, point: Point) -> tuple[RuleState, Firing | None]:
    match rule:
        case NonFinite():
            told = Firing(f"the loss is not finite at step {point.step:,}", point.step)
            return _on_change(seen, point.nonfinite, told)
        case EvalLossBelow():
            return _eval_loss(rule, seen, point)
        case Plateau():
            return _plateau(rule, seen, point)
        case NoProgress():
            return replace(seen, inside=False), None
        case _:
            assert_never(rule)


def _on_change(seen: RuleState, holds: bool, told: Firing) -> tuple[RuleState, Firing | None]:
    return replace(seen, inside=holds), told if holds and not seen.inside else None


def _eval_loss(rule: EvalLossBelow, seen: RuleState, point: Point) -> tuple[RuleState, Firing | None]:
    if point.eval_loss is None:
        return seen, None
    message = f"the held-out loss is {point.eval_loss:.6g} at step {point.step:,}, under {rule.value:g}"
    told = Firing(message, point.step, {"eval_loss": point.eval_loss, "value": rule.value})
    return _on_change(seen, point.eval_loss < rule.value, told)


def _plateau(rule: Plateau, seen: RuleState, point: Point) -> tuple[RuleState, Firing | None]:
    if point.loss is None or point.nonfinite:
        return seen, None
    if point.step <= seen.step:
        # The job went back and does these steps again: what is repeated is no stand-still.
        seen = RuleState(inside=seen.inside)
    seen = _update_mean(rule, seen, point.step, point.loss)
    mean = seen.total / seen.weight
    if seen.best is None or mean < seen.best - rule.min_delta:
        inside = seen.inside and seen.best is None
        return replace(seen, best=mean, best_step=point.step, inside=inside), None
    stood = point.step - seen.best_step
    message = f"the loss has stood still for {stood:,} steps: {mean:.6g} at step {point.step:,}, {seen.best:.6g} before"
    told = Firing(message, point.step, {"loss_mean": mean, "best": seen.best, "best_step": seen.best_step})
    holds = stood >= rule.steps
    return replace(seen, inside=seen.inside or holds), told if holds and not seen.inside else None


def _update_mean(rule: Plateau, seen: RuleState, step: int, loss: float) -> RuleState:
    kept = 0.5 ** (max(1, step - seen.step) * HALF_LIVES_PER_PLATEAU / rule.steps)
    return replace(seen, step=step, total=kept * seen.total + loss, weight=kept * seen.weight + 1.0)
