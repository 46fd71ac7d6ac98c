"""What agents call: their outbox lines, their signs of life, their last word. Each with its attempt's own token."""

import asyncio
from collections.abc import Callable
from datetime import datetime, timedelta
from typing import Annotated, TypeVar

from fastapi import APIRouter, Depends, Request
from pydantic import ValidationError
from sqlalchemy.orm import Session

from trainyard.contract.messages import (
    Ack,
    EventBatch,
    ExitReport,
    Heartbeat,
    Message,
    RunSettings,
)
from trainyard.contract.parsing import Problem, plain, pointer_to
from trainyard.service.api.dependencies import AppState, StateDep
from trainyard.service.api.middleware import bearer
from trainyard.service.api.responses import ServiceRoute
from trainyard.service.auth.permissions import ATTEMPT
from trainyard.service.bodies import JsonBody
from trainyard.service.clock import utc_now
from trainyard.service.db.models import AttemptRow, JobRow
from trainyard.service.errors import RequestInvalid, with_problems
from trainyard.service.ingest import events as ingest
from trainyard.service.ingest import exits
from trainyard.service.jobs import repository
from trainyard.service.metrics.progress import after_heartbeat
from trainyard.service.observability.logging import bind

CONTACT_INTERVAL = timedelta(seconds=2)
"""Signs of life that come closer together are answered and not written: each write is a commit to the disk."""

MAX_PROBLEMS = 20

M = TypeVar("M", bound=Message)

router = APIRouter(
    prefix="/internal/attempts/{attempt_id}", include_in_schema=False, dependencies=[ATTEMPT], route_class=ServiceRoute
)


async def _reporting(services: StateDep, request: Request, attempt_id: str) -> AttemptRow:
    """Return the attempt if the request has its token; runs before the body is read. Raises Unauthorized."""
    token = bearer(request.headers.get("authorization"))
    return await asyncio.to_thread(_authenticated, services, attempt_id, token)


def _authenticated(services: AppState, attempt_id: str, token: str) -> AttemptRow:
    with services.database.read() as session:
        attempt = ingest.authenticate(session, attempt_id, token)
    bind(actor="agent", job_id=attempt.job_id, attempt=attempt.number)
    return attempt


Reporting = Annotated[AttemptRow, Depends(_reporting)]
"""The attempt that reports. Stands in front of the body."""


@router.post("/events")
def events(services: StateDep, reporting: Reporting, body: JsonBody) -> Ack:
    """Store lines. ``acked`` is the last one that is stored for good."""
    batch = _message(EventBatch, body)

    def work(session: Session, job: JobRow, attempt: AttemptRow) -> None:
        ingest.record_contact(session, job, attempt, utc_now())
        ingest.ingest(session, job, attempt, batch.events)

    acked = _report(services, reporting, work)
    services.broadcaster.nudge(reporting.job_id)
    services.metrics.lag.observe(_age(batch.events[-1].get("at")))
    return acked


def _age(at: object) -> float:
    """Seconds since a line was written, as far as it says so."""
    try:
        written = datetime.fromisoformat(at) if isinstance(at, str) else utc_now()
        return max(0.0, (utc_now() - written).total_seconds())
    except (ValueError, TypeError, OverflowError):
        return 0.0


@router.post("/heartbeat")
def heartbeat(services: StateDep, reporting: Reporting, body: JsonBody) -> Ack:
    """Note a sign of life."""
    beat = _message(Heartbeat, body)
    now = utc_now()
    if reporting.heard_at is not None and now - reporting.heard_at < CONTACT_INTERVAL:
        with services.database.read() as session:
            return _ack(repository.find(session, reporting.job_id), reporting)

    def work(session: Session, job: JobRow, attempt: AttemptRow) -> None:
        ingest.record_contact(session, job, attempt, now)
        if attempt.number == job.attempt:
            job.progress = after_heartbeat(job.progress, beat.step, now)

    return _report(services, reporting, work)


@router.post("/exit")
def exit_report(services: StateDep, reporting: Reporting, body: JsonBody) -> Ack:
    """The attempt has ended and nothing of it lives. Where lines are missing, the scheduler fetches them first."""
    report = _message(ExitReport, body)

    def work(session: Session, job: JobRow, attempt: AttemptRow) -> None:
        if attempt.acked_seq >= report.last_seq:
            exits.close_attempt(session, job, attempt, report, utc_now(), services.scheduler.timing)

    acked = _report(services, reporting, work)
    services.broadcaster.nudge(reporting.job_id)
    services.scheduler.wake()
    return acked


def _message(kind: type[M], body: object) -> M:
    """Return the body as a message. Raises RequestInvalid with the first mistakes."""
    try:
        return kind.model_validate(body)
    except ValidationError as error:
        found = error.errors(include_input=False, include_url=False, include_context=False)[:MAX_PROBLEMS]
        raise with_problems(RequestInvalid, [Problem(pointer_to(*e["loc"]), plain(e["msg"])) for e in found]) from None


Work = Callable[[Session, JobRow, AttemptRow], None]


def _report(services: AppState, reporting: AttemptRow, work: Work) -> Ack:
    """Do ``work`` on the attempt and its job in one transaction."""
    with services.database.write() as session:
        job, attempt = ingest.lock(session, reporting.id, reporting.job_id)
        work(session, job, attempt)
        session.flush()
        return _ack(job, attempt)


def _ack(job: JobRow, attempt: AttemptRow) -> Ack:
    desired = ingest.desired_of(job, attempt)
    return Ack(acked=attempt.acked_seq, desired=desired, settings=RunSettings.of(job.spec))
