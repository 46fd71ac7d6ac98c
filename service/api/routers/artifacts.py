"""Routes that list a job's checkpoints, events, samples and attempts."""

from fastapi import APIRouter
from sqlalchemy import Connection, select

from trainyard.contract.parsing import Problem
from trainyard.service.api.dependencies import StateDep
from trainyard.service.api.responses import ServiceRoute
from trainyard.service.api.routers.jobs import Limit, OptionalText
from trainyard.service.api.shared_reads import shared
from trainyard.service.auth.permissions import READ
from trainyard.service.db.models import AttemptRow, CheckpointRow, EventRow, SampleRow
from trainyard.service.errors import RequestInvalid, with_problems
from trainyard.service.jobs import presenters, queries, repository
from trainyard.service.jobs.listing import page_of
from trainyard.service.schemas import Attempt, Checkpoint, Event, Page, Sample

router = APIRouter(prefix="/jobs/{job_id}", dependencies=[READ], route_class=ServiceRoute)


@router.get("/checkpoints", tags=["checkpoints"])
@shared()
def list_checkpoints(state: StateDep, job_id: str, limit: Limit = 100, after: OptionalText = None) -> Page[Checkpoint]:
    """List the published checkpoints that exist on disk, newest first."""
    found: list[Checkpoint] = []
    more = True
    while more and len(found) < limit:
        with state.database.connection() as connection:
            rows, more = page_of(connection, CheckpointRow, job_id, limit, after, newest_first=True)
        # A checkpoint may have been removed by hand. The disk is read outside of the transaction: it may be slow.
        # An empty page would have no cursor, so read on until a checkpoint is found.
        found += [presenters.to_checkpoint_response(row) for row in rows if presenters.exists_on_disk(row)]
        after = str(rows[-1].number) if rows else after
    return Page(data=found[:limit], has_more=more or len(found) > limit)


def events_part(connection: Connection, job_id: str, _query: bytes) -> object:
    """Return what changes with the job's events. None for a job that has none: it may not exist."""
    newest, count = connection.execute(queries.EVENTS_OF_JOB, {"job_id": job_id}).one()
    return (newest, count) if count else None


@router.get("/events", tags=["events"])
@shared(events_part)
def list_events(state: StateDep, job_id: str, limit: Limit = 100, after: OptionalText = None) -> Page[Event]:
    """List the events, oldest first: changes of status, warnings, saves and restarts, each with its actor."""
    with state.database.connection() as connection:
        rows, more = page_of(connection, EventRow, job_id, limit, after)
    return Page(data=[presenters.to_event_response(row) for row in rows], has_more=more)


@router.get("/samples", tags=["samples"])
@shared()
def list_samples(state: StateDep, job_id: str, limit: Limit = 100, after: OptionalText = None) -> Page[Sample]:
    """List the texts that the model generated, oldest first."""
    with state.database.connection() as connection:
        rows, more = page_of(connection, SampleRow, job_id, limit, after)
    return Page(data=[presenters.to_sample_response(row) for row in rows], has_more=more)


@router.get("/attempts", tags=["attempts"])
@shared()
def list_attempts(state: StateDep, job_id: str, limit: Limit = 100, after: OptionalText = None) -> Page[Attempt]:
    """List the attempts, oldest first: why each was launched, its start step, and how it ended."""
    with state.database.read() as session:
        job = repository.find(session, job_id)
        query = select(AttemptRow).where(AttemptRow.job_id == job.id)
        if after is not None:
            last = session.scalar(query.where(AttemptRow.id == after))
            if last is None:
                raise with_problems(RequestInvalid, [Problem("/query/after", "must be an id from this list")])
            query = query.where(AttemptRow.number > last.number)
        rows = session.scalars(query.order_by(AttemptRow.number).limit(limit + 1)).all()
    return Page(data=[presenters.to_attempt_response(row) for row in rows[:limit]], has_more=len(rows) > limit)
