import math
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from trainyard.contract.lr_schedule import LRSchedule, lr_at
from trainyard.contract.spec import JobSpec
from trainyard.worker.data.sampler import StepSampler
from trainyard.worker.training.schedule import StepIntervals, is_finished, last_step
from trainyard.worker.training.state import TrainProgress


def spec(**groups: object) -> JobSpec:
    return JobSpec.model_validate({"data": {"data_path": "/x"}, **groups})


def minimind(step: int, steps: int, peak: float) -> float:
    return peak * (0.1 + 0.45 * (1 + math.cos(math.pi * step / steps)))


def test_without_warm_up_the_rate_is_minimind_s() -> None:
    for step in range(1, 1001):
        assert lr_at(step, 1000, 5e-4) == pytest.approx(minimind(step, 1000, 5e-4), rel=0, abs=1e-12)


def test_the_ends_of_the_cosine() -> None:
    assert lr_at(0, 100, 1.0) == pytest.approx(1.0, abs=1e-15)
    assert lr_at(50, 100, 1.0, min_ratio=0.2) == pytest.approx(0.6, abs=1e-15)
    assert lr_at(100, 100, 1.0) == pytest.approx(0.1, abs=1e-15)


def test_warm_up_is_linear_and_meets_the_peak() -> None:
    rates = [lr_at(step, 110, 2.0, warmup=10) for step in range(1, 12)]
    assert rates[:10] == pytest.approx([0.2 * step for step in range(1, 11)])
    assert rates[10] < 2.0
    assert lr_at(110, 110, 2.0, warmup=10) == pytest.approx(0.2)


def test_linear_and_constant() -> None:
    assert lr_at(25, 100, 1.0, min_ratio=0.0, kind="linear") == pytest.approx(0.75)
    assert lr_at(100, 100, 1.0, min_ratio=0.1, kind="linear") == pytest.approx(0.1)
    assert lr_at(99, 100, 3.0, kind="constant") == 3.0
    with pytest.raises(ValueError, match="sawtooth"):
        lr_at(1, 2, 1.0, kind="sawtooth")


@pytest.mark.parametrize("kind", ["cosine", "linear", "sqrt"])
def test_after_the_estimated_end_the_rate_is_the_last_one(kind: str) -> None:
    assert lr_at(15, 10, 1e-3, kind=kind) == lr_at(10, 10, 1e-3, kind=kind) == pytest.approx(1e-4)


def test_the_spec_s_schedule() -> None:
    training = spec(training={"learning_rate": 0.01, "warmup_steps": 4, "min_lr_ratio": 0.5}).training
    rate = LRSchedule.from_spec(training, 20)
    assert rate.at(2) == pytest.approx(0.005)
    assert rate.at(20) == pytest.approx(0.005)
    assert rate.at(12) == lr_at(12, 20, 0.01, 0.5, 4)


SHAPES: dict[str, Callable[[float], float]] = {
    "linear": lambda done: 1 - done,
    "sqrt": lambda done: 1 - math.sqrt(done),
    "cosine": lambda done: (1 + math.cos(math.pi * done)) / 2,
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    ("given", "length"),
    [({"decay_steps": 30}, 30), ({"decay_fraction": 0.5}, 60), ({}, 24), ({"decay_steps": 118}, 110)],
)
@pytest.mark.parametrize("base", [0, 100])
def test_wsd_warms_up_is_stable_and_decays(shape: str, given: dict[str, Any], length: int, base: int) -> None:
    training = {"lr_scheduler": "wsd", "decay_shape": shape, "learning_rate": 0.02, "warmup_steps": 10}
    schedule = LRSchedule.from_spec(
        spec(training={**training, "min_lr_ratio": 0.1, **given}).training, base + 120, base
    )
    for step in range(1, 121):
        done = (step - (120 - length)) / length
        expected = 0.02 * (step / 10 if step < 10 else 1 if done <= 0 else 0.1 + 0.9 * SHAPES[shape](done))
        assert schedule.at(base + step) == pytest.approx(expected, rel=0, abs=1e-12)


@pytest.mark.parametrize("shape", SHAPES)
def test_wsd_continues_stable_or_decays_on_from_its_rate(shape: str) -> None:
    first = LRSchedule(1.0, 0.1, 100, 10, "wsd", decay_steps=40, decay_shape=shape)
    assert first.continuations(60) == [], "until the decay the rate does not depend on the length"
    longer = replace(first, steps=200, continued_at=tuple(first.continuations(80)))
    assert longer.continued_at == ((80, 100),)
    assert [longer.at(step) for step in range(81)] == [first.at(step) for step in range(81)]
    present = 0.1 + 0.9 * SHAPES[shape](0.5)
    for step in range(80, 201):
        expected = 0.1 + (present - 0.1) * SHAPES[shape]((step - 80) / 120)
        assert longer.at(step) == pytest.approx(expected, rel=0, abs=1e-12)


