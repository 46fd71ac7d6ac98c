import math

import pytest

from tests.client.fake_service import metric
from trainyard.client.cli.watch.curve import MAX_POINTS, Curve, Ema


def test_ema_is_the_published_formula() -> None:
    ema, numerator, denominator, before = Ema(50), 0.0, 0.0, 0
    for step, value in ((10, 8.0), (20, 7.0), (60, 5.0), (61, 4.0)):
        decay = 0.5 ** ((step - before) / 50) if before else 1.0
        numerator, denominator, before = decay * numerator + value, decay * denominator + 1, step
        ema.add(step, value)
        assert ema.value == pytest.approx(numerator / denominator, rel=1e-12)
    assert Ema().value is None


def test_ema_of_a_constant_is_the_constant() -> None:
    ema = Ema()
    for step in range(1, 500):
        ema.add(step, 2.5)
    assert ema.value == pytest.approx(2.5, rel=1e-12)


def test_non_finite_losses_do_not_change_the_average() -> None:
    curve = Curve()
    curve.extend([metric(1, 4.0), metric(2, None), metric(3, 4.0)])
    assert curve.ema == pytest.approx(4.0)
    assert curve.losses == [4.0, 4.0]
    assert curve.step == 3


def test_the_newest_evaluation_stays() -> None:
    curve = Curve()
    curve.extend([metric(1, eval_loss=3.5), metric(2)])
    assert curve.last_eval == metric(1, eval_loss=3.5)


def test_rewind_forgets_what_a_new_attempt_does_again() -> None:
    curve, straight = Curve(), Curve()
    curve.extend([metric(step, 9.0 - step) for step in (1, 2, 3, 4)])
    curve.rewind(2)
    assert (curve.step, curve.losses) == (2, [8.0, 7.0])
    straight.extend([metric(step, 9.0 - step) for step in (1, 2, 3, 4)])
    curve.extend([metric(3, 6.0), metric(4, 5.0)])
    assert math.isclose(curve.ema or 0, straight.ema or 1, rel_tol=1e-12)


def test_memory_is_bounded() -> None:
    curve = Curve()
    curve.extend(metric(step) for step in range(1, MAX_POINTS + 500))
    assert len(curve.points) == MAX_POINTS
    assert curve.points[0][0] == 500
