"""Evaluate the alert rules of webhooks against the metrics of jobs.

An alert is an event of the job and a delivery, written in the transaction that stores the rule's new state.
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
from trainyard.service.db.models import AttemptRow, JobRow, RuleStateRow, WebhookRow
from trainyard.service.errors import JobNotFound
from trainyard.service.jobs import event_outbox, repository
from trainyard.service.jobs.repository import EventDraft
from trainyard.service.leadership import LeaderLease, fenced
from trainyard.service.metrics.store import newest_cursor, rows_after
from trainyard.service.webhooks.alert_rules import AnyRule, Firing, NoProgress, Point, RuleState, advance, no_progress

POLL_SECONDS = 5.0
MAX_POINTS = 2000
SAVE_SECONDS = 60.0
"""How often the cursors are stored at least; the next leader reads the points since then again."""

RECENT = timedelta(minutes=15)
"""Jobs whose attempt ended this recently are evaluated too: they may have run between two polls."""

MAX_GAP_SECONDS = 60.0
"""After a longer gap between polls, the time of the gap does not count as silence of the agents."""

RULES: TypeAdapter[AnyRule] = TypeAdapter(AnyRule)
Cursor = tuple[int, int]
Key = tuple[str, str, str]


@dataclass(frozen=True)
class RuleCursor:
    """One rule of one webhook on one job: its position in the metrics, and its state."""

    webhook_id: str
    rule: AnyRule
    position: Cursor
    state: RuleState
    final: bool
    is_stored: bool

    def key(self, job_id: str) -> Key:
        """Return the primary key of its row."""
        return self.webhook_id, job_id, self.rule.key


@dataclass(frozen=True)
class RuleEvaluation:
    """A cursor before and after a poll, with the alerts that it fired."""

    before: RuleCursor
    after: RuleCursor
    firings: Sequence[Firing]

    @property
    def must_be_saved(self) -> bool:
        """True if it must be stored at once, so that no alert fires twice."""
        changed = (self.before.state.inside, self.before.final) != (self.after.state.inside, self.after.final)
        return bool(self.firings) or changed or not self.before.is_stored


class RuleEngine:
    """Evaluates all rules every POLL_SECONDS, in the sender's thread."""

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
        self._polling_since = clock()
        self._read: dict[Key, tuple[Cursor, RuleState]] = {}
        self._saved_at: dict[str, float] = {}

    def poll(self) -> None:
        """Evaluate the rules of every job, if POLL_SECONDS have passed."""
        now = self._monotonic()
        if now - self._polled_at < POLL_SECONDS:
            return
        if now - self._polled_at > MAX_GAP_SECONDS:
            self._polling_since = self._clock()
            self._read.clear()  # another server may have been the leader in between
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
            cursors = [self._advanced(job_id, cursor) for cursor in _cursors(session, webhooks, job)]
            evaluations = self._evaluate_cursors(session, job, [cursor for cursor in cursors if not cursor.final])
        self._read |= {one.after.key(job_id): (one.after.position, one.after.state) for one in evaluations}
        late = self._monotonic() - self._saved_at.get(job_id, float("-inf")) > SAVE_SECONDS
        changed = late and any(one.before != one.after for one in evaluations)
        if changed or any(one.must_be_saved for one in evaluations):
            self._save(job_id, evaluations)

    def _advanced(self, job_id: str, cursor: RuleCursor) -> RuleCursor:
        # The position and state in memory may be newer than the stored ones.
        position, state = self._read.get(cursor.key(job_id), (cursor.position, cursor.state))
        return replace(cursor, position=position, state=state) if position > cursor.position else cursor

    def _evaluate_cursors(self, session: Session, job: JobRow, cursors: Sequence[RuleCursor]) -> list[RuleEvaluation]:
        if not cursors:
            return []
        rows = rows_after(session, job.id, min(cursor.position for cursor in cursors), MAX_POINTS)
        live_attempt = select(AttemptRow).where(AttemptRow.job_id == job.id, AttemptRow.ended_at.is_(None))
        live = session.scalar(live_attempt.limit(1))
        since = max(_progress_at(job, live), self._polling_since)
        over = live is None and len(rows) < MAX_POINTS
        return [_evaluate(cursor, rows, job, over, since, self._clock()) for cursor in cursors]

    def _save(self, job_id: str, evaluations: Sequence[RuleEvaluation]) -> None:
        try:
            with fenced(self._database, self._lease) as session:
                job = repository.lock(session, job_id)
                for one in evaluations:
                    _write(session, job, one, self._clock())
        except JobNotFound:
            return
        self._saved_at[job_id] = self._monotonic()
        if all(one.after.final for one in evaluations):
            self._saved_at.pop(job_id)
            for one in evaluations:
                self._read.pop(one.after.key(job_id), None)