@pytest.mark.parametrize("kind", ["cosine", "linear", "constant", "wsd"])
@pytest.mark.parametrize("steps", [1, 150, 200, 201, 100_000])
@pytest.mark.parametrize("first", [1, 60])
def test_a_curve_has_at_most_200_points_and_those_where_it_bends(kind: str, steps: int, first: int) -> None:
    warmup = steps // 10
    schedule = LRSchedule(1.0, 0.1, steps, warmup, kind, decay_steps=max(1, steps // 4))
    curve = schedule.curve(first)
    there = max(0, steps - first + 1)
    assert min(190, there) <= len(curve) <= min(200, there)
    assert all(rate == schedule.at(step) for step, rate in curve)
    found = [step for step, _ in curve]
    assert found == sorted(set(found))
    if steps >= first:
        assert (found[0], found[-1]) == (first, steps)
        bends = {warmup, *([steps - steps // 4] if kind == "wsd" else [])}
        assert {step for step in bends if first <= step} <= set(found)


@pytest.mark.parametrize("kind", ["cosine", "linear", "constant"])
@pytest.mark.parametrize("base", [0, 100])
def test_a_continued_schedule_never_jumps_and_keeps_what_was_trained(kind: str, base: int) -> None:
    first = LRSchedule(1.0, 0.1, 20, warmup=4, kind=kind, base_step=base)
    second = replace(first, steps=50, continued_at=tuple(first.continuations(base + 8)))
    third = replace(second, steps=80, continued_at=tuple(second.continuations(base + 30)))
    assert third.continued_at == ((base + 8, base + 20), (base + 30, base + 50))
    rates = [third.at(base + step) for step in range(81)]
    assert rates[:9] == [first.at(base + step) for step in range(9)]
    assert rates[9:31] == [second.at(base + step) for step in range(9, 31)]
    assert max(abs(a - b) for a, b in pairwise(rates[4:])) < 0.06, "no jump"
    assert all(a >= b for a, b in pairwise(rates[4:])), "no rise"
    assert rates[80] == pytest.approx(0.1 if kind != "constant" else 1.0)


def test_a_schedule_continued_at_its_end_stays_at_the_lowest_rate() -> None:
    ended = LRSchedule(1.0, 0.0, 20)
    longer = replace(ended, steps=40, continued_at=tuple(ended.continuations(20)))
    assert [longer.at(step) for step in (20, 21, 40)] == pytest.approx([0.0, 0.0, 0.0], abs=1e-15)


def test_a_run_that_goes_back_before_a_continuation_forgets_it() -> None:
    once = LRSchedule(1.0, 0.1, 60, continued_at=((30, 40),))
    assert once.continuations(10) == [(10, 40)], "step 10 was trained as part of 40 steps"
    assert once.continuations(50) == [(30, 40), (50, 60)]
    assert replace(once, warmup=20).continuations(10) == [], "the warm-up does not depend on the length"


def test_the_spec_s_continuations_are_used() -> None:
    training = JobSpec.model_validate_json(
        '{"data": {"data_path": "/x"}, "training": {"continued_at": [[8, 20]], "learning_rate": 1.0}}'
    ).training
    assert LRSchedule.from_spec(training, 50).at(9) == LRSchedule(1.0, 0.1, 50, continued_at=((8, 20),)).at(9)


@pytest.mark.parametrize("base", [0, 4])
def test_the_run_has_its_epochs_unless_max_steps_is_given(base: int) -> None:
    sampler = StepSampler(rows=13, global_batch=2, seed=1)
    for training, steps in (({"epochs": 3}, 21), ({"epochs": 3, "max_steps": 5}, 5)):
        progress = TrainProgress(step=base, base_step=base)
        assert last_step(spec(training=training).training, progress, sampler, np.ones_like) == base + steps
        assert not is_finished(spec(training=training).training, progress, 7)
        assert not is_finished(spec(training=training).training, replace(progress, step=base + steps - 1), 7)
        assert is_finished(spec(training=training).training, replace(progress, step=base + steps), 7)


def test_a_line_is_due_at_the_interval_at_evaluations_and_at_the_end() -> None:
    calendar = StepIntervals(steps=25, log_interval=10, save_interval=8, eval_interval=12)
    assert [step for step in range(1, 26) if calendar.is_log_step(step)] == [10, 12, 20, 24, 25]
    assert [step for step in range(1, 26) if calendar.is_save_step(step)] == [8, 16, 24, 25]
    assert [step for step in range(1, 26) if calendar.is_eval_step(step)] == [12, 24, 25]


def test_a_run_evaluates_at_saves_unless_an_interval_is_given() -> None:
    by_save = StepIntervals.from_spec(spec(checkpoint={"save_interval": 5}), 11, evaluates=True)
    assert [step for step in range(1, 12) if by_save.is_eval_step(step)] == [5, 10, 11]
    own = StepIntervals.from_spec(
        spec(checkpoint={"save_interval": 5}, reporting={"eval_interval": 4}), 11, evaluates=True
    )
    assert [step for step in range(1, 12) if own.is_eval_step(step)] == [4, 8, 11]
    never = StepIntervals.from_spec(spec(), 11, evaluates=False)
    assert not any(never.is_eval_step(step) for step in range(1, 12))


@pytest.mark.parametrize(("steps", "interval"), [(1, 1), (7, 1), (250, 2), (94_000, 940)])
def test_without_a_log_interval_a_curve_has_about_a_hundred_points(steps: int, interval: int) -> None:
    spec = JobSpec.model_validate({"data": {"data_path": "/x"}})
    assert spec.reporting.log_interval is None
    intervals = StepIntervals.from_spec(spec, steps, evaluates=False)
    assert intervals.log_interval == interval
    points = sum(intervals.is_log_step(step) for step in range(1, steps + 1))
    assert min(steps, 100) <= points <= 126
