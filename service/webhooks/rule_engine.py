"""Holds the rules of webhooks against the curves of jobs.

What a rule says is an event of the job and a delivery, in the transaction that remembers that it was said.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import Any

from pydantic import TypeAdapter
from sqlalchemy import or_, select
from sqlalchemy.orm import Session

from trainyard.contract.status import Desired, JobStatus
from trainyard.service.db.engine import Database
from trainyard.service.db.models import (
    AttemptRow,
    JobRow,
    RuleStateRow,
    WebhookRow,
)
from trainyard.service.errors import JobNotFound
from trainyard.service.jobs import event_outbox, repository
from trainyard.service.jobs.repository import EventDraft
from trainyard.service.leadership import LeaderLease, fenced
from trainyard.service.metrics.store import newest_cursor, rows_after
from trainyard.service.webhooks.alert_rules import (
    AnyRule,
    Firing,
    NoProgress,
    Point,
    RuleState,
    advance,
    no_progress,
)

POLL_SECONDS = 5.0
MAX_POINTS = 2000
SAVE_SECONDS = 60.0
"""What a rule has read is written down that often; the rest is read again by whoever leads next."""

RECENT = timedelta(minutes=15)
"""Jobs whose attempt ended so short ago are looked at although they do not run: they may have come and gone."""

MAX_GAP_SECONDS = 60.0
"""Who did not look for so long knows nothing of what agents tried to say meanwhile."""

RULES: TypeAdapter[AnyRule] = TypeAdapter(AnyRule)
Cursor = tuple[int, int]
Key = tuple[str, str, str]


@dataclass(frozen=True)
class RuleCursor:
    """One rule of one webhook on one job: how far it has read, and what it remembers."""

    webhook_id: str
    rule: AnyRule
    position: Cursor
    state: RuleState
    final: bool
    is_stored: bool

    def key(self, job_id: str) -> Key:
        """Its row's key."""
        return self.webhook_id, job_id, self.rule.key


@dataclass(frozen=True)
class Evaluation:
    """A watch after a look, and what it has to say."""

    before: RuleCursor
    after: RuleCursor
    firings: Sequence[Firing]

    @property
    def must_be_saved(self) -> bool:
        """Whether it has to be written down at once: what was told must not be told again."""
        changed = (self.before.state.inside, self.before.final) != (self.after.state.inside, self.after.final)
        return bool(self.firings) or changed or not self.before.is_stored


