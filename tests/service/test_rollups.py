"""Rollups compared with a slow computation from every point, also while the curve changes."""

import math
import random
from collections.abc import Iterable, Iterator
from itertools import groupby
from typing import Any

import pytest
from sqlalchemy import func, insert, select

from tests.service.harness import ServiceHarness
from tests.work import count_calls
from trainyard.contract.status import Reason
from trainyard.service.clock import utc_now
from trainyard.service.db.models import MetricRollupRow, MetricRow
from trainyard.service.jobs import repository as jobs
from trainyard.service.metrics import downsampling, rollups, store
from trainyard.service.metrics.downsampling import (
    Aggregate,
    RollupBucket,
    aggregate,
    aggregate_of,
)

NUMBERS = ("loss", "loss_mean", "loss_min", "loss_max", "loss_ema")


def same(fast: list[dict[str, Any]], slow: list[dict[str, Any]]) -> None:
    assert len(fast) == len(slow)
    for ours, theirs in zip(fast, slow, strict=True):
        assert {k: v for k, v in ours.items() if k not in NUMBERS} == {
            k: v for k, v in theirs.items() if k not in NUMBERS
        }
        for name in NUMBERS:
            assert ours[name] == (pytest.approx(theirs[name], rel=1e-9) if theirs[name] is not None else None), name


