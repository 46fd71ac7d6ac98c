"""The smoothed loss, compared with a slow fit of every point by numpy, which knows nothing of cells, sums or zoom."""

import math
import random
from typing import Any

import numpy as np
import pytest

from tests.service.harness import ServiceHarness
from tests.service.test_checkpoints import write_checkpoint
from tests.service.test_rollups import random_points, seal_small
from trainyard.service.metrics.downsampling import Aggregate, aggregate_of, to_buckets
from trainyard.service.metrics.smoothing import auto_width, cell_width, smooth, to_cells

NOISE = 0.2


def slow(points: list[Aggregate], step: int, width: float) -> float:
    """Return the weighted least-squares line through all finite points, at ``step``: up to twice as wide at the end."""
    finite = [point for point in points if point.finite_step is not None]
    steps = np.array([point.step for point in finite], dtype=float)
    losses = np.array([point.loss for point in finite], dtype=float)
    from_end = (points[-1].step - step) / width
    kernel = np.exp(-0.5 * ((steps - step) / (width if from_end > 2 else width * (2 - from_end / 2))) ** 2)
    # polyfit squares its weights.
    slope, level = np.polyfit(steps - step, losses, 1, w=np.sqrt(kernel))
    assert math.isfinite(slope)
    return float(level)


def noisy_points(dice: random.Random, count: int, stride: int = 1) -> list[Aggregate]:
    """A falling loss with noise, a spike, and points that are not finite."""
    steps = range(stride, stride * count + 1, stride)
    losses = [3 + 5 / (1 + 20 * step / steps[-1]) + dice.gauss(0, NOISE) for step in steps]
    losses[count // 3] += 4.0
    finite = [None if dice.random() < 0.05 else loss for loss in losses]
    return [aggregate_of(step, loss, 1) for step, loss in zip(steps, finite, strict=True)]


def smoothed(points: list[Aggregate], steps: list[int], width: float) -> list[float]:
    values = smooth(to_cells(points, width), steps, width, points[-1].step)
    return [value for value in values if value is not None]


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("width", [3.0, 10.0, 50.0, 200.0])
def test_smoothed_line_is_that_of_a_slow_fit(seed: int, width: float) -> None:
    dice = random.Random(seed)
    points = noisy_points(dice, 1000, dice.choice((1, 3)))
    steps = [point.step for point in points if point.finite_step is not None][:: dice.choice((7, 13))]
    steps.append(max(point.step for point in points if point.finite_step is not None))
    expected = [slow(points, step, width) for step in steps]
    # The points of a cell are summed, and those beyond four widths are left out.
    apart = np.abs(np.array(smoothed(points, steps, width)) - expected)
    assert apart.max() < 0.25 * NOISE, (seed, width)
    assert apart.mean() < 0.03 * NOISE, (seed, width)


@pytest.mark.parametrize("width", [1.0, 10.0, 50.0, 200.0, 1000.0])
def test_an_even_fall_is_reproduced_up_to_both_ends(width: float) -> None:
    points = [aggregate_of(step, 10 - step / 500, 1) for step in range(1, 3001)]
    steps = [1, 2, 300, 1501, 2950, 2999, 3000]
    assert smoothed(points, steps, width) == pytest.approx([10 - step / 500 for step in steps], abs=1e-6)
    behind = [row["loss_ema"] - row["loss"] for row in to_buckets(points, 1, 50)][-1]
    assert behind > 0.1, "the running mean is above the newest points"


def test_newest_loss_and_smoothed_loss_agree_at_the_end_of_a_settled_run() -> None:
    dice = random.Random(5)
    losses = [3 + 5 * math.exp(-step / 200) for step in range(1, 4001)]
    points = [aggregate_of(step, loss + dice.gauss(0, 0.01), 1) for step, loss in enumerate(losses, start=1)]
    for width in (10.0, 50.0, 200.0):
        [last] = smoothed(points, [4000], width)
        assert last == pytest.approx(losses[-1], abs=0.012), width
        # Two widths before the end, the points are on both sides.
        [inside] = smoothed(points, [4000 - int(2 * width)], width)
        assert inside == pytest.approx(losses[-1 - int(2 * width)], abs=0.005), width


def test_values_that_are_not_finite_are_skipped() -> None:
    points = [aggregate_of(step, 2.0 if step < 50 or step > 150 else None, 1) for step in range(1, 201)]
    assert smooth(to_cells(points, 10.0), [20, 49, 180], 10.0, 200) == pytest.approx([2.0, 2.0, 2.0])
    assert smooth(to_cells(points, 10.0), [100], 10.0, 200) == [None], "no point within four widths"
    assert smooth(to_cells([], 10.0), [1], 10.0, 1) == [None]
    [single] = smooth(to_cells([aggregate_of(7, 3.5, 1)], 200.0), [7], 200.0, 7)
    assert single == 3.5
    ragged = [aggregate_of(1, 5.0, 1), aggregate_of(2, 4.0, 1), *(aggregate_of(n, None, 1) for n in range(3, 40))]
    [last] = smooth(to_cells(ragged, 10.0), [39], 10.0, 39)
    assert last == pytest.approx(4.0), "the line is not continued beyond the finite points"


@pytest.mark.parametrize("width", [5e-324, 1e-200, 1e-155, 1e-9, 0.1])
def test_a_kernel_narrower_than_a_step_changes_nothing(width: float) -> None:
    points = [aggregate_of(step, loss, 1) for step, loss in ((1, 5.0), (2, 4.0), (3, 4.5), (9, 3.0))]
    assert smooth(to_cells(points, width), [1, 2, 3, 9], width, 9) == [5.0, 4.0, 4.5, 3.0]


def test_widths() -> None:
    assert [auto_width(last) for last in (0, 80, 250, 1000, 4_999, 40_000, 10**6, 10**9)] == [
        1, 1, 2, 10, 20, 200, 1000, 1000,
    ]  # fmt: skip
    assert [cell_width(width) for width in (0.1, 1, 3, 6, 10, 50, 200, 1000)] == [1, 1, 1, 2, 2, 16, 64, 256]
    for width in (7.0, 33.0, 480.0):
        assert width / 6 <= cell_width(width) <= width / 3


def add_points(rig: ServiceHarness, points: list[Aggregate]) -> str:
    job_id, attempt = rig.running(steps=10_000)
    for point in points:
        attempt.metric(point.step, loss=point.loss, nonfinite=point.loss is None)
    rig.ship(attempt)
    return job_id


def test_the_same_at_every_zoom(any_rig: ServiceHarness, monkeypatch: pytest.MonkeyPatch) -> None:
    seal_small(monkeypatch)
    dice = random.Random(12)
    points = noisy_points(dice, 700)
    job_id = add_points(any_rig, points)
    for width in (3, 10, 24, 100):
        line: dict[int, float | None] = {}
        for asked in (
            {"max_points": 1000},
            {"max_points": 40},
            {"max_points": 60, "after_step": 211, "until_step": 590},
        ):
            page = any_rig.get(f"/jobs/{job_id}/metrics", smooth_width=width, **asked)
            assert page["smooth_width"] == width
            for row in page["data"]:
                value = row["loss_smooth"]
                assert value is None or value == pytest.approx(line.setdefault(row["step"], value), rel=1e-9)
        expected = {step: slow(points, step, width) for step, value in list(line.items())[::9] if value is not None}
        apart = [abs((line[step] or 0) - value) for step, value in expected.items()]
        assert max(apart) < 0.25 * NOISE, width


def test_smoothed_loss_over_the_api(any_rig: ServiceHarness) -> None:
    job_id = add_points(any_rig, [aggregate_of(s, None if s == 9 else 5 - s / 100, 1) for s in range(1, 201)])
    address = f"/jobs/{job_id}/metrics"
    plain = any_rig.get(address, max_points=50)
    assert "loss_smooth" not in plain["data"][0]
    assert "smooth_width" not in plain
    auto = any_rig.get(address, max_points=1000, smooth_width="auto")
    assert auto["smooth_width"] == 2.0
    by_step = {row["step"]: row for row in auto["data"]}
    assert by_step[9]["loss_smooth"] is None
    assert by_step[200]["loss_smooth"] == pytest.approx(3.0)
    none = any_rig.get(address, max_points=1000, smooth_width=0)["data"]
    assert all(row["loss_smooth"] == row["loss"] for row in none)
    tiny = any_rig.get(address, max_points=1000, smooth_width=1e-200)["data"]
    assert [row["loss_smooth"] for row in tiny] == [row["loss"] for row in none]
    asked: dict[str, Any] = {"params": {"max_points": 9, "smooth_width": 7}, "headers": {"Accept": "text/csv"}}
    assert any_rig.client.get(address, **asked).text.split("\r\n")[0].endswith(",nonfinite,loss_smooth")
    for wrong in ("wide", "-1", "nan", "inf"):
        assert any_rig.client.get(address, params={"max_points": 9, "smooth_width": wrong}).status_code == 422


def test_smoothed_loss_of_one_attempt_and_of_a_fork(any_rig: ServiceHarness) -> None:
    rig = any_rig
    job_id, first = rig.running(steps=100, training={"max_steps": 100})
    for step in range(1, 101):
        first.metric(step, loss=8 - step / 50)
    write_checkpoint(rig.checkpoint(job_id, first, 60))
    rig.ship(first)
    rig.exit(first, "completed", step=100)
    fork = rig.client.post(f"/jobs/{job_id}/fork", json={"step": 60}).json()["id"]
    own = rig.next_attempt(fork, 1, start_step=60, steps=200)
    for step in range(61, 161):
        own.metric(step, loss=8 - step / 50)
    rig.ship(own)
    joined = rig.get(f"/jobs/{fork}/metrics", max_points=1000, smooth_width=20, lineage=True)["data"]
    for row in joined:
        assert row["loss_smooth"] == pytest.approx(8 - row["step"] / 50), "no break where the fork starts"
    alone = rig.get(f"/jobs/{job_id}/metrics", max_points=10, smooth_width=20, attempt=1)["data"]
    assert alone[-1]["loss_smooth"] == pytest.approx(6.0)


def test_random_points_have_finite_smoothed_losses() -> None:
    for seed in range(20):
        dice = random.Random(seed)
        points = random_points(dice, dice.randrange(1, 60), dice.choice((1, 3, 100)))
        finite = [point.step for point in points if point.finite_step is not None]
        for width in (1.0, 10.0, 1000.0):
            values = smoothed(points, finite, width)
            assert len(values) == len(finite), seed
            assert all(-10 < value < 20 for value in values), (seed, values)
