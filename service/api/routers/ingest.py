"""Routes for agents: outbox lines, heartbeats and exit reports. Each attempt has its own token.

An agent proves that it has the token, and gets a proof that the answer is its service's, see `contract.attempt_proof`.
"""

import asyncio
from collections.abc import Callable, Coroutine
from datetime import datetime, timedelta
from typing import Annotated, Any, TypeVar

from fastapi import APIRouter, Depends, Request, Response
from pydantic import ValidationError
from sqlalchemy.orm import Session

from trainyard.contract.attempt_proof import ANSWER_HEADER, RequestProof
from trainyard.contract.messages import Ack, EventBatch, ExitReport, Heartbeat, Message, RunSettings
from trainyard.contract.parsing import Problem, plain, pointer_to
from trainyard.service.api.dependencies import AppState, StateDep
from trainyard.service.api.middleware import bearer
from trainyard.service.api.responses import ServiceRoute
from trainyard.service.auth.permissions import ATTEMPT
from trainyard.service.bodies import JsonBody
from trainyard.service.clock import utc_now
from trainyard.service.db.models import AttemptRow, JobRow
from trainyard.service.errors import RequestInvalid, Unauthorized, with_problems
from trainyard.service.ingest import events as ingest
from trainyard.service.ingest import exits
from trainyard.service.jobs import repository
from trainyard.service.metrics.progress import after_heartbeat
from trainyard.service.observability.logging import bind

CONTACT_INTERVAL = timedelta(seconds=2)
"""Heartbeats at shorter intervals are acknowledged but not stored: each write is a commit to the disk."""

MAX_PROBLEMS = 20

M = TypeVar("M", bound=Message)

PROOF = "trainyard.proof"
"""Key in the ASGI scope: the request's proof and the attempt's key."""


class ProvenRoute(ServiceRoute):
    """A route whose responses prove that this service sent them."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def handle_and_prove(request: Request) -> Response:
            response = await handle(request)
            if PROOF in request.scope:
                proof, key = request.scope[PROOF]
                response.headers[ANSWER_HEADER] = proof.answer(key, bytes(response.body))
            return response

        return handle_and_prove


router = APIRouter(
    prefix="/internal/attempts/{attempt_id}", include_in_schema=False, dependencies=[ATTEMPT], route_class=ProvenRoute
)


async def _authenticated_attempt(state: StateDep, request: Request, attempt_id: str) -> AttemptRow:
    header = request.headers.get("authorization", "")
    resource = request.url.path.rsplit("/", 1)[1]
    proof = RequestProof.parse(f"{attempt_id}/{resource}", header)
    attempt = await asyncio.to_thread(_authenticate, state, attempt_id, proof or bearer(header))
    if proof is not None:
        if not proof.covers(await request.body()):
            raise Unauthorized("The body differs from the one that the agent sent.")
        request.scope[PROOF] = proof, attempt.token_sha256
    return attempt


def _authenticate(state: AppState, attempt_id: str, credentials: RequestProof | str) -> AttemptRow:
    with state.database.read() as session:
        attempt = ingest.authenticate(session, attempt_id, credentials)
    bind(actor="agent", job_id=attempt.job_id, attempt=attempt.number)
    return attempt


AuthenticatedAttempt = Annotated[AttemptRow, Depends(_authenticated_attempt)]
"""The attempt that reports. Must precede the body parameter, so that the token is checked before the body is read."""


@router.post("/events")
def events(state: StateDep, reporter: AuthenticatedAttempt, body: JsonBody) -> Ack:
    """Store outbox lines. ``acked`` is the number of the last line that is committed."""
    batch = _message(EventBatch, body)

    def work(session: Session, job: JobRow, attempt: AttemptRow) -> None:
        ingest.record_contact(session, job, attempt, utc_now())
        ingest.ingest(session, job, attempt, batch.events)

    acked = _report(state, reporter, work)
    state.broadcaster.notify(reporter.job_id)
    state.metrics.lag.observe(_age(batch.events[-1].get("at")))
    return acked


def _age(at: object) -> float:
    """Return the seconds since a line was written, or 0 if it has no valid time."""
    try:
        written = datetime.fromisoformat(at) if isinstance(at, str) else utc_now()
        return max(0.0, (utc_now() - written).total_seconds())
    except (ValueError, TypeError, OverflowError):
        return 0.0


@router.post("/heartbeat")
def heartbeat(state: StateDep, reporter: AuthenticatedAttempt, body: JsonBody) -> Ack:
    """Record a heartbeat."""
    beat = _message(Heartbeat, body)
    now = utc_now()
    # A time in the future was stored before the clock was set back.
    if reporter.heard_at is not None and abs(now - reporter.heard_at) < CONTACT_INTERVAL:
        with state.database.read() as session:
            return _ack(repository.find(session, reporter.job_id), reporter)

    def work(session: Session, job: JobRow, attempt: AttemptRow) -> None:
        ingest.record_contact(session, job, attempt, now)
        if attempt.number == job.attempt:
            job.progress = after_heartbeat(job.progress, beat.step, now)

    return _report(state, reporter, work)


@router.post("/exit")
def exit_report(state: StateDep, reporter: AuthenticatedAttempt, body: JsonBody) -> Ack:
    """Close the attempt: it has ended and none of its processes is left."""
    report = _message(ExitReport, body)

    def work(session: Session, job: JobRow, attempt: AttemptRow) -> None:
        # If lines are missing, the scheduler reads them from the run directory first and closes the attempt itself.
        if attempt.acked_seq >= report.last_seq:
            stops = not state.scheduler.launches
            exits.close_attempt(session, job, attempt, report, utc_now(), state.scheduler.timing, service_stops=stops)

    acked = _report(state, reporter, work)
    state.broadcaster.notify(reporter.job_id)
    state.scheduler.wake()
    return acked


def _message(kind: type[M], body: object) -> M:
    try:
        return kind.model_validate(body)
    except ValidationError as error:
        details = error.errors(include_input=False, include_url=False, include_context=False)[:MAX_PROBLEMS]
        problems = [Problem(pointer_to(*detail["loc"]), plain(detail["msg"])) for detail in details]
        raise with_problems(RequestInvalid, problems) from None


Work = Callable[[Session, JobRow, AttemptRow], None]


def _report(state: AppState, reporter: AttemptRow, work: Work) -> Ack:
    with state.database.write() as session:
        job, attempt = ingest.lock(session, reporter.id, reporter.job_id)
        work(session, job, attempt)
        session.flush()
        return _ack(job, attempt)


def _ack(job: JobRow, attempt: AttemptRow) -> Ack:
    desired = ingest.desired_of(job, attempt)
    return Ack(acked=attempt.acked_seq, desired=desired, settings=RunSettings.of(job.spec))