def buckets(points: Iterable[Aggregate], wide: int, half_life: float) -> Iterator[dict[str, Any]]:
    """The rows by their definition, from single points: what the sums are held against."""
    total = weight = 0.0
    before: int | None = None
    for _, found in groupby(points, key=lambda point: point.step // wide):
        bucket = list(found)
        finite = [point for point in bucket if point.loss is not None and math.isfinite(point.loss)]
        for step, loss in ((point.step, point.loss or 0.0) for point in finite):
            decay = 0.5 ** ((step - before) / half_life) if before is not None else 0.0
            total, weight, before = decay * total + loss, decay * weight + 1.0, step
        losses = [point.loss for point in finite if point.loss is not None]
        yield {
            "first_step": bucket[0].step,
            "step": bucket[-1].step,
            "attempt": bucket[-1].attempt,
            "count": len(bucket),
            "loss": bucket[-1].loss,
            "loss_mean": math.fsum(losses) / len(losses) if losses else None,
            "loss_min": min(losses, default=None),
            "loss_max": max(losses, default=None),
            "loss_ema": total / weight if losses else None,
            "nonfinite_count": len(bucket) - len(losses),
            "nonfinite": bucket[-1].loss is None,
        }


def random_points(dice: random.Random, count: int, stride: int) -> list[Aggregate]:
    losses = [None if dice.random() < 0.05 else dice.uniform(0, 10) for _ in range(count)]
    return [aggregate_of(1 + stride * index, loss, 1) for index, loss in enumerate(losses)]


@pytest.mark.parametrize("seed", range(8))
def test_sums_of_stretches_are_what_the_points_give(seed: int) -> None:
    dice = random.Random(seed)
    points = random_points(dice, 700, dice.choice((1, 3, 100)))
    for half_life in (10, 50, 200, 1000):
        fine = aggregate((RollupBucket.of(p.step, p.loss, p.attempt) for p in points), 64)
        index = downsampling.HALF_LIVES.index(half_life)
        for wide in (64, 1024):
            stretches = aggregate([RollupBucket(**vars(s)) for s in fine], wide)
            parts = [downsampling.Aggregate._make([*list(vars(s).values())[:10], s.totals[index], s.weights[index]])
                     for s in stretches]  # fmt: skip
            same(list(downsampling.to_buckets(parts, wide, half_life)), list(buckets(points, wide, half_life)))
        same(list(downsampling.to_buckets(points, 64, half_life)), list(buckets(points, 64, half_life)))


def test_what_is_not_finite_leaves_no_mark() -> None:
    points = [
        aggregate_of(1, None, 1),
        aggregate_of(2, math.inf, 1),
        aggregate_of(3, 2.0, 1),
        aggregate_of(200, None, 2),
    ]
    stretches = aggregate((RollupBucket.of(p.step, p.loss, p.attempt) for p in points), 64)
    assert [(s.count, s.nonfinite, s.finite_step, s.loss_min) for s in stretches] == [
        (3, 2, 3, 2.0),
        (1, 1, None, None),
    ]
    assert list(downsampling.to_buckets([], 64, 50)) == []


def seal_small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything at a twentieth of its size, so that a short run goes through all of it."""
    monkeypatch.setattr(rollups, "LEVELS", (4, 16, 64))
    monkeypatch.setattr(rollups, "FINEST", 4)
    monkeypatch.setattr(rollups, "ROLLUP_EVERY", 16)
    monkeypatch.setattr(rollups, "MAX_POINTS", 50)


def answers_agree(rig: ServiceHarness, job_id: str) -> None:
    with rig.database.read() as session:
        points = list(store.points(session, job_id, None))
        last = store.last_step(session, job_id, None)
    for max_points in (1, 3, 10, 40):
        for half_life in (10, 50, 7):
            page = rig.get(f"/jobs/{job_id}/metrics", max_points=max_points, ema_half_life=half_life)
            assert last // page["resolution"] + 1 <= max_points
            same(page["data"], list(buckets(points, page["resolution"], half_life)))


@pytest.mark.parametrize("seed", range(4))
def test_a_random_life_of_a_curve(any_rig: ServiceHarness, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Attempts that begin anywhere before, rollbacks within them, batches of any size, points that are not finite."""
    seal_small(monkeypatch)
    dice = random.Random(seed)
    rig = any_rig
    job_id = rig.submit(resources={"max_restarts": 0})
    reached = 0
    for number in range(1, 5):
        start = dice.randrange(reached + 1)
        attempt = rig.next_attempt(job_id, number, start_step=start, steps=1000)
        step, stride = start, dice.choice((1, 2, 5))
        sent = len(attempt.lines)
        for _ in range(dice.randrange(40, 130)):
            step += stride
            loss = None if dice.random() < 0.05 else dice.uniform(0, 5)
            attempt.metric(step, loss=loss, nonfinite=loss is None)
            if dice.random() < 0.02:
                step = max(start, step - dice.randrange(40))
            if dice.random() < 0.15:
                rig.ship(attempt, attempt.lines[sent:])
                sent = len(attempt.lines)
        reached = step
        rig.exit(attempt, "crashed", Reason.HUNG, step=step)
        answers_agree(rig, job_id)
        rig.post_action(job_id, "resume")
    with rig.database.read() as session:
        assert session.scalar(select(func.count()).select_from(MetricRollupRow)), "the fast way was used"
        assert jobs.find(session, job_id).sealed_step > 0


def test_late_lines_of_an_old_attempt_open_it_again(any_rig: ServiceHarness, monkeypatch: pytest.MonkeyPatch) -> None:
    seal_small(monkeypatch)
    rig = any_rig
    job_id, first = rig.running(steps=1000)
    for step in range(1, 60):
        first.metric(step)
    early = first.lines[:40]
    rig.ship(first, early)
    report = first.end("crashed", Reason.HUNG, step=60)
    report = report.model_copy(update={"last_seq": len(early)})
    assert rig.report(first, "exit", report.model_dump(mode="json")).status_code == 200
    rig.post_action(job_id, "resume")
    second = rig.next_attempt(job_id, 2, start_step=50, steps=1000)
    for step in range(51, 120):
        second.metric(step, loss=float(step))
    rig.ship(second)
    answers_agree(rig, job_id)
    rig.ship(first)
    answers_agree(rig, job_id)


def test_a_deleted_job_takes_its_sums_along(any_rig: ServiceHarness, monkeypatch: pytest.MonkeyPatch) -> None:
    seal_small(monkeypatch)
    job_id, attempt = any_rig.running(steps=1000)
    for step in range(1, 100):
        attempt.metric(step)
    any_rig.exit(attempt, "completed", step=99)
    assert any_rig.client.delete(f"/jobs/{job_id}").status_code == 204
    with any_rig.database.read() as session:
        assert session.scalar(select(func.count()).select_from(MetricRollupRow)) == 0


def test_which_questions_the_sums_answer() -> None:
    assert rollups.can_use_rollups(rollups.RollupView(64, 50))
    assert not rollups.can_use_rollups(rollups.RollupView(32, 50))
    assert not rollups.can_use_rollups(rollups.RollupView(64, 0))
    assert not rollups.can_use_rollups(rollups.RollupView(64, 49.5))


def long_curve(rig: ServiceHarness, points: int) -> str:
    """A run of so many points, written past the API and summed up as ingest would have."""
    job_id, _ = rig.running(steps=points)
    point = {"job_id": job_id, "attempt": 1, "stitched": True, "epoch": 0.0, "learning_rate": 1e-3}
    rest = {"tokens": 1, "nonfinite": False, "at": utc_now()}
    dice = random.Random(1)
    for start in range(1, points + 1, 50_000):
        steps = range(start, min(points, start + 49_999) + 1)
        with rig.database.write() as session:
            rows = [{**point, **rest, "seq": 10 + step, "step": step, "loss": dice.random()} for step in steps]
            session.execute(insert(MetricRow), rows)
            rollups.roll_up(session, jobs.lock(session, job_id), steps[-1])
    return job_id


@pytest.mark.parametrize(
    "points",
    [
        pytest.param(100_000, marks=pytest.mark.long),
        pytest.param(1_000_000, marks=pytest.mark.soak),
    ],
)
def test_a_long_curve_is_read_at_once(rig: ServiceHarness, points: int) -> None:
    job_id = long_curve(rig, points)
    with rig.database.read() as session:
        job = jobs.find(session, job_id)
        assert job.sealed_step > points - 2048
        for max_points in (1000, 500, 1999):
            page = rig.get(f"/jobs/{job_id}/metrics", max_points=max_points)
            view = rollups.RollupView(page["resolution"], 50)
            quick = count_calls(lambda view=view: list(rollups.aggregates(session, job, view)))  # type: ignore[misc] # bound at once
            slow = list(buckets(store.points(session, job_id, None), view.width, 50))
            same(page["data"], slow)
            every = count_calls(lambda: list(store.points(session, job_id, None)))
            print(f"{points:,} points as {len(slow)} rows: one call for {every / quick:.0f} to read every point")
            assert every > 10 * quick
