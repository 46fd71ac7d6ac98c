"""Store what agents report: each event once, in order, in the transaction that advances ``acked_seq``."""

import hmac
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, assert_never

from sqlalchemy import ColumnElement, and_, bindparam, delete, func, insert, or_, select, update
from sqlalchemy.exc import InterfaceError, OperationalError, StatementError
from sqlalchemy.orm import Session

from trainyard.contract.attempt_proof import RequestProof
from trainyard.contract.events import (
    CheckpointRemoved,
    CheckpointSaved,
    Event,
    Finished,
    MetricEvent,
    PhaseChanged,
    ResumeVerified,
    SampleEvent,
    SettingsChanged,
    Started,
    TaskScored,
    WarningEvent,
)
from trainyard.contract.file_identity import input_changes
from trainyard.contract.status import Desired, JobStatus
from trainyard.service.auth.api_keys import NO_HASH
from trainyard.service.db.models import AttemptRow, CheckpointRow, EvaluationRow, JobRow, MetricRow, SampleRow
from trainyard.service.errors import Unauthorized
from trainyard.service.ids import token_hash
from trainyard.service.ingest.parsing import contiguous, parse_event
from trainyard.service.jobs import repository
from trainyard.service.jobs.repository import EventDraft
from trainyard.service.metrics import rollups, score
from trainyard.service.metrics.progress import after_metric, after_start

# Built once, because every report runs them.
ATTEMPT_BY_ID = select(AttemptRow).where(AttemptRow.id == bindparam("attempt_id"))
INSERT_METRICS = insert(MetricRow)
_OF_ATTEMPT = (MetricRow.job_id == bindparam("job_id"), MetricRow.attempt == bindparam("attempt"))
MAX_STEP_OF_ATTEMPT = select(func.max(MetricRow.step)).where(*_OF_ATTEMPT)

QUARANTINED = ("invalid", "superseded")
"""Reasons of a removal that renames the files instead of deleting them."""


def authenticate(session: Session, attempt_id: str, credentials: RequestProof | str) -> AttemptRow:
    """Return the attempt that the credentials belong to: a proof, or the token itself, which agents of 0.1 send.

    Raises Unauthorized if there is none.
    """
    valid = attempt_id.isascii() and attempt_id.isprintable()
    attempt = session.scalar(ATTEMPT_BY_ID, {"attempt_id": attempt_id}) if valid else None
    # Always compare, also if there is no such attempt: the time taken must not show which attempts exist.
    expected = attempt.token_sha256 if attempt is not None else NO_HASH
    token = credentials.token(expected) if isinstance(credentials, RequestProof) else credentials
    if not hmac.compare_digest(token_hash(token), expected) or attempt is None:
        raise Unauthorized("The token does not belong to this attempt.")
    return attempt


def lock(session: Session, attempt_id: str, job_id: str) -> tuple[JobRow, AttemptRow]:
    """Return the job and its attempt, locked until the transaction ends."""
    job = repository.lock(session, job_id)  # always the job first: another order could deadlock
    attempt = session.scalar(ATTEMPT_BY_ID, {"attempt_id": attempt_id}, execution_options={"populate_existing": True})
    assert attempt is not None
    return job, attempt


def record_contact(session: Session, job: JobRow, attempt: AttemptRow, now: datetime) -> None:
    """Record that the attempt sent a report. Its first report changes the job from starting to running."""
    attempt.heard_at = now
    attempt.started_at = attempt.started_at or now
    attempt.launched_at = attempt.launched_at or now
    if attempt.number != job.attempt or attempt.ended_at is not None:
        return
    job.heard_at = now
    if job.status == JobStatus.STARTING:
        draft = EventDraft("status", f"attempt {attempt.number} reports", "agent", attempt.number)
        repository.transition(session, job, JobStatus.RUNNING, draft, now, started_at=job.started_at or now)


