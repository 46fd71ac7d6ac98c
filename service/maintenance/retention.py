"""Old curves and old events of jobs that have ended, by the days that the settings give them; nothing unless asked.

A step at a time, each a short transaction that holds one job: others who write wait for it no longer than for each
other. What a step does depends only on what is in the tables, so a service that is killed in between loses nothing.
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
from trainyard.service.db.models import (
    EventRow,
    JobRow,
    MetricRollupRow,
    MetricRow,
)
from trainyard.service.errors import JobNotFound
from trainyard.service.jobs import repository
from trainyard.service.metrics.downsampling import bucket_width
from trainyard.service.settings import Settings

ROWS = 2000
"""As many rows a step looks at."""

PASS_SECONDS = 3600.0
"""Days are counted in days: once all jobs were looked at, that is enough for an hour."""

KEPT_BUCKETS = 1000
THINNED = "thinned_of"
"""In a job's facts: when it had ended as its curve was thinned. A job that ran again since is thinned again."""

NEEDED = ("created", "status")
"""Kinds of events that tell a job's path: they stay with the job."""

OWN_ACTORS = ("worker", "service", "scheduler", "agent")
"""What others than these asked for stays too: it says who it was."""


@dataclass(frozen=True)
class Policy:
    """Days after a job's end; 0: for ever."""

    thin_metrics: int = 0
    metrics: int = 0
    events: int = 0

    @classmethod
    def of(cls, settings: Settings) -> "Policy":
        """As the settings say."""
        return cls(settings.thin_metrics_days, settings.metrics_days, settings.events_days)

    @property
    def shortest(self) -> int:
        """0 where everything is kept."""
        return min((days for days in (self.thin_metrics, self.metrics, self.events) if days), default=0)


class PointKey(NamedTuple):
    """What of a point decides whether it stays."""

    attempt: int
    seq: int
    step: int
    is_current: bool
    loss: float | None
    eval_loss: float | None


def expired(lines: Sequence[PointKey], wide: int) -> Iterator[PointKey]:
    """Of each stretch of ``wide`` steps all but the last, the lowest, the highest, the first without a loss, and evals.

    So a spike stays where it was, and a curve drawn of what is left has the same outline.
    """
    for _, found in groupby(lines, key=lambda line: (line.attempt, line.is_current, line.step // wide)):
        stretch = list(found)
        finite = [line for line in stretch if line.loss is not None]
        kept = {stretch[-1].seq, *(line.seq for line in stretch if line.eval_loss is not None)}
        kept |= {line.seq for line in [line for line in stretch if line.loss is None][:1]}
        if finite:
            kept |= {pick(finite, key=lambda line: line.loss or 0.0).seq for pick in (min, max)}
        yield from (line for line in stretch if line.seq not in kept)


Transaction = Callable[[], AbstractContextManager[Session]]


class Retention:
    """Goes from job to job. ``count`` hears what was removed, and how many rows of it."""

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
        self._job = 0
        self._place = (0, 0)
        self._rests_until = float("-inf")

    def step(self, now: datetime) -> bool:
        """Look at one job, or at a part of it; whether there is more to look at now. Raises Deposed."""
        if not self._policy.shortest or self._monotonic() < self._rests_until:
            return False
        found = self._next(now)
        if found is None:
            self._job, self._place = 0, (0, 0)
            self._rests_until = self._monotonic() + PASS_SECONDS
            return False
        number, job_id = found
        if not self._work(job_id, now):
            self._job, self._place = number, (0, 0)
        return True

    def _next(self, now: datetime) -> tuple[int, str] | None:
        ended = (JobRow.status.in_(TERMINAL), JobRow.finished_at < now - timedelta(days=self._policy.shortest))
        query = select(JobRow.number, JobRow.id).where(JobRow.number > self._job, *ended)
        with self._reading() as session:
            row = session.execute(query.order_by(JobRow.number).limit(1)).first()
        return (row.number, row.id) if row is not None else None

    def _work(self, job_id: str, now: datetime) -> bool:
        """One short transaction; whether the job needs another."""
        try:
            with self._writing() as session:
                job = repository.lock(session, job_id)
                if job.status not in TERMINAL or job.finished_at is None:
                    return False  # it was resumed since it was looked up
                age = now - job.finished_at
                return self._of(session, job, age)
        except JobNotFound:
            return False

    def _of(self, session: Session, job: JobRow, age: timedelta) -> bool:
        policy = self._policy
        more = False
        if policy.events and age > timedelta(days=policy.events):
            more = self._events(session, job)
        if policy.metrics and age > timedelta(days=policy.metrics):
            return self._remove(session, job) or more
        if policy.thin_metrics and age > timedelta(days=policy.thin_metrics):
            return self._thin(session, job) or more
        return more

    def _events(self, session: Session, job: JobRow) -> bool:
        told = (EventRow.job_id == job.id, EventRow.kind.not_in(NEEDED), EventRow.actor.in_(OWN_ACTORS))
        found = session.scalars(select(EventRow.number).where(*told).order_by(EventRow.number).limit(ROWS)).all()
        if found:
            session.execute(delete(EventRow).where(*told, EventRow.number <= found[-1]))
            self._count("events", len(found))
        return len(found) == ROWS

    def _remove(self, session: Session, job: JobRow) -> bool:
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

    def _thin(self, session: Session, job: JobRow) -> bool:
        """Only what is summed up: rows of a wide curve are answered from the sums, and stay what they were."""
        assert job.finished_at is not None
        if job.facts.get(THINNED) == job.finished_at.isoformat():
            return False
        wide = bucket_width(job.sealed_step, KEPT_BUCKETS)
        lines, ended = self._lines(session, job, wide)
        self._delete(session, job, expired(lines, wide))
        if ended:
            job.facts = {**job.facts, THINNED: job.finished_at.isoformat()}
        else:
            self._place = lines[-1].attempt, lines[-1].seq
        return not ended

    def _lines(self, session: Session, job: JobRow, wide: int) -> tuple[list[PointKey], bool]:
        """Whole stretches behind the place that was reached, and whether they are the last."""
        place = (MetricRow.attempt, MetricRow.seq)
        columns = [getattr(MetricRow, name) for name in PointKey._fields]
        summed = (MetricRow.job_id == job.id, MetricRow.step < job.sealed_step)
        query = select(*columns).where(*summed, tuple_(*place) > tuple_(*self._place)).order_by(*place)
        many = ROWS + wide  # so that one stretch fits, whatever the interval between points
        found = [PointKey(*row) for row in session.execute(query.limit(many))]
        if len(found) < many:
            return found, True
        last = (found[-1].attempt, found[-1].step // wide)
        whole = [line for line in found if (line.attempt, line.step // wide) != last]
        return whole or found, False

    def _delete(self, session: Session, job: JobRow, lines: Iterable[PointKey]) -> None:
        for attempt, found in groupby(lines, key=lambda line: line.attempt):
            seqs = [line.seq for line in found]
            for begin in range(0, len(seqs), 500):
                some = MetricRow.seq.in_(seqs[begin : begin + 500])
                of = (MetricRow.job_id == job.id, MetricRow.attempt == attempt)
                session.execute(delete(MetricRow).where(*of, some))
            self._count("metrics", len(seqs))
