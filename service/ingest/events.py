"""What agents send, into the tables: each line once, in order, in the transaction that moves ``acked_seq``."""

import hmac
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, assert_never

from sqlalchemy import bindparam, delete, func, insert, select, update
from sqlalchemy.exc import InterfaceError, OperationalError, StatementError
from sqlalchemy.orm import Session

from trainyard.contract.events import (
    CheckpointRemoved,
    CheckpointSaved,
    Event,
    Finished,
    Metric,
    PhaseChanged,
    ResumeVerified,
    Sample,
    SettingsChanged,
    Started,
    WarningEvent,
)
from trainyard.contract.status import Desired, JobStatus
from trainyard.service.auth.api_keys import NO_HASH
from trainyard.service.db.models import (
    AttemptRow,
    CheckpointRow,
    JobRow,
    MetricRow,
    SampleRow,
)
from trainyard.service.errors import Unauthorized
from trainyard.service.ids import token_hash
from trainyard.service.ingest.parsing import contiguous, parse_event
from trainyard.service.jobs import repository
from trainyard.service.jobs.repository import EventDraft
from trainyard.service.metrics import rollups
from trainyard.service.metrics.progress import after_metric, after_start

# Built once: each report runs them.
ATTEMPT_BY_ID = select(AttemptRow).where(AttemptRow.id == bindparam("attempt_id"))
INSERT_METRICS = insert(MetricRow)
_OF_ATTEMPT = (MetricRow.job_id == bindparam("job_id"), MetricRow.attempt == bindparam("attempt"))
MAX_STEP_OF_ATTEMPT = select(func.max(MetricRow.step)).where(*_OF_ATTEMPT)

QUARANTINED = ("invalid", "superseded")
"""Reasons of a removal that leaves the files under another name."""


def authenticate(session: Session, attempt_id: str, token: str) -> AttemptRow:
    """The attempt, where the token is its own. Raises Unauthorized, whether there is such an attempt or not."""
    plain = attempt_id.isascii() and attempt_id.isprintable()
    attempt = session.scalar(ATTEMPT_BY_ID, {"attempt_id": attempt_id}) if plain else None
    expected = attempt.token_sha256 if attempt is not None else NO_HASH
    if not hmac.compare_digest(token_hash(token), expected) or attempt is None:
        raise Unauthorized("The token does not belong to this attempt.")
    return attempt


def lock(session: Session, attempt_id: str, job_id: str) -> tuple[JobRow, AttemptRow]:
    """The attempt and its job, held until the transaction ends; always the job first, so that nobody deadlocks."""
    job = repository.lock(session, job_id)
    attempt = session.scalar(ATTEMPT_BY_ID, {"attempt_id": attempt_id}, execution_options={"populate_existing": True})
    assert attempt is not None
    return job, attempt


def record_contact(session: Session, job: JobRow, attempt: AttemptRow, now: datetime) -> None:
    """Note that the attempt spoke. Its first word makes a starting job a running one."""
    attempt.heard_at = now
    attempt.started_at = attempt.started_at or now
    attempt.launched_at = attempt.launched_at or now
    if attempt.number != job.attempt or attempt.ended_at is not None:
        return
    job.heard_at = now
    if job.status == JobStatus.STARTING:
        note = EventDraft("status", f"attempt {attempt.number} reports", "agent", attempt.number)
        repository.transition(session, job, JobStatus.RUNNING, note, now, started_at=job.started_at or now)


def desired_of(job: JobRow, attempt: AttemptRow) -> Desired:
    """What the agent should hear. One whose attempt is over, or was replaced, has nothing left to run."""
    if attempt.number != job.attempt or attempt.ended_at is not None:
        return Desired.KILL
    return Desired(job.desired)


def ingest(session: Session, job: JobRow, attempt: AttemptRow, lines: Iterable[dict[str, Any]]) -> int:
    """Store the lines that follow what is stored. Returns how many were new; ``attempt.acked_seq`` counts them."""
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
        into = _EventBatch(session, job, attempt)
        for event in events:
            into.add(event)
        into.finish()
        into.seal()


