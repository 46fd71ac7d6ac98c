"""Alert rules over a job's metrics, each with its state per job. Pure.

A rule fires once when its condition becomes true, and again only after the condition was false in between.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Annotated, Literal, assert_never

from pydantic import BaseModel, ConfigDict, Field

HALF_LIVES_PER_PLATEAU = 8
"""The half-life of a plateau's mean loss is the rule's steps divided by this."""


class Rule(BaseModel):
    """Base of all rules: frozen and strict, without unknown fields."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    @property
    def key(self) -> str:
        """The rule as text, its key in the database: another threshold is another rule."""
        return self.model_dump_json()


class NonFinite(Rule):
    """Fires at a loss that is not finite."""

    kind: Literal["nonfinite"]


class NoProgress(Rule):
    """Fires if a running job reports no new point for ``minutes``."""

    kind: Literal["no_progress"]
    minutes: float = Field(gt=0, le=10_080)


class Plateau(Rule):
    """Fires if the mean loss has not fallen by ``min_delta`` below its best for ``steps`` steps."""

    kind: Literal["plateau"]
    steps: int = Field(ge=1, le=1_000_000_000)
    min_delta: float = Field(default=0.01, ge=0, le=1_000_000)


class EvalLossBelow(Rule):
    """Fires at a held-out loss below ``value``."""

    kind: Literal["eval_loss_below"]
    value: float = Field(ge=-1_000_000, le=1_000_000)


AnyRule = Annotated[NonFinite | NoProgress | Plateau | EvalLossBelow, Field(discriminator="kind")]


@dataclass(frozen=True)
class Point:
    """A point of the curve with the fields that rules read."""

    step: int
    loss: float | None
    eval_loss: float | None
    nonfinite: bool


@dataclass(frozen=True)
class RuleState:
    """A rule's state for one job, stored as JSON. ``inside``: its condition holds, and it has fired.

    ``total / weight`` is the mean loss at ``step``; ``best`` is its lowest value, at ``best_step``.
    """

    inside: bool = False
    step: int = 0
    total: float = 0.0
    weight: float = 0.0
    best: float | None = None
    best_step: int = 0


@dataclass(frozen=True)
class Firing:
    """One alert: a sentence for people, and ``data`` for programs."""

    message: str
    step: int
    data: dict[str, float | int | None] = field(default_factory=dict)


def advance(rule: AnyRule, state: RuleState, points: Sequence[Point]) -> tuple[RuleState, list[Firing]]:
    """Apply the rule to new points, in the order in which they were reported."""
    firings: list[Firing] = []
    for point in points:
        state, firing = _apply(rule, state, point)
        firings += [firing] if firing is not None else []
    return state, firings


def no_progress(
    rule: NoProgress, state: RuleState, step: int, since: datetime, now: datetime
) -> tuple[RuleState, Firing | None]:
    """Apply the rule to a running job whose last progress was at the time ``since``, at ``step``."""
    minutes = (now - since).total_seconds() / 60
    if minutes < rule.minutes:
        return replace(state, inside=False), None
    if state.inside:
        return state, None
    firing = Firing(f"no progress for {minutes:.3g} min: the last step is {step:,}", step, {"minutes": minutes})
    return replace(state, inside=True), firing


def _apply(rule: AnyRule, state: RuleState, point: Point) -> tuple[RuleState, Firing | None]:
    match rule:
        case NonFinite():
            firing = Firing(f"the loss is not finite at step {point.step:,}", point.step)
            return _on_change(state, point.nonfinite, firing)
        case EvalLossBelow():
            return _eval_loss(rule, state, point)
        case Plateau():
            return _plateau(rule, state, point)
        case NoProgress():
            return replace(state, inside=False), None
        case _:
            assert_never(rule)


def _on_change(state: RuleState, holds: bool, firing: Firing) -> tuple[RuleState, Firing | None]:
    return replace(state, inside=holds), firing if holds and not state.inside else None


def _eval_loss(rule: EvalLossBelow, state: RuleState, point: Point) -> tuple[RuleState, Firing | None]:
    if point.eval_loss is None:
        return state, None
    message = f"the held-out loss is {point.eval_loss:.6g} at step {point.step:,}, below {rule.value:g}"
    firing = Firing(message, point.step, {"eval_loss": point.eval_loss, "value": rule.value})
    return _on_change(state, point.eval_loss < rule.value, firing)


def _plateau(rule: Plateau, state: RuleState, point: Point) -> tuple[RuleState, Firing | None]:
    if point.loss is None or point.nonfinite:
        return state, None
    if point.step <= state.step:
        # The job rolled back: repeated steps are no plateau, so start again.
        state = RuleState(inside=state.inside)
    state = _update_mean(rule, state, point.step, point.loss)
    mean = state.total / state.weight
    if state.best is None or mean < state.best - rule.min_delta:
        inside = state.inside and state.best is None
        return replace(state, best=mean, best_step=point.step, inside=inside), None
    flat_steps = point.step - state.best_step
    values = f"{mean:.6g} at step {point.step:,}, {state.best:.6g} before"
    message = f"the loss has not improved for {flat_steps:,} steps: {values}"
    firing = Firing(message, point.step, {"loss_mean": mean, "best": state.best, "best_step": state.best_step})
    holds = flat_steps >= rule.steps
    return replace(state, inside=state.inside or holds), firing if holds and not state.inside else None


def _update_mean(rule: Plateau, state: RuleState, step: int, loss: float) -> RuleState:
    decay = 0.5 ** (max(1, step - state.step) * HALF_LIVES_PER_PLATEAU / rule.steps)
    return replace(state, step=step, total=decay * state.total + loss, weight=decay * state.weight + 1.0)
