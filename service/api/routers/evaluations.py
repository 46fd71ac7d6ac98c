"""Routes that list the scores of a job on tasks, and that request the evaluation of a checkpoint."""

import json
from typing import Annotated

from fastapi import APIRouter, Body, Query, Response
from fastapi import Path as InPath

from trainyard.contract import patterns
from trainyard.contract.parsing import Problem, duplicate_names
from trainyard.contract.spec import JobSpec, TaskSpec, TaskSpecs
from trainyard.service.api.dependencies import AppState, StateDep
from trainyard.service.api.responses import ServiceRoute, json_response
from trainyard.service.api.routers.checkpoints import MAX_STEP, artifact_dir, find_checkpoint
from trainyard.service.api.routers.jobs import OptionalText, find_job
from trainyard.service.auth.permissions import READ, SUBMIT
from trainyard.service.auth.principal import Principal, PrincipalDep
from trainyard.service.bodies import OptionalBody
from trainyard.service.clock import utc_now
from trainyard.service.db.models import JobRow
from trainyard.service.errors import OutcomeUnknown, RequestInvalid, with_problems
from trainyard.service.evaluations import requests, store
from trainyard.service.jobs.submission import check_tasks
from trainyard.service.schemas import Evaluation, Page, TaskScore

CheckpointStep = Annotated[str, InPath(pattern=patterns.STEP_OR_LATEST)]
EvaluationId = Annotated[str, InPath(max_length=40, pattern=patterns.EVALUATION_ID)]
ScoreLimit = Annotated[int, Query(ge=1, le=1000)]

router = APIRouter(prefix="/jobs/{job_id}", tags=["evaluations"], route_class=ServiceRoute)


class EvaluationBody(OptionalBody):
    """The tasks to score the checkpoint on; null: those of the job's spec."""

    tasks: TaskSpecs | None = None


@router.get("/evaluations", dependencies=[READ])
def list_evaluations(
    state: StateDep,
    job_id: str,
    step: Annotated[int | None, Query(ge=0, le=MAX_STEP)] = None,
    task: OptionalText = None,
    limit: ScoreLimit = 1000,
    after: OptionalText = None,
    newest: bool = False,
) -> Page[TaskScore]:
    """List the scores on tasks by step and task: those of the training, and those of evaluations.

    If a score was measured again, both are listed, the older one first.
    """
    with state.database.connection() as connection:
        rows, has_more = store.page(connection, job_id, step, task, limit, after, newest)
    return Page(data=[store.to_score_response(row) for row in rows], has_more=has_more)


@router.get("/evaluations/{evaluation_id}", dependencies=[READ])
def get_evaluation(state: StateDep, job_id: str, evaluation_id: EvaluationId) -> Evaluation:
    """Return an evaluation that was requested, with its scores."""
    with state.database.connection() as connection:
        return store.to_evaluation_response(connection, job_id, evaluation_id)


@router.post("/checkpoints/{step}/evaluate", status_code=202, dependencies=[SUBMIT], response_model=Evaluation)
def evaluate_checkpoint(
    state: StateDep,
    caller: PrincipalDep,
    job_id: str,
    step: CheckpointStep,
    body: EvaluationBody = Body(default_factory=EvaluationBody),
) -> Response:
    """Score a checkpoint on tasks, on a GPU that no job needs or on the CPU, while runs continue.

    `step`: that of a checkpoint, or `latest`. The evaluation is `pending` until fewer than the allowed number run. A
    later removal of the checkpoint does not stop it.
    """
    job = find_job(state, job_id)
    requests.require_evaluator(state.settings)
    tasks = _tasks(state, caller, job, body)
    found, checkpoint = find_checkpoint(state, job_id, None if step == "latest" else int(step))
    roots, artifacts = state.settings.writable_roots, artifact_dir(state, job)
    evaluation_id = requests.hold_weights(checkpoint, artifacts, roots)
    try:
        with state.database.write() as session:
            requests.create(session, job_id, evaluation_id, found, tasks, caller.name, utc_now())
    except OutcomeUnknown:
        raise  # If the evaluation was stored, it needs the weights.
    except BaseException:
        requests.release_weights(artifacts.evaluation(evaluation_id), roots)
        raise
    state.evaluations.wake()
    with state.database.connection() as connection:
        evaluation = store.to_evaluation_response(connection, job_id, evaluation_id)
    return json_response(evaluation, 202)


def _tasks(state: AppState, caller: Principal, job: JobRow, body: EvaluationBody) -> list[TaskSpec]:
    """Return the tasks with real paths. Raises RequestInvalid, which lists bad lines of their files too."""
    tasks = body.tasks
    if tasks is None:
        tasks = JobSpec.model_validate_json(json.dumps(job.spec)).evaluation.tasks
    if not tasks:
        message = "is required: the job's spec has no evaluation.tasks"
        raise with_problems(RequestInvalid, [Problem("/tasks", message)])
    problems = [problem for problem, _ in duplicate_names((task.name for task in tasks), "/tasks", "task")]
    findings = check_tasks(tasks, "/tasks", state.host_limits(caller))
    checked: list[TaskSpec] = []
    while True:
        try:
            problems.append(next(findings)[0])
        except StopIteration as end:
            checked = end.value
            break
    if problems:
        raise with_problems(RequestInvalid, problems)
    return checked