def _store_one_by_one(session: Session, job: JobRow, attempt: AttemptRow, events: Sequence[Event]) -> None:
    """A line that the database itself refuses must not stop those behind it: it is kept as a warning."""
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
    """One batch on its way into the tables."""

    session: Session
    job: JobRow
    attempt: AttemptRow
    metrics: list[dict[str, Any]] = field(default_factory=list)
    reached: int | None = None

    def __post_init__(self) -> None:
        self.current = self.attempt.number == self.job.attempt
        self.cut = None if self.current else self._later_start()
        self.last_step = self._last_step()

    def _later_start(self) -> int | None:
        """Where a later attempt began: what this one did behind that does not count."""
        later = (AttemptRow.job_id == self.job.id, AttemptRow.number > self.attempt.number)
        return self.session.scalar(select(func.min(AttemptRow.start_step)).where(*later))

    def _last_step(self) -> int:
        own = {"job_id": self.job.id, "attempt": self.attempt.number}
        return self.session.connection().scalar(MAX_STEP_OF_ATTEMPT, own) or 0

    def add(self, event: Event) -> None:
        match event:
            case Metric():
                self._metric(event)
            case Started():
                self._started(event)
            case PhaseChanged():
                self._phase(event)
            case CheckpointSaved():
                self._saved(event)
            case CheckpointRemoved():
                self._removed(event)
            case Sample():
                self._sample(event)
            case WarningEvent():
                self._warned(event)
            case ResumeVerified() | SettingsChanged():
                self._noted(event)
            case Finished():
                self._finished(event)
            case _:
                assert_never(event)

    def finish(self) -> None:
        """Write the points that were collected."""
        if self.metrics:
            self.session.connection().execute(INSERT_METRICS, self.metrics)
            self.metrics = []

    def seal(self) -> None:
        """Sum up what has become complete of a long curve."""
        if self.reached is not None:
            rollups.roll_up(self.session, self.job, self.reached)

    def _metric(self, event: Metric) -> None:
        if event.step <= self.last_step:
            # The attempt went back by itself and does these steps again.
            self.finish()
            self._supersede(MetricRow.attempt == self.attempt.number, event.step - 1)
        self.last_step = event.step
        point = event.model_dump(exclude={"kind"})
        stitched = self.cut is None or event.step <= self.cut
        self.metrics.append({"job_id": self.job.id, "attempt": self.attempt.number, "stitched": stitched, **point})
        if stitched:
            rollups.invalidate(self.session, self.job, event.step)
        if self.current:
            self.reached = event.step
            self.job.progress = after_metric(self.job.progress, event, self.job.facts)

    def _supersede(self, which: Any, behind: int) -> None:
        rollups.invalidate(self.session, self.job, behind + 1)
        where = (MetricRow.job_id == self.job.id, which, MetricRow.step > behind)
        self.session.execute(
            update(MetricRow).where(*where).values(stitched=False).execution_options(synchronize_session=False)
        )

    def _started(self, event: Started) -> None:
        self.attempt.start_step = event.start_step
        self._supersede(MetricRow.attempt < self.attempt.number, event.start_step)
        if self.current:
            self.job.resume_step = None
            known = event.model_dump(mode="json", exclude={"kind", "seq", "at", "start_step", "resumed_from"})
            self.job.facts = {**self.job.facts, **known}
            self.job.progress = after_start(self.job.progress, event)
        origin = f"goes on from step {event.start_step:,}" if event.start_step else "starts from step 0"
        on = f"{event.world_size} rank{'s' if event.world_size != 1 else ''} on {event.device_name}"
        self._record_event("started", f"attempt {self.attempt.number} {origin}: {on}", event)

    def _phase(self, event: PhaseChanged) -> None:
        if self.current:
            self.job.phase = event.phase
            self.job.phase_detail = {"message": event.message, "done": event.done, "total": event.total}

    def _saved(self, event: CheckpointSaved) -> None:
        same = (CheckpointRow.job_id == self.job.id, CheckpointRow.path == event.path)
        self.session.execute(delete(CheckpointRow).where(*same))
        if event.checkpoint_kind == "weights" and self._weights_only(event):
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

    def _weights_only(self, event: CheckpointSaved) -> bool:
        """A full checkpoint becomes a weights-only one in its own place: the list stays in the order of steps."""
        full = (CheckpointRow.job_id == self.job.id, CheckpointRow.step == event.step, CheckpointRow.kind == "full")
        row = self.session.scalar(select(CheckpointRow).where(*full).limit(1))
        if row is None:
            return False
        row.path, row.bytes, row.sha256, row.kind = event.path, event.bytes, event.sha256, event.checkpoint_kind
        self.session.flush()
        self._record_event("checkpoint", f"of the checkpoint at step {event.step:,} the weights are kept", event)
        return True

    def _removed(self, event: CheckpointRemoved) -> None:
        same = (CheckpointRow.job_id == self.job.id, CheckpointRow.path == event.path)
        self.session.execute(delete(CheckpointRow).where(*same))
        done = "set aside" if event.why in QUARANTINED else "removed"
        self._record_event("checkpoint_removed", f"{done} the checkpoint of step {event.step:,}: {event.why}", event)

    def _sample(self, event: Sample) -> None:
        text = {"step": event.step, "prompt": event.prompt, "text": event.text, "at": event.at, "seq": event.seq}
        self.session.add(SampleRow(job_id=self.job.id, attempt=self.attempt.number, **text))

    def _warned(self, event: WarningEvent) -> None:
        repository.add_alert(self.job, event.code, event.message, event.at, event.step)
        self._record_event("warning", event.message, event)

    def _noted(self, event: ResumeVerified | SettingsChanged) -> None:
        if isinstance(event, SettingsChanged):
            self._record_event("settings", f"from step {event.step + 1:,} on: {event.message}", event)
            return
        now = "not finite" if event.found is None else f"{event.found:.6f}"
        apart = "" if event.difference is None else f", difference {event.difference:g}"
        message = f"the probe of step {event.step:,} was saved with {event.expected:.6f} and is {now}{apart}"
        self._record_event("resume_verified", message, event)

    def _finished(self, event: Finished) -> None:
        if self.current:
            self.job.progress = {**self.job.progress, "step": event.step}
        self._record_event("finished", event.message or f"{event.outcome} at step {event.step:,}", event)

    def _record_event(self, kind: str, message: str, event: Event) -> None:
        data = event.model_dump(mode="json", exclude={"kind", "seq", "at", "message"})
        note = EventDraft(kind, message, "agent", self.attempt.number, event.seq, data)
        repository.record_event(self.session, self.job, note, event.at)
