"""Retention: off by default, nothing of a job that may resume, and a thinned curve keeps its outline."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import func, insert, select
from sqlalchemy.orm import Session

from tests.service.harness import ServiceHarness, path_of
from trainyard.contract.status import Reason
from trainyard.service.db.models import (
    EventRow,
    JobRow,
    MetricRollupRow,
    MetricRow,
)
from trainyard.service.jobs import repository
from trainyard.service.leadership import LeadershipLost
from trainyard.service.maintenance import retention
from trainyard.service.maintenance.retention import (
    KEPT_BUCKETS,
    PointKey,
    Policy,
    Retention,
    expired,
)
from trainyard.service.metrics import rollups
from trainyard.service.settings import Settings

DAY = 86400.0


class Keeper:
    """Retention over a rig's database, with an hour hand of its own."""

    def __init__(self, rig: ServiceHarness, **policy: int) -> None:
        self.rig, self.now, self.removed = rig, 0.0, dict.fromkeys(("metrics", "events"), 0)
        self.transactions = 0
        self.retention = Retention(Policy(**policy), rig.database.read, self.writing, self.count, lambda: self.now)

    @contextmanager
    def writing(self) -> Iterator[Session]:
        self.transactions += 1
        with self.rig.scheduler.writing() as session:
            yield session

    def count(self, what: str, rows: int) -> None:
        self.removed[what] += rows

    def whole_pass(self) -> int:
        """Steps until all jobs were looked at; an hour later another pass may begin."""
        steps = 0
        while self.retention.step(self.rig.clock()):
            steps += 1
            assert steps < 1000
        self.now += retention.PASS_SECONDS
        return steps