def _with_rules(session: Session) -> list[WebhookRow]:
    rows = session.scalars(select(WebhookRow).where(WebhookRow.enabled.is_(True)).order_by(WebhookRow.number))
    return [row for row in rows if row.rules]


def _jobs(session: Session, now: datetime) -> Sequence[str]:
    # Jobs with a live attempt, with one that ended recently, and those whose metrics a rule has not read to the end.
    recent = or_(AttemptRow.ended_at.is_(None), AttemptRow.ended_at > now - RECENT)
    unread = select(RuleStateRow.job_id).where(RuleStateRow.final.is_(False))
    return session.scalars(select(AttemptRow.job_id).where(recent).union(unread)).all()


def _cursors(session: Session, webhooks: Sequence[WebhookRow], job: JobRow) -> list[RuleCursor]:
    known = {
        (row.webhook_id, row.rule): row
        for row in session.scalars(select(RuleStateRow).where(RuleStateRow.job_id == job.id))
    }
    cursors = []
    for webhook in webhooks:
        if webhook.job_id in (None, job.id) and event_outbox.matches(webhook.labels, job.labels):
            rules = [RULES.validate_python(rule) for rule in webhook.rules]
            cursors += [_cursor(session, webhook, rule, job, known) for rule in rules]
    return cursors


def _cursor(
    session: Session, webhook: WebhookRow, rule: AnyRule, job: JobRow, known: Mapping[tuple[str, str], RuleStateRow]
) -> RuleCursor:
    row = known.get((webhook.id, rule.key))
    if row is None:
        # A new rule does not fire for points that are older than itself.
        position = (0, 0) if job.created_at >= webhook.rules_since else newest_cursor(session, job.id)
        return RuleCursor(webhook.id, rule, position, RuleState(), final=False, is_stored=False)
    # A resumed job has a newer attempt: its metrics are not read to the end any more.
    final = row.final and row.attempt >= job.attempt
    return RuleCursor(webhook.id, rule, (row.attempt, row.seq), RuleState(**row.seen), final, is_stored=True)


def _progress_at(job: JobRow, live: AttemptRow | None) -> datetime:
    at = job.progress.get("updated_at")
    reported = datetime.fromisoformat(at) if at else datetime.min.replace(tzinfo=UTC)
    started = (live.started_at or live.created_at) if live is not None else reported
    return max(reported, started)


def _evaluate(
    cursor: RuleCursor, rows: Sequence[Mapping[str, Any]], job: JobRow, over: bool, since: datetime, now: datetime
) -> RuleEvaluation:
    new = [row for row in rows if (row["attempt"], row["seq"]) > cursor.position]
    points = [Point(row["step"], row["loss"], row["eval_loss"], bool(row["nonfinite"])) for row in new]
    state, firings = advance(cursor.rule, cursor.state, points)
    if isinstance(cursor.rule, NoProgress) and (job.status, job.desired) == (JobStatus.RUNNING, Desired.RUN):
        state, firing = no_progress(cursor.rule, state, job.progress.get("step") or 0, since, now)
        firings += [firing] if firing is not None else []
    position = (new[-1]["attempt"], new[-1]["seq"]) if new else cursor.position
    if over:
        position = max(position, (job.attempt, 0))
    return RuleEvaluation(cursor, replace(cursor, position=position, state=state, final=over, is_stored=True), firings)


def _write(session: Session, job: JobRow, evaluation: RuleEvaluation, now: datetime) -> None:
    after = evaluation.after
    row = session.get(RuleStateRow, after.key(job.id))
    if row is None:
        if session.scalar(select(WebhookRow.id).where(WebhookRow.id == after.webhook_id)) is None:
            return
        row = RuleStateRow(webhook_id=after.webhook_id, job_id=job.id, rule=after.rule.key)
        session.add(row)
    (row.attempt, row.seq), row.seen, row.final = after.position, asdict(after.state), after.final
    for firing in evaluation.firings:
        rule = after.rule.model_dump(mode="json")
        data = {"webhook_id": after.webhook_id, "rule": rule, "step": firing.step, **firing.data}
        event = repository.record_event(session, job, EventDraft("rule", firing.message, data=data), now)
        session.flush()
        event_outbox.enqueue_one(session, after.webhook_id, f"rule.{after.rule.kind}", job, event)
