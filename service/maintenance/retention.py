"""Removal of old metrics and events of ended jobs, after the days in the settings. By default everything is kept.

One step is one short transaction that locks one job, so that other writers wait no longer than for each other. A step
depends only on the tables' contents, so nothing is lost if the service is killed between two steps.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import datetime, timedelta
from itertools import groupby
from typing import NamedTuple

from sqlalchemy import delete, select, tuple_
from sqlalchemy.orm import Session

from trainyard.contract.status import TERMINAL
from trainyard.service.db.models import EventRow, JobRow, MetricRollupRow, MetricRow
from trainyard.service.errors import JobNotFound
from trainyard.service.jobs import repository
from trainyard.service.metrics.downsampling import bucket_width
from trainyard.service.settings import Settings

ROWS = 2000  # rows that one step reads
PASS_SECONDS = 3600.0  # pause after all jobs were visited: the limits are in days
KEPT_BUCKETS = 1000
# Key in a job's facts: its finish time when its curve was thinned. If the job has run again since, it is thinned again.
THINNED = "thinned_of"

KEPT_KINDS = ("created", "status")  # kinds of events that describe a job's history: they are never removed

# Events of other actors are never removed: they record who requested what.
SYSTEM_ACTORS = ("worker", "service", "scheduler", "agent")


@dataclass(frozen=True)
class Policy:
    """Days after a job's end; 0: keep for ever."""

    thin_metrics: int = 0
    metrics: int = 0
    events: int = 0

    @classmethod
    def of(cls, settings: Settings) -> "Policy":
        return cls(settings.thin_metrics_days, settings.metrics_days, settings.events_days)

    @property
    def min_days(self) -> int:
        """The shortest of the limits, or 0 if everything is kept."""
        return min((days for days in (self.thin_metrics, self.metrics, self.events) if days), default=0)


class PointKey(NamedTuple):
    """The columns of a point that decide whether it is kept."""

    attempt: int
    seq: int
    step: int
    is_current: bool
    loss: float | None
    eval_loss: float | None


