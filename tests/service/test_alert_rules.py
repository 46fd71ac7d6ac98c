"""Alert rules over metrics fire once for each crossing. Pure."""

import math
import random
from datetime import UTC, datetime, timedelta

import pytest
from pydantic import TypeAdapter

from trainyard.service.webhooks.alert_rules import (
    AnyRule,
    EvalLossBelow,
    NonFinite,
    NoProgress,
    Plateau,
    Point,
    RuleState,
    advance,
    no_progress,
)

NOW = datetime(2026, 1, 1, tzinfo=UTC)


def curve(*losses: float | None, every: int = 1, start: int = 0) -> list[Point]:
    return [
        Point(
            start + (number + 1) * every, loss if loss is not None and math.isfinite(loss) else None, None, loss is None
        )
        for number, loss in enumerate(losses)
    ]


def evaluated(*values: float | None) -> list[Point]:
    return [Point(number + 1, 3.0, value, False) for number, value in enumerate(values)]


def steps(rule: AnyRule, points: list[Point]) -> list[int]:
    return [firing.step for firing in advance(rule, RuleState(), points)[1]]


def test_a_loss_that_is_not_finite_is_told_once_until_it_was_finite_again() -> None:
    rule = NonFinite(kind="nonfinite")
    assert steps(rule, curve(3.0, None, None, None, 2.9, 2.8, None)) == [2, 7]
    assert steps(rule, curve(3.0, 2.0)) == []


def test_a_held_out_loss_under_a_value() -> None:
    rule = EvalLossBelow(kind="eval_loss_below", value=2.5)
    points = evaluated(3.0, None, 2.5, 2.4, None, 2.3, 2.6, None, 2.49)
    assert steps(rule, points) == [4, 9], "2.5 is not under 2.5, and points without one change nothing"
    assert "2.4" in advance(rule, RuleState(), points)[1][0].message


def test_a_plateau() -> None:
    rule = Plateau(kind="plateau", steps=100, min_delta=0.01)
    falling = [4.0 - 0.01 * n for n in range(200)]
    assert steps(rule, curve(*falling)) == []
    flat = [falling[-1]] * 400
    told = steps(rule, curve(*falling, *flat))
    assert len(told) == 1
    assert 200 + 100 <= told[0] <= 200 + 200, "a hundred steps after the smoothed loss stopped falling"
    again = [falling[-1] - 0.01 * n for n in range(150)]
    assert len(steps(rule, curve(*falling, *flat, *again, *[again[-1]] * 400))) == 2


def test_noise_is_no_progress_and_hides_none() -> None:
    chance = random.Random(7)
    rule = Plateau(kind="plateau", steps=2000, min_delta=0.01)
    noisy = [2.0 + chance.gauss(0, 0.05) for _ in range(600)]
    assert len(steps(rule, curve(*noisy, every=10))) == 1
    falling = [3.0 - 0.0015 * n + chance.gauss(0, 0.05) for n in range(600)]
    assert steps(rule, curve(*falling, every=10)) == []


def test_a_plateau_looks_at_steps_and_not_at_points() -> None:
    rule = Plateau(kind="plateau", steps=1000, min_delta=0.0)
    assert steps(rule, curve(2.0, *[2.5] * 50, every=10)) == []
    assert len(steps(rule, curve(2.0, *[2.5] * 50, every=100))) == 1


def test_a_job_that_goes_back_has_not_stood_still() -> None:
    rule = Plateau(kind="plateau", steps=50, min_delta=0.01)
    losses = [4.0 - 0.05 * min(n, 40) for n in range(1, 200)]
    seen, firings = advance(rule, RuleState(), curve(*losses[:80]))
    assert firings == [], "forty steps flat"
    seen, firings = advance(rule, seen, curve(*losses[10:80], start=10))
    assert firings == [], "and the same forty steps again"
    seen, firings = advance(rule, seen, curve(*losses[80:150], start=80))
    assert len(firings) == 1
    seen, firings = advance(rule, seen, curve(*losses[145:199], start=145))
    assert firings == [], "told already"


def test_points_that_are_not_finite_are_no_part_of_a_plateau() -> None:
    rule = Plateau(kind="plateau", steps=10)
    assert steps(rule, curve(2.0, *[None] * 100)) == []


def test_it_does_not_matter_in_which_pieces_a_curve_comes() -> None:
    chance = random.Random(20261125)
    points = [
        Point(step, None if chance.random() < 0.05 else 2 + chance.random(), chance.choice([None, 2.4, 2.6]), False)
        for step in range(1, 500)
    ]
    points = [Point(p.step, p.loss, p.eval_loss, p.loss is None) for p in points]
    for rule in (
        NonFinite(kind="nonfinite"),
        EvalLossBelow(kind="eval_loss_below", value=2.5),
        Plateau(kind="plateau", steps=40, min_delta=0.05),
    ):
        whole = steps(rule, points)
        assert whole
        seen, told, at = RuleState(), [], 0
        while at < len(points):
            size = chance.randint(1, 60)
            seen, firings = advance(rule, seen, points[at : at + size])
            told += [firing.step for firing in firings]
            at += size
        assert told == whole


def test_no_progress() -> None:
    rule = NoProgress(kind="no_progress", minutes=30)
    seen, told = no_progress(rule, RuleState(), 12, NOW, NOW + timedelta(minutes=29))
    assert told is None
    seen, told = no_progress(rule, seen, 12, NOW, NOW + timedelta(minutes=30))
    assert told is not None
    assert "12" in told.message
    seen, told = no_progress(rule, seen, 12, NOW, NOW + timedelta(hours=9))
    assert told is None, "once"
    seen, _ = advance(rule, seen, curve(2.0))
    assert no_progress(rule, seen, 13, NOW, NOW + timedelta(minutes=31))[1] is not None, (
        "a new point, and silence again"
    )


def test_a_clock_that_goes_back_tells_nothing() -> None:
    rule = NoProgress(kind="no_progress", minutes=1)
    assert no_progress(rule, RuleState(), 12, NOW, NOW - timedelta(hours=1)) == (RuleState(), None)


@pytest.mark.parametrize(
    "rule",
    [
        {"kind": "plateau"},
        {"kind": "plateau", "steps": 0},
        {"kind": "no_progress", "minutes": 0},
        {"kind": "no_progress", "minutes": float("nan")},
        {"kind": "eval_loss_below", "value": "2"},
        {"kind": "other"},
        {"kind": "nonfinite", "more": 1},
    ],
)
def test_what_is_no_rule(rule: dict[str, object]) -> None:
    adapter: TypeAdapter[AnyRule] = TypeAdapter(AnyRule)
    with pytest.raises(ValueError):
        adapter.validate_python(rule)


def test_another_threshold_is_another_rule() -> None:
    assert EvalLossBelow(kind="eval_loss_below", value=2.5).key != EvalLossBelow(kind="eval_loss_below", value=2.4).key