def desired_of(job: JobRow, attempt: AttemptRow) -> Desired:
    """Return the desired state to answer the agent with: KILL if its attempt has ended or was replaced."""
    # A stop request reaches the ranks in two ways, and the first one to arrive counts: in this answer (agent -> stop
    # file), and from the scheduler (`plan.NotifyStop` -> `Launcher.stop` -> the same stop file), which does not wait
    # for the next heartbeat. The agent still needs the answer, to escalate if the ranks do not stop.
    if attempt.number != job.attempt or attempt.ended_at is not None:
        return Desired.KILL
    return Desired(job.desired)


def ingest(session: Session, job: JobRow, attempt: AttemptRow, lines: Iterable[dict[str, Any]]) -> int:
    """Store the lines that continue the stored ones, advance ``attempt.acked_seq``, and return how many were new."""
    events = [parse_event(line) for line in contiguous(lines, attempt.acked_seq)]
    if not events:
        return 0
    try:
        _store(session, job, attempt, events)
    except StatementError as error:
        if isinstance(error, OperationalError | InterfaceError):
            raise
        _store_one_by_one(session, job, attempt, events)
    attempt.acked_seq = events[-1].seq
    return len(events)


def _store(session: Session, job: JobRow, attempt: AttemptRow, events: Sequence[Event]) -> None:
    with session.begin_nested():
        batch = _EventBatch(session, job, attempt)
        for event in events:
            batch.add(event)
        batch.flush_metrics()
        if batch.roll_up_to is not None:
            rollups.roll_up(session, job, batch.roll_up_to)
        if batch.changes_past:
            score.compute_again(session, job)


def _store_one_by_one(session: Session, job: JobRow, attempt: AttemptRow, events: Sequence[Event]) -> None:
    # A line that the database rejects must not block the lines after it: it is stored as a warning.
    for event in events:
        try:
            _store(session, job, attempt, [event])
        except StatementError as error:
            if isinstance(error, OperationalError | InterfaceError):
                raise
            message = f"line {event.seq} of the outbox, a {event.kind}, could not be stored"
            _store(session, job, attempt, [WarningEvent(seq=event.seq, code="unstorable_line", message=message)])


