"""Routes that list the scores of a job on tasks, and that request the evaluation of a checkpoint."""

from typing import Annotated

from fastapi import APIRouter, Query

from trainyard.service.api.dependencies import StateDep
from trainyard.service.api.responses import ServiceRoute
from trainyard.service.api.routers.checkpoints import MAX_STEP
from trainyard.service.api.routers.jobs import OptionalText
from trainyard.service.auth.permissions import READ
from trainyard.service.evaluations import store
from trainyard.service.schemas import Page, TaskScore

ScoreLimit = Annotated[int, Query(ge=1, le=1000)]

router = APIRouter(prefix="/jobs/{job_id}", tags=["evaluations"], route_class=ServiceRoute)


@router.get("/evaluations", dependencies=[READ])
def list_evaluations(
    state: StateDep,
    job_id: str,
    step: Annotated[int | None, Query(ge=0, le=MAX_STEP)] = None,
    task: OptionalText = None,
    limit: ScoreLimit = 1000,
    after: OptionalText = None,
) -> Page[TaskScore]:
    """List the scores on tasks by step and task: those of the training, and those of evaluations.

    If a score was measured again, both are listed, the older one first.
    """
    with state.database.connection() as connection:
        rows, has_more = store.page(connection, job_id, step, task, limit, after)
    return Page(data=[store.to_score_response(row) for row in rows], has_more=has_more)