def long_run(rig: ServiceHarness, points: int, stride: int = 1, seed: int = 1) -> str:
    """A job that ended, with so many points."""
    dice = random.Random(seed)
    job_id, attempt = rig.running(steps=points * stride)
    same = {"job_id": job_id, "attempt": 1, "stitched": True, "epoch": 0.0, "learning_rate": 1e-3, "nonfinite": False}
    rows = []
    for number in range(1, points + 1):
        loss = None if dice.random() < 0.01 else dice.uniform(1, 3) + (50 if number == points // 3 else 0)
        own = {"step": number * stride, "seq": 10 + number, "loss": loss, "tokens": number, "at": rig.clock()}
        rows.append({**same, **own, "eval_loss": 1.5 if number % 500 == 0 else None})
    with rig.database.write() as session:
        session.execute(insert(MetricRow), rows)
        rollups.roll_up(session, repository.lock(session, job_id), points * stride)
    rig.exit(attempt, "completed", step=points * stride)
    return job_id


def counted(rig: ServiceHarness, table: Any, job_id: str) -> int:
    with rig.database.read() as session:
        return session.scalar(select(func.count()).select_from(table).where(table.job_id == job_id)) or 0


def curve(rig: ServiceHarness, job_id: str, points: int) -> Any:
    return rig.get(f"/jobs/{job_id}/metrics", max_points=points)


def test_everything_is_kept_unless_asked(rig: ServiceHarness) -> None:
    job_id = long_run(rig, 3000)
    rig.clock.forward(1000 * DAY)
    keeper = Keeper(rig)
    assert keeper.whole_pass() == 0
    assert counted(rig, MetricRow, job_id) == 3000
    assert Policy.of(rig.settings).min_days == 0


def test_a_thinned_curve_keeps_its_outline(any_rig: ServiceHarness) -> None:
    rig = any_rig
    job_id = long_run(rig, 6000)
    before = {points: curve(rig, job_id, points) for points in (10, 90)}
    keeper = Keeper(rig, thin_metrics=30)
    rig.clock.forward(29 * DAY)
    keeper.whole_pass()
    assert keeper.removed["metrics"] == 0, "not old enough"
    rig.clock.forward(2 * DAY)
    keeper.whole_pass()
    left = counted(rig, MetricRow, job_id)
    assert keeper.removed["metrics"] == 6000 - left
    assert 500 < left < 5 * KEPT_BUCKETS
    for points, whole in before.items():
        assert curve(rig, job_id, points) == whole, "wide rows come from the sums"
    rows = rig.data(job_id, "metrics", limit=10_000)
    steps = [row["step"] for row in rows]
    assert steps == sorted(steps)
    assert steps[-1] == 6000
    assert max(row["loss"] or 0 for row in rows) > 50, "a spike stays"
    assert [row["step"] for row in rows if row["eval_loss"]] == list(range(500, 6001, 500))
    again = Keeper(rig, thin_metrics=30)
    again.whole_pass()
    assert again.removed["metrics"] == 0, "it remembers what it did, also in the next service"


def test_a_part_of_a_thinned_curve_has_null_for_removed_points(
    any_rig: ServiceHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The buckets of a part are narrower than the kept ones. They have their sums, but may lack their last point."""
    monkeypatch.setattr(retention, "KEPT_BUCKETS", 6)
    job_id = long_run(any_rig, 1500)
    wanted: dict[str, Any] = {"max_points": 20, "fields": "eval_loss,eval,learning_rate,at"}
    before = any_rig.get(f"/jobs/{job_id}/metrics", **wanted)["data"]
    any_rig.clock.forward(31 * DAY)
    keeper = Keeper(any_rig, thin_metrics=30)
    keeper.whole_pass()
    assert keeper.removed["metrics"] > 0
    after = any_rig.get(f"/jobs/{job_id}/metrics", **wanted)["data"]
    assert [list(row) for row in after] == [list(row) for row in before]
    assert [row["loss_mean"] for row in after] == [row["loss_mean"] for row in before]
    assert {row["learning_rate"] for row in after} == {1e-3, None}
    for accept in ("text/csv", "application/x-ndjson"):
        answer = any_rig.client.get(f"/jobs/{job_id}/metrics", params=wanted, headers={"Accept": accept})
        assert answer.status_code == 200, answer.text


def test_a_job_that_ran_again_is_thinned_again(rig: ServiceHarness) -> None:
    job_id = long_run(rig, 3000)
    with rig.database.write() as session:
        job = repository.lock(session, job_id)
        job.facts = {**job.facts, retention.THINNED: "of an earlier end"}
    rig.clock.forward(31 * DAY)
    keeper = Keeper(rig, thin_metrics=30)
    keeper.whole_pass()
    assert keeper.removed["metrics"] > 0


def test_short_curves_are_left_alone(rig: ServiceHarness) -> None:
    job_id = long_run(rig, 300, stride=10)
    rig.clock.forward(31 * DAY)
    keeper = Keeper(rig, thin_metrics=30)
    keeper.whole_pass()
    assert counted(rig, MetricRow, job_id) >= 290


@pytest.mark.parametrize("seed", range(6))
def test_what_is_thinned_out_of_a_stretch(seed: int) -> None:
    dice = random.Random(seed)
    lines = [
        PointKey(1, n, n, True, None if dice.random() < 0.2 else dice.random(), 1.0 if dice.random() < 0.05 else None)
        for n in range(1, 400)
    ]
    gone = set(expired(lines, 64))
    left = [line for line in lines if line not in gone]
    for bucket in range(400 // 64 + 1):
        whole, kept = ([line for line in some if line.step // 64 == bucket] for some in (lines, left))
        losses, kept_losses = ([line.loss for line in some if line.loss is not None] for some in (whole, kept))
        assert kept[-1] == whole[-1]
        assert (min(kept_losses), max(kept_losses)) == (min(losses), max(losses))
        assert any(line.loss is None for line in kept) == any(line.loss is None for line in whole)
    assert [line for line in left if line.eval_loss] == [line for line in lines if line.eval_loss]
    assert len(left) < 60


def test_thinning_in_many_small_steps_is_thinning_at_once(rig: ServiceHarness, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = [long_run(rig, 3000), long_run(rig, 3000)]
    rig.clock.forward(31 * DAY)
    with rig.database.write() as session:
        session.execute(insert(MetricRow), _second_attempt(session, ids[0]))
        session.execute(insert(MetricRow), _second_attempt(session, ids[1]))
        repository.lock(session, ids[1]).facts = {retention.THINNED: "later"}
    monkeypatch.setattr(retention, "ROWS", 100_000)
    whole = Keeper(rig, thin_metrics=30)
    whole.retention._next = lambda now: None if whole.removed["metrics"] else (1, ids[0])  # type: ignore[method-assign]
    whole.whole_pass()
    monkeypatch.setattr(retention, "ROWS", 90)
    small = Keeper(rig, thin_metrics=30)
    assert small.whole_pass() > 20
    assert left(rig, ids[0]) == left(rig, ids[1])
    assert {attempt for attempt, _ in left(rig, ids[0])} == {1, 2}


def _second_attempt(session: Session, job_id: str) -> list[dict[str, Any]]:
    """Points that do not count, of an attempt that was gone over."""
    columns = [column.name for column in MetricRow.__table__.columns]
    found = session.scalars(select(MetricRow).where(MetricRow.job_id == job_id, MetricRow.step <= 1500))
    return [{**{name: getattr(row, name) for name in columns}, "attempt": 2, "stitched": False} for row in found]


def left(rig: ServiceHarness, job_id: str) -> list[tuple[int, int]]:
    query = select(MetricRow.attempt, MetricRow.seq).where(MetricRow.job_id == job_id)
    with rig.database.read() as session:
        return [(row.attempt, row.seq) for row in session.execute(query.order_by(MetricRow.attempt, MetricRow.seq))]


def test_curves_go_altogether_and_the_job_stays(any_rig: ServiceHarness, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retention, "ROWS", 1000)
    rig = any_rig
    job_id, other = long_run(rig, 3500), long_run(rig, 200)
    before = rig.job(job_id)
    rig.clock.forward(91 * DAY)
    late = long_run(rig, 200)
    with rig.database.write() as session:
        repository.lock(session, late).finished_at = rig.clock()
    keeper = Keeper(rig, metrics=90, thin_metrics=30)
    keeper.whole_pass()
    assert [counted(rig, MetricRow, each) for each in (job_id, other, late)] == [0, 0, 200]
    assert counted(rig, MetricRollupRow, job_id) == 0
    assert keeper.removed["metrics"] == 3700
    assert keeper.transactions >= 4, "no transaction is long"
    assert rig.data(job_id, "metrics") == []
    assert curve(rig, job_id, 100)["data"] == []
    assert rig.job(job_id)["progress"] == before["progress"]


def test_events_go_and_the_path_and_who_asked_stay(any_rig: ServiceHarness, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retention, "ROWS", 5)
    rig = any_rig
    job_id, attempt = rig.running()
    for step in range(1, 21):
        attempt.say("warning", code="spike", message=f"at {step}", step=step)
    rig.client.patch(f"/jobs/{job_id}", json={"labels": {"a": "b"}})
    rig.exit(attempt, "failed", Reason.DIVERGED, step=20)
    before = rig.data(job_id, "events", limit=100)
    rig.clock.forward(11 * DAY)
    keeper = Keeper(rig, events=10)
    keeper.whole_pass()
    after = rig.data(job_id, "events", limit=100)
    assert len(before) - len(after) == keeper.removed["events"] > 20
    assert [e["kind"] for e in after if e["kind"] == "warning"] == []
    assert path_of(after) == path_of(before)
    assert after[0]["kind"] == "created"
    assert [e for e in after if e["actor"] not in retention.SYSTEM_ACTORS] == [
        e for e in before if e["actor"] not in retention.SYSTEM_ACTORS
    ]
    assert counted(rig, MetricRow, job_id) == 0


def test_jobs_that_may_go_on_keep_all(any_rig: ServiceHarness) -> None:
    rig = any_rig
    running, attempt = rig.running()
    attempt.metric(1)
    rig.ship(attempt)
    paused, other = rig.running()
    other.metric(1)
    rig.ship(other)
    rig.post_action(paused, "pause")
    rig.exit(other, "stopped", step=1)
    rig.clock.forward(1000 * DAY)
    events = {job_id: rig.data(job_id, "events") for job_id in (running, paused)}
    keeper = Keeper(rig, metrics=1, events=1, thin_metrics=1)
    keeper.whole_pass()
    assert keeper.removed == {"metrics": 0, "events": 0}
    assert {job_id: rig.data(job_id, "events") for job_id in (running, paused)} == events


def test_a_job_that_is_resumed_or_deleted_meanwhile(rig: ServiceHarness, monkeypatch: pytest.MonkeyPatch) -> None:
    job_id = long_run(rig, 100)
    gone = long_run(rig, 100)
    rig.clock.forward(91 * DAY)
    keeper = Keeper(rig, metrics=90)
    with rig.database.read() as session:
        numbers = dict(session.execute(select(JobRow.id, JobRow.number)).all())
    assert rig.client.delete(f"/jobs/{gone}").status_code == 204
    assert keeper.retention._step_job(gone, rig.clock()) is False
    with rig.database.write() as session:
        repository.lock(session, job_id).finished_at = None
    monkeypatch.setattr(keeper.retention, "_next", lambda _: None if keeper.transactions else (numbers[job_id], job_id))
    keeper.whole_pass()
    assert keeper.removed["metrics"] == 0


def test_a_thinned_job_goes_on_where_it_failed(rig: ServiceHarness) -> None:
    """Its sums are made again from where it goes on; the curve has each step once, and no gap behind that."""
    job_id, attempt = rig.running(steps=6000)
    for step in range(1, 3001):
        attempt.metric(step)
    rig.checkpoint(job_id, attempt, 2500)
    rig.exit(attempt, "failed", Reason.DIVERGED, step=3000)
    rig.clock.forward(31 * DAY)
    keeper = Keeper(rig, thin_metrics=30)
    keeper.whole_pass()
    assert keeper.removed["metrics"] > 0
    rig.post_action(job_id, "resume")
    following = rig.next_attempt(job_id, 2, start_step=2500, steps=6000)
    for step in range(2501, 6001):
        following.metric(step)
    rig.ship(following)
    steps = [row["step"] for row in rig.data(job_id, "metrics", limit=10_000)]
    assert steps == sorted(set(steps))
    assert steps[-3500:] == list(range(2501, 6001))
    rows = curve(rig, job_id, 100)["data"]
    assert sum(row["count"] for row in rows) > 5900, "what is summed up still counts"


def test_only_the_service_that_schedules_removes(rig: ServiceHarness, monkeypatch: pytest.MonkeyPatch) -> None:
    from trainyard.service.maintenance.loop import MaintenanceLoop

    job_id = long_run(rig, 100)
    rig.clock.forward(91 * DAY)
    services = rig.app.state.app_state
    upkeep = MaintenanceLoop(
        rig.scheduler, services.disks, rig.clock, policy=Policy(metrics=90), count=services.metrics.rows_removed
    )
    monkeypatch.setattr(rig.scheduler, "_enabled", False)
    upkeep.round()
    assert counted(rig, MetricRow, job_id) == 100
    monkeypatch.setattr(rig.scheduler, "_enabled", True)
    upkeep.round()
    assert counted(rig, MetricRow, job_id) == 0
    assert 'trainyard_retention_removed_total{what="metrics"} 100' in rig.client.get("/metrics").text


def test_a_service_that_lost_leadership_removes_nothing(any_rig: ServiceHarness) -> None:
    job_id = long_run(any_rig, 100)
    any_rig.clock.forward(91 * DAY)

    @contextmanager
    def refused() -> Iterator[Session]:
        with any_rig.database.write() as session:
            yield session
            raise LeadershipLost()

    removal = Retention(Policy(metrics=90, events=1), any_rig.database.read, refused, lambda _what, _rows: None)
    with pytest.raises(LeadershipLost):
        removal.step(any_rig.clock())
    assert counted(any_rig, MetricRow, job_id) == 100
    assert counted(any_rig, EventRow, job_id) > 3


def test_the_settings() -> None:
    given = {"TRAINYARD_THIN_METRICS_DAYS": "30", "TRAINYARD_METRICS_DAYS": "365", "TRAINYARD_EVENTS_DAYS": "90"}
    policy = Policy.of(Settings.read(given))
    assert (policy.thin_metrics, policy.metrics, policy.events, policy.min_days) == (30, 365, 90, 30)
    assert timedelta(days=policy.min_days).total_seconds() == 30 * DAY