@dataclass
class _EventBatch:
    session: Session
    job: JobRow
    attempt: AttemptRow
    metrics: list[dict[str, Any]] = field(default_factory=list)
    roll_up_to: int | None = None
    changes_past: bool = False

    def __post_init__(self) -> None:
        self.current = self.attempt.number == self.job.attempt
        self.superseded_after = None if self.current else self._start_step_of_later_attempt()
        own = {"job_id": self.job.id, "attempt": self.attempt.number}
        self.last_step = self.session.connection().scalar(MAX_STEP_OF_ATTEMPT, own) or 0

    def _start_step_of_later_attempt(self) -> int | None:
        # For a late report of a replaced attempt: its points after that step are not part of the job's curve.
        later = (AttemptRow.job_id == self.job.id, AttemptRow.number > self.attempt.number)
        return self.session.scalar(select(func.min(AttemptRow.start_step)).where(*later))

    def add(self, event: Event) -> None:  # noqa: C901 - one branch for each kind of event
        match event:
            case MetricEvent():
                self._metric(event)
            case Started():
                self._started(event)
            case PhaseChanged():
                self._phase(event)
            case CheckpointSaved():
                self._saved(event)
            case CheckpointRemoved():
                self._removed(event)
            case SampleEvent():
                self._sample(event)
            case TaskScored():
                self._task_scored(event)
            case WarningEvent():
                self._warned(event)
            case ResumeVerified() | SettingsChanged():
                self._verified_or_changed(event)
            case Finished():
                self._finished(event)
            case _:
                assert_never(event)

    def flush_metrics(self) -> None:
        if self.metrics:
            self.session.connection().execute(INSERT_METRICS, self.metrics)
            self.metrics = []

    def _metric(self, event: MetricEvent) -> None:
        stitched = self.superseded_after is None or event.step <= self.superseded_after
        if event.step <= self.last_step:
            # The attempt rolled back and repeats these steps. Flush first: the update must see all earlier points.
            self.flush_metrics()
            self._supersede(MetricRow.attempt == self.attempt.number, event.step - 1)
        elif event.step == self.attempt.start_step and stitched:
            # The previous attempt stopped its evaluation of this step; this line has the result.
            self._supersede(MetricRow.attempt < self.attempt.number, event.step - 1)
        self.last_step = event.step
        # Only stitched points are part of the job's curve: one for each step, of the last attempt that made the step.
        row = {"job_id": self.job.id, "attempt": self.attempt.number, "stitched": stitched}
        self.metrics.append(row | event.model_dump(exclude={"kind"}))
        if stitched:
            rollups.invalidate(self.session, self.job, event.step)
        if self.current:
            self.roll_up_to = event.step
            self.job.progress = after_metric(self.job.progress, event, self.job.facts)
            score.add_point(self.job, event)
        elif stitched:
            self.changes_past = True

    def _supersede(self, attempts: ColumnElement[bool], after_step: int) -> None:
        rollups.invalidate(self.session, self.job, after_step + 1)
        self.changes_past = self.changes_past or self.attempt.number > 1 or self.last_step > after_step
        points = update(MetricRow).where(MetricRow.job_id == self.job.id, attempts, MetricRow.step > after_step)
        self.session.execute(points.values(stitched=False).execution_options(synchronize_session=False))

    def _started(self, event: Started) -> None:
        self.attempt.start_step = event.start_step
        self._supersede(MetricRow.attempt < self.attempt.number, event.start_step)
        earlier = or_(EvaluationRow.attempt.is_(None), EvaluationRow.attempt < self.attempt.number)
        self._supersede_evaluations(earlier, EvaluationRow.step > event.start_step)
        if self.current:
            if event.start_step == 0:
                self._compare_inputs(event)
            self.job.resume_step = None
            facts = event.model_dump(mode="json", exclude={"kind", "seq", "at", "start_step", "resumed_from"})
            self.job.facts = {**self.job.facts, **facts}
            self.job.progress = after_start(self.job.progress, event)
        origin = f"continues from step {event.start_step:,}" if event.start_step else "starts from step 0"
        ranks = f"{event.world_size} rank{'s' if event.world_size != 1 else ''} on {event.device_name}"
        self._record_event("started", f"attempt {self.attempt.number} {origin}: {ranks}", event)

    def _compare_inputs(self, event: Started) -> None:
        # A later attempt continues from a checkpoint, which the worker compares with the whole corpus.
        changes = input_changes(self.job.facts.get("inputs") or {}, event.inputs)
        if changes:
            message = (
                f"changed since the job was submitted: {', '.join(changes)}; the run uses the files as they are now"
            )
            repository.add_alert(self.job, "inputs_changed", message, event.at)
            self._record_event("warning", message, event)

    def _phase(self, event: PhaseChanged) -> None:
        if self.current:
            self.job.phase = event.phase
            self.job.phase_detail = {"message": event.message, "done": event.done, "total": event.total}

    def _saved(self, event: CheckpointSaved) -> None:
        same = (CheckpointRow.job_id == self.job.id, CheckpointRow.path == event.path)
        self.session.execute(delete(CheckpointRow).where(*same))
        if event.checkpoint_kind == "weights" and self._keep_weights_only(event):
            return
        self.session.add(
            CheckpointRow(
                job_id=self.job.id,
                attempt=self.attempt.number,
                seq=event.seq,
                step=event.step,
                path=event.path,
                bytes=event.bytes,
                sha256=event.sha256,
                kind=event.checkpoint_kind,
                loss=event.loss,
                created_at=event.at,
            )
        )
        self._record_event("checkpoint", f"saved {event.checkpoint_kind} checkpoint at step {event.step:,}", event)

    def _keep_weights_only(self, event: CheckpointSaved) -> bool:
        # Update the full checkpoint's row in place: the list stays in step order.
        full = (CheckpointRow.job_id == self.job.id, CheckpointRow.step == event.step, CheckpointRow.kind == "full")
        row = self.session.scalar(select(CheckpointRow).where(*full).limit(1))
        if row is None:
            return False
        row.path, row.bytes, row.sha256, row.kind = event.path, event.bytes, event.sha256, event.checkpoint_kind
        self.session.flush()
        self._record_event("checkpoint", f"kept only the weights of the checkpoint at step {event.step:,}", event)
        return True

    def _removed(self, event: CheckpointRemoved) -> None:
        same = (CheckpointRow.job_id == self.job.id, CheckpointRow.path == event.path)
        self.session.execute(delete(CheckpointRow).where(*same))
        verb = "set aside" if event.why in QUARANTINED else "removed"
        self._record_event("checkpoint_removed", f"{verb} the checkpoint of step {event.step:,}: {event.why}", event)

    def _sample(self, event: SampleEvent) -> None:
        own = {"job_id": self.job.id, "attempt": self.attempt.number}
        self.session.add(SampleRow(**own, **event.model_dump(exclude={"kind"})))

    def _task_scored(self, event: TaskScored) -> None:
        # An earlier score of this step, or of later steps before the attempt has rolled back.
        number = self.attempt.number
        same = and_(EvaluationRow.step == event.step, EvaluationRow.task == event.task)
        later = and_(EvaluationRow.attempt == number, EvaluationRow.step > event.step)
        stitched = self.superseded_after is None or event.step <= self.superseded_after
        if stitched:
            self._supersede_evaluations(EvaluationRow.attempt.is_not(None), or_(same, later))
        fields = event.model_dump(exclude={"task_kind", "seq", "at", "kind"})
        self.session.add(
            EvaluationRow(
                job_id=self.job.id,
                attempt=number,
                kind=event.task_kind,
                state="done",
                stitched=stitched,
                created_at=event.at,
                finished_at=event.at,
                **fields,
            )
        )

    def _supersede_evaluations(self, *which: ColumnElement[bool]) -> None:
        rows = update(EvaluationRow).where(EvaluationRow.job_id == self.job.id, *which)
        self.session.execute(rows.values(stitched=False).execution_options(synchronize_session=False))

    def _warned(self, event: WarningEvent) -> None:
        if self.current and event.code == "rolled_back" and type(steps := event.data.get("steps")) is int:
            self.job.facts = {**self.job.facts, "steps": steps}  # with max_tokens, skipped data changes the length
        repository.add_alert(self.job, event.code, event.message, event.at, event.step)
        self._record_event("warning", event.message, event)

    def _verified_or_changed(self, event: ResumeVerified | SettingsChanged) -> None:
        if isinstance(event, SettingsChanged):
            self._record_event("settings", f"from step {event.step + 1:,} on: {event.message}", event)
            return
        now = "not finite" if event.found is None else f"{event.found:.6f}"
        difference = "" if event.difference is None else f", difference {event.difference:g}"
        message = f"the probe of step {event.step:,} was saved with {event.expected:.6f} and is {now}{difference}"
        self._record_event("resume_verified", message, event)

    def _finished(self, event: Finished) -> None:
        if self.current:
            seconds = {"train_seconds": event.train_seconds} if event.train_seconds is not None else {}
            self.job.progress = {**self.job.progress, "step": event.step, **seconds}
        self._record_event("finished", event.message or f"{event.outcome} at step {event.step:,}", event)

    def _record_event(self, kind: str, message: str, event: Event) -> None:
        data = event.model_dump(mode="json", exclude={"kind", "seq", "at", "message"})
        draft = EventDraft(kind, message, "agent", self.attempt.number, event.seq, data)
        repository.record_event(self.session, self.job, draft, event.at)