def expired(points: Sequence[PointKey], bucket_steps: int) -> Iterator[PointKey]:
    """Yield all points of each ``bucket_steps`` steps but the last, lowest, highest, first without a loss, and evals.

    So loss spikes stay, and a curve drawn from the remaining points has the same outline.
    """
    for _, found in groupby(points, key=lambda point: (point.attempt, point.is_current, point.step // bucket_steps)):
        bucket = list(found)
        finite = [point for point in bucket if point.loss is not None]
        kept = {bucket[-1].seq, *(point.seq for point in bucket if point.eval_loss is not None)}
        kept |= {point.seq for point in [point for point in bucket if point.loss is None][:1]}
        if finite:
            kept |= {pick(finite, key=lambda point: point.loss or 0.0).seq for pick in (min, max)}
        yield from (point for point in bucket if point.seq not in kept)


Transaction = Callable[[], AbstractContextManager[Session]]


class Retention:
    """Visits one job after the other. ``count`` is called with what was removed and the number of rows."""

    def __init__(
        self,
        policy: Policy,
        reading: Transaction,
        writing: Transaction,
        count: Callable[[str, int], None],
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._policy = policy
        self._reading = reading
        self._writing = writing
        self._count = count
        self._monotonic = monotonic
        self._job_number = 0
        self._position = (0, 0)
        self._next_pass_at = float("-inf")

    def step(self, now: datetime) -> bool:
        """Process one job, or a part of it; return whether more is due now. Raises LeadershipLost."""
        if not self._policy.min_days or self._monotonic() < self._next_pass_at:
            return False
        found = self._next(now)
        if found is None:
            self._job_number, self._position = 0, (0, 0)
            self._next_pass_at = self._monotonic() + PASS_SECONDS
            return False
        number, job_id = found
        if not self._step_job(job_id, now):
            self._job_number, self._position = number, (0, 0)
        return True

    def _next(self, now: datetime) -> tuple[int, str] | None:
        ended = (JobRow.status.in_(TERMINAL), JobRow.finished_at < now - timedelta(days=self._policy.min_days))
        query = select(JobRow.number, JobRow.id).where(JobRow.number > self._job_number, *ended)
        with self._reading() as session:
            row = session.execute(query.order_by(JobRow.number).limit(1)).first()
        return (row.number, row.id) if row is not None else None

    def _step_job(self, job_id: str, now: datetime) -> bool:
        try:
            with self._writing() as session:
                job = repository.lock(session, job_id)
                if job.status not in TERMINAL or job.finished_at is None:
                    return False  # it was resumed after it was selected
                age = now - job.finished_at
                return self._apply_policy(session, job, age)
        except JobNotFound:
            return False

    def _apply_policy(self, session: Session, job: JobRow, age: timedelta) -> bool:
        policy = self._policy
        more = False
        if policy.events and age > timedelta(days=policy.events):
            more = self._delete_events(session, job)
        if policy.metrics and age > timedelta(days=policy.metrics):
            return self._delete_metrics(session, job) or more
        if policy.thin_metrics and age > timedelta(days=policy.thin_metrics):
            return self._thin_metrics(session, job) or more
        return more

    def _delete_events(self, session: Session, job: JobRow) -> bool:
        removable = (EventRow.job_id == job.id, EventRow.kind.not_in(KEPT_KINDS), EventRow.actor.in_(SYSTEM_ACTORS))
        found = session.scalars(select(EventRow.number).where(*removable).order_by(EventRow.number).limit(ROWS)).all()
        if found:
            session.execute(delete(EventRow).where(*removable, EventRow.number <= found[-1]))
            self._count("events", len(found))
        return len(found) == ROWS

    def _delete_metrics(self, session: Session, job: JobRow) -> bool:
        if job.sealed_step:
            session.execute(delete(MetricRollupRow).where(MetricRollupRow.job_id == job.id))
            job.sealed_step = 0
        of_job = (MetricRow.job_id == job.id,)
        order = (MetricRow.attempt, MetricRow.seq)
        found = session.execute(select(*order).where(*of_job).order_by(*order).limit(ROWS)).all()
        if found:
            until = tuple_(*order) <= tuple_(found[-1].attempt, found[-1].seq)
            session.execute(delete(MetricRow).where(*of_job, until))
            self._count("metrics", len(found))
        return len(found) == ROWS

    def _thin_metrics(self, session: Session, job: JobRow) -> bool:
        # Only rolled-up steps are thinned: a long curve is answered from its rollups, which do not change.
        assert job.finished_at is not None
        if job.facts.get(THINNED) == job.finished_at.isoformat():
            return False
        bucket_steps = bucket_width(job.sealed_step, KEPT_BUCKETS)
        points, is_last = self._read_points(session, job, bucket_steps)
        self._delete_points(session, job, expired(points, bucket_steps))
        if is_last:
            job.facts = {**job.facts, THINNED: job.finished_at.isoformat()}
        else:
            self._position = points[-1].attempt, points[-1].seq
        return not is_last

    def _read_points(self, session: Session, job: JobRow, bucket_steps: int) -> tuple[list[PointKey], bool]:
        # Complete buckets after the current position, and whether they are the last.
        order = (MetricRow.attempt, MetricRow.seq)
        columns = (*order, MetricRow.step, MetricRow.stitched, MetricRow.loss, MetricRow.eval_loss)
        rolled_up = (MetricRow.job_id == job.id, MetricRow.step < job.sealed_step)
        query = select(*columns).where(*rolled_up, tuple_(*order) > tuple_(*self._position)).order_by(*order)
        limit = ROWS + bucket_steps  # so that one bucket fits, whatever the interval between points
        found = [PointKey(*row) for row in session.execute(query.limit(limit))]
        if len(found) < limit:
            return found, True
        last = (found[-1].attempt, found[-1].step // bucket_steps)
        whole = [point for point in found if (point.attempt, point.step // bucket_steps) != last]
        return whole or found, False

    def _delete_points(self, session: Session, job: JobRow, points: Iterable[PointKey]) -> None:
        for attempt, found in groupby(points, key=lambda point: point.attempt):
            seqs = [point.seq for point in found]
            for start in range(0, len(seqs), 500):
                some = MetricRow.seq.in_(seqs[start : start + 500])
                of = (MetricRow.job_id == job.id, MetricRow.attempt == attempt)
                session.execute(delete(MetricRow).where(*of, some))
            self._count("metrics", len(seqs))