class RuleEngine:
    """Looks every few seconds, in the sender's thread."""

    def __init__(
        self,
        database: Database,
        lease: LeaderLease | None,
        clock: Callable[[], datetime],
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._database = database
        self._lease = lease
        self._clock = clock
        self._monotonic = monotonic
        self._polled_at = float("-inf")
        self._awake_since = clock()
        self._read: dict[Key, tuple[Cursor, RuleState]] = {}
        self._saved_at: dict[str, float] = {}

    def poll(self) -> None:
        """Look at every job that a rule is about, where it is time to."""
        now = self._monotonic()
        if now - self._polled_at < POLL_SECONDS:
            return
        if now - self._polled_at > MAX_GAP_SECONDS:
            self._awake_since = self._clock()
            self._read.clear()  # another server may have led meanwhile
        self._polled_at = now
        with self._database.read() as session:
            jobs = _jobs(session, self._clock()) if (webhooks := _with_rules(session)) else []
        for job_id in jobs:
            self._evaluate_job(webhooks, job_id)

    def _evaluate_job(self, webhooks: Sequence[WebhookRow], job_id: str) -> None:
        with self._database.read() as session:
            job = session.scalar(select(JobRow).where(JobRow.id == job_id))
            if job is None:
                return
            watches = [self._advanced(job_id, watch) for watch in _cursors(session, webhooks, job)]
            looked = self._evaluate_cursors(session, job, [watch for watch in watches if not watch.final])
        self._read |= {one.after.key(job_id): (one.after.position, one.after.state) for one in looked}
        late = self._monotonic() - self._saved_at.get(job_id, float("-inf")) > SAVE_SECONDS
        if any(one.must_be_saved for one in looked) or (late and any(one.before != one.after for one in looked)):
            self._save(job_id, looked)

    def _advanced(self, job_id: str, watch: RuleCursor) -> RuleCursor:
        """What was read since it was last written down."""
        place, seen = self._read.get(watch.key(job_id), (watch.position, watch.state))
        return replace(watch, position=place, state=seen) if place > watch.position else watch

    def _evaluate_cursors(self, session: Session, job: JobRow, watches: Sequence[RuleCursor]) -> list[Evaluation]:
        if not watches:
            return []
        rows = rows_after(session, job.id, min(watch.position for watch in watches), MAX_POINTS)
        live = session.scalar(_live_attempt(job.id).limit(1))
        since = max(_progress_at(job, live), self._awake_since)
        return [
            _evaluate(watch, rows, job, live is None and len(rows) < MAX_POINTS, since, self._clock())
            for watch in watches
        ]

    def _save(self, job_id: str, looked: Sequence[Evaluation]) -> None:
        try:
            with fenced(self._database, self._lease) as session:
                job = repository.lock(session, job_id)
                for one in looked:
                    _write(session, job, one, self._clock())
        except JobNotFound:
            return
        self._saved_at[job_id] = self._monotonic()
        if all(one.after.final for one in looked):
            self._saved_at.pop(job_id)
            for one in looked:
                self._read.pop(one.after.key(job_id), None)


def _with_rules(session: Session) -> list[WebhookRow]:
    rows = session.scalars(select(WebhookRow).where(WebhookRow.enabled.is_(True)).order_by(WebhookRow.number))
    return [row for row in rows if row.rules]


def _jobs(session: Session, now: datetime) -> Sequence[str]:
    """Jobs with a live attempt, with one that ended just now, and those that a rule has not read to the end."""
    recent = or_(AttemptRow.ended_at.is_(None), AttemptRow.ended_at > now - RECENT)
    unread = select(RuleStateRow.job_id).where(RuleStateRow.final.is_(False))
    return session.scalars(select(AttemptRow.job_id).where(recent).union(unread)).all()


def _live_attempt(job_id: str) -> Any:
    return select(AttemptRow).where(AttemptRow.job_id == job_id, AttemptRow.ended_at.is_(None))


def _cursors(session: Session, webhooks: Sequence[WebhookRow], job: JobRow) -> list[RuleCursor]:
    known = {
        (row.webhook_id, row.rule): row
        for row in session.scalars(select(RuleStateRow).where(RuleStateRow.job_id == job.id))
    }
    found = []
    for webhook in webhooks:
        if webhook.job_id in (None, job.id) and event_outbox.matches(webhook.labels, job.labels):
            rules = [RULES.validate_python(rule) for rule in webhook.rules]
            found += [_cursor(session, webhook, rule, job, known) for rule in rules]
    return found


def _cursor(
    session: Session, webhook: WebhookRow, rule: AnyRule, job: JobRow, known: Mapping[tuple[str, str], RuleStateRow]
) -> RuleCursor:
    row = known.get((webhook.id, rule.key))
    if row is None:
        # A rule has nothing to say of what was there before it.
        place = (0, 0) if job.created_at >= webhook.rules_since else newest_cursor(session, job.id)
        return RuleCursor(webhook.id, rule, place, RuleState(), final=False, is_stored=False)
    # A job that was over and goes on has another attempt.
    final = row.final and row.attempt >= job.attempt
    return RuleCursor(webhook.id, rule, (row.attempt, row.seq), RuleState(**row.seen), final, is_stored=True)


def _progress_at(job: JobRow, live: AttemptRow | None) -> datetime:
    at = job.progress.get("updated_at")
    said = datetime.fromisoformat(at) if at else datetime.min.replace(tzinfo=UTC)
    begun = (live.started_at or live.created_at) if live is not None else said
    return max(said, begun)


def _evaluate(
    watch: RuleCursor, rows: Sequence[Mapping[str, Any]], job: JobRow, over: bool, since: datetime, now: datetime
) -> Evaluation:
    new = [row for row in rows if (row["attempt"], row["seq"]) > watch.position]
    seen, firings = advance(watch.rule, watch.state, [_point(row) for row in new])
    if isinstance(watch.rule, NoProgress) and (job.status, job.desired) == (JobStatus.RUNNING, Desired.RUN):
        seen, silent = no_progress(watch.rule, seen, job.progress.get("step") or 0, since, now)
        firings += [silent] if silent is not None else []
    place = (new[-1]["attempt"], new[-1]["seq"]) if new else watch.position
    if over:
        place = max(place, (job.attempt, 0))
    return Evaluation(watch, replace(watch, position=place, state=seen, final=over, is_stored=True), firings)


def _point(row: Mapping[str, Any]) -> Point:
    return Point(row["step"], row["loss"], row["eval_loss"], bool(row["nonfinite"]))


def _write(session: Session, job: JobRow, looked: Evaluation, now: datetime) -> None:
    after = looked.after
    row = session.get(RuleStateRow, after.key(job.id))
    if row is None:
        if session.scalar(select(WebhookRow.id).where(WebhookRow.id == after.webhook_id)) is None:
            return
        row = RuleStateRow(webhook_id=after.webhook_id, job_id=job.id, rule=after.rule.key)
        session.add(row)
    (row.attempt, row.seq), row.seen, row.final = after.position, asdict(after.state), after.final
    for firing in looked.firings:
        rule = after.rule.model_dump(mode="json")
        data = {"webhook_id": after.webhook_id, "rule": rule, "step": firing.step, **firing.data}
        event = repository.record_event(session, job, EventDraft("rule", firing.message, data=data), now)
        session.flush()
        event_outbox.enqueue_one(session, after.webhook_id, f"rule.{after.rule.kind}", job, event)
