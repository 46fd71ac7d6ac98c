"""What agents call: their outbox lines, their signs of life, their last word. Each with its attempt's own token."""

from collections.abc import Callable
from datetime import datetime, timedelta
from typing import Annotated

from fastapi import APIRouter, Depends, Request
from sqlalchemy.orm import Session

from contract.report import Ack, EventBatch, ExitReport, Heartbeat
from service import logs
from service.answers import threaded, written
from service.context import Services, ServicesNeeded
from service.jobs import store
from service.metrics.progress import after_heartbeat
from service.reports import ending, ingest
from service.scheduler.apply import utc_now
from service.tables import AttemptRow, JobRow
from service.web import JsonBody, as_model, bearer

HEARD_AGAIN = timedelta(seconds=2)
"""Signs of life that come closer together are answered and not written: each write is a commit to the disk."""

router = APIRouter(prefix="/internal/attempts/{attempt_id}", include_in_schema=False)


@threaded
def _reporting(services: ServicesNeeded, request: Request, attempt_id: str) -> AttemptRow:
    """The attempt, for the one who has its token; asked before any of the body is read. Raises Unauthorized."""
    with services.database.read() as session:
        attempt = ingest.authenticate(session, attempt_id, bearer(request.headers.get("authorization")))
    logs.note(actor="agent", job_id=attempt.job_id, attempt=attempt.number)
    return attempt


Reporting = Annotated[AttemptRow, Depends(_reporting)]
"""The attempt that reports. Stands in front of the body."""


@router.post("/events")
@written()
def events(services: ServicesNeeded, reporting: Reporting, body: JsonBody) -> Ack:
    """Store lines. ``acked`` is the last one that is stored for good."""
    batch = as_model(EventBatch, body)

    def work(session: Session, job: JobRow, attempt: AttemptRow) -> None:
        ingest.hear(session, job, attempt, utc_now())
        ingest.ingest(session, job, attempt, batch.events)

    acked = _report(services, reporting, work)
    services.pulse.nudge(reporting.job_id)
    services.telemetry.lag.observe(_age(batch.events[-1].get("at")))
    return acked


def _age(at: object) -> float:
    """Seconds since a line was written, as far as it says so."""
    try:
        written = datetime.fromisoformat(at) if isinstance(at, str) else utc_now()
        return max(0.0, (utc_now() - written).total_seconds())
    except (ValueError, TypeError, OverflowError):
        return 0.0


@router.post("/heartbeat")
@written()
def heartbeat(services: ServicesNeeded, reporting: Reporting, body: JsonBody) -> Ack:
    """Note a sign of life."""
    beat = as_model(Heartbeat, body)
    now = utc_now()
    if reporting.heard_at is not None and now - reporting.heard_at < HEARD_AGAIN:
        with services.database.read() as session:
            return _answer(store.find(session, reporting.job_id), reporting)

    def work(session: Session, job: JobRow, attempt: AttemptRow) -> None:
        ingest.hear(session, job, attempt, now)
        if attempt.number == job.attempt:
            job.progress = after_heartbeat(job.progress, beat.step, now)

    return _report(services, reporting, work)


@router.post("/exit")
@written()
def exit_(services: ServicesNeeded, reporting: Reporting, body: JsonBody) -> Ack:
    """The attempt has ended and nothing of it lives. Where lines are missing, the scheduler fetches them first."""
    report = as_model(ExitReport, body)

    def work(session: Session, job: JobRow, attempt: AttemptRow) -> None:
        if attempt.acked_seq >= report.last_seq:
            ending.end(session, job, attempt, report, utc_now(), services.scheduler.timing)

    acked = _report(services, reporting, work)
    services.pulse.nudge(reporting.job_id)
    services.scheduler.wake()
    return acked


Work = Callable[[Session, JobRow, AttemptRow], None]


def _report(services: Services, reporting: AttemptRow, work: Work) -> Ack:
    """Do ``work`` on the attempt and its job in one transaction."""
    with services.database.write() as session:
        job, attempt = ingest.lock(session, reporting.id, reporting.job_id)
        work(session, job, attempt)
        session.flush()
        return _answer(job, attempt)


def _answer(job: JobRow, attempt: AttemptRow) -> Ack:
    desired = ingest.desired_of(job, attempt)
    return Ack(acked=attempt.acked_seq, desired=desired, settings=ingest.settings_of(job))
