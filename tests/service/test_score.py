"""The score of a job: of the best evaluation, else of the smoothed loss, over resumes and rollbacks."""

import math
import random
from typing import Any

import pytest
import sqlalchemy as sa
from alembic import command

from tests.service.harness import ServiceHarness
from trainyard.contract.status import Reason
from trainyard.service.db.engine import Database, alembic_config


def smoothed(points: dict[int, float]) -> float:
    newest = max(points)
    weights = {step: 0.5 ** ((newest - step) / 50) for step in points}
    return math.fsum(weights[step] * loss for step, loss in points.items()) / math.fsum(weights.values())


def score(rig: ServiceHarness, job_id: str) -> dict[str, Any] | None:
    found: dict[str, Any] | None = rig.job(job_id)["score"]
    return found


def test_a_score_is_the_smoothed_loss_until_there_is_an_evaluation(any_rig: ServiceHarness) -> None:
    rig = any_rig
    job_id, attempt = rig.running()
    assert score(rig, job_id) is None
    points = {1: 5.0, 2: 4.0, 30: 2.0}
    for step, loss in points.items():
        attempt.metric(step, loss=loss)
        rig.ship(attempt)
    attempt.metric(31, loss=None)
    rig.ship(attempt)
    assert score(rig, job_id) == {"metric": "loss", "value": pytest.approx(smoothed(points), rel=1e-12), "step": 30}
    buckets = rig.data(job_id, "metrics", max_points=1)
    assert buckets[-1]["loss_ema"] == pytest.approx(smoothed(points), rel=1e-12)
    for step, loss in ((40, 2.5), (50, 2.25), (60, 2.75)):
        attempt.metric(step, loss=1.0, eval_loss=loss)
    rig.ship(attempt)
    assert score(rig, job_id) == {"metric": "eval_loss", "value": 2.25, "step": 50}
    for step, loss, bpb in ((70, 2.5, 1.1), (80, 2.0, 1.3), (90, 1.5, None)):
        attempt.metric(step, loss=1.0, eval_loss=loss, eval_bpb=bpb)
    rig.ship(attempt)
    assert score(rig, job_id) == {"metric": "bpb", "value": 1.1, "step": 70}
    # Computed again from the stored points, after the run went back.
    attempt.metric(75, loss=1.0, eval_loss=1.0)
    rig.ship(attempt)
    assert score(rig, job_id) == {"metric": "bpb", "value": 1.1, "step": 70}
    attempt.metric(65, loss=1.0)
    rig.ship(attempt)
    assert score(rig, job_id) == {"metric": "eval_loss", "value": 2.25, "step": 50}


@pytest.mark.parametrize("evaluates", [False, True])
def test_a_score_counts_no_step_that_was_given_up(any_rig: ServiceHarness, evaluates: bool) -> None:
    rig, seed = any_rig, random.randrange(2**32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    job_id, attempt = rig.running(steps=3000)
    points: dict[int, float] = {}
    evaluations: dict[int, float] = {}
    step = start = 0
    for number in (1, 2, 3):
        for _ in range(400):
            step += rng.randint(1, 3)
            points[step] = rng.uniform(1, 5)
            evaluated = {}
            if evaluates and rng.random() < 0.1:
                evaluated = {"eval_loss": rng.uniform(1, 5)}
                evaluations[step] = evaluated["eval_loss"]
            attempt.metric(step, loss=points[step], **evaluated)
            if rng.random() < 0.05:
                rig.ship(attempt)
            if rng.random() < 0.01 and step > start + 40:
                step -= 40  # back by itself: the curve loses what comes after this step
                attempt.metric(step, loss=points.get(step, 2.0))
                points[step] = points.get(step, 2.0)
                points = {at: loss for at, loss in points.items() if at <= step}
                # The point of this step is replaced by one without an evaluation.
                evaluations = {at: loss for at, loss in evaluations.items() if at < step}
        if number == 3:
            break
        rig.exit(attempt, "crashed", Reason.HUNG, step=step)
        step = start = step - rng.randint(0, 300)
        points = {at: loss for at, loss in points.items() if at <= step}
        evaluations = {at: loss for at, loss in evaluations.items() if at <= step}
        rig.post_action(job_id, "resume")
        attempt = rig.next_attempt(job_id, number + 1, start_step=step, steps=3000)
    rig.ship(attempt)
    found = score(rig, job_id)
    assert found is not None
    if evaluations:
        best = min(evaluations, key=lambda at: evaluations[at])
        assert found == {"metric": "eval_loss", "value": evaluations[best], "step": best}
    else:
        assert found == {"metric": "loss", "value": pytest.approx(smoothed(points), rel=1e-9), "step": max(points)}


def test_jobs_of_an_older_database_get_a_score(any_rig: ServiceHarness) -> None:
    rig = any_rig
    evaluated, first = rig.running()
    for step, loss in ((1, 3.0), (2, 2.0), (3, 2.5)):
        first.metric(step, loss=4.0, eval_loss=loss)
    rig.ship(first)
    rig.exit(first, "crashed", Reason.HUNG, step=3)
    plain, second = rig.running()
    for step, loss in ((1, 3.0), (2, 2.0)):
        second.metric(step, loss=loss)
    rig.ship(second)
    never = rig.submit()
    before = {job: score(rig, job) for job in (evaluated, plain, never)}
    _migrate(rig.database, "0011")
    _migrate(rig.database, "head")
    after = {job: score(rig, job) for job in (evaluated, plain, never)}
    assert after[evaluated] == before[evaluated] == {"metric": "eval_loss", "value": 2.0, "step": 2}
    assert after[plain] == {**(before[plain] or {}), "value": pytest.approx((before[plain] or {})["value"])}
    assert after[never] is None


def _migrate(database: Database, revision: str) -> None:
    with database.engine.begin() as connection:
        config = alembic_config(connection)
        current = sa.inspect(connection).get_columns("jobs")
        down = revision != "head" and any(column["name"] == "score" for column in current)
        (command.downgrade if down else command.upgrade)(config, revision)
