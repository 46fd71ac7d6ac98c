"""The routes of what a job leaves behind: checkpoints, events, attempts, samples."""

from fastapi import APIRouter
from sqlalchemy import select

from trainyard.contract.parsing import Problem
from trainyard.service.api.dependencies import StateDep
from trainyard.service.api.responses import ServiceRoute
from trainyard.service.api.routers.jobs import Limit, OptionalText
from trainyard.service.auth.permissions import READ
from trainyard.service.db.models import (
    AttemptRow,
    CheckpointRow,
    EventRow,
    SampleRow,
)
from trainyard.service.errors import RequestInvalid, with_problems
from trainyard.service.jobs import presenters, repository
from trainyard.service.jobs.listing import page_of
from trainyard.service.schemas import (
    Attempt,
    Checkpoint,
    Event,
    Page,
    Sample,
)

router = APIRouter(prefix="/jobs/{job_id}", tags=["products"], dependencies=[READ], route_class=ServiceRoute)


@router.get("/checkpoints")
def checkpoints(services: StateDep, job_id: str, limit: Limit = 100, after: OptionalText = None) -> Page[Checkpoint]:
    """Published checkpoints that are there, newest first."""
    with services.database.connection() as connection:
        rows, more = page_of(connection, CheckpointRow, job_id, limit, after, newest_first=True)
    # The disk is looked at outside of the transaction: somebody may have removed one by hand.
    return Page(
        data=[presenters.to_checkpoint_response(row) for row in rows if presenters.exists_on_disk(row)], has_more=more
    )


@router.get("/events")
def events(services: StateDep, job_id: str, limit: Limit = 100, after: OptionalText = None) -> Page[Event]:
    """What happened, oldest first: changes of status, warnings, saves, restarts, and who asked."""
    with services.database.connection() as connection:
        rows, more = page_of(connection, EventRow, job_id, limit, after)
    return Page(data=[presenters.to_event_response(row) for row in rows], has_more=more)


@router.get("/samples")
def samples(services: StateDep, job_id: str, limit: Limit = 100, after: OptionalText = None) -> Page[Sample]:
    """Texts the model wrote, oldest first."""
    with services.database.connection() as connection:
        rows, more = page_of(connection, SampleRow, job_id, limit, after)
    return Page(data=[presenters.to_sample_response(row) for row in rows], has_more=more)


@router.get("/attempts")
def attempts(services: StateDep, job_id: str, limit: Limit = 100, after: OptionalText = None) -> Page[Attempt]:
    """Every launch, oldest first: why it began, from which step, how it ended."""
    with services.database.read() as session:
        job = repository.find(session, job_id)
        query = select(AttemptRow).where(AttemptRow.job_id == job.id)
        if after is not None:
            last = session.scalar(query.where(AttemptRow.id == after))
            if last is None:
                raise with_problems(RequestInvalid, [Problem("/query/after", "must be an id from this list")])
            query = query.where(AttemptRow.number > last.number)
        rows = session.scalars(query.order_by(AttemptRow.number).limit(limit + 1)).all()
    return Page(data=[presenters.to_attempt_response(row) for row in rows[:limit]], has_more=len(rows) > limit)
