"""The routes of a job's life. Each reads or changes in one transaction and answers after its commit."""

import os
import re
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Body, Header, Query, Response
from sqlalchemy.orm import Session

from trainyard.contract.parsing import Problem
from trainyard.contract.spec import JobSpec
from trainyard.contract.status import JobStatus
from trainyard.service.api.dependencies import AppState, StateDep
from trainyard.service.api.responses import ServiceRoute, json_response
from trainyard.service.auth.permissions import READ, SUBMIT
from trainyard.service.auth.principal import Principal, PrincipalDep
from trainyard.service.bodies import NO_FIELDS, JsonBody
from trainyard.service.clock import utc_now
from trainyard.service.db.models import JobRow
from trainyard.service.errors import (
    KeyReused,
    QuotaExceeded,
    RequestInvalid,
    ServiceError,
    StepUnavailable,
    with_problems,
)
from trainyard.service.jobs import (
    actions,
    deletion,
    listing,
    presenters,
    queries,
    repository,
    resume_compat,
)
from trainyard.service.jobs import actions as changes
from trainyard.service.jobs.actions import PatchJobBody, ResumeBody
from trainyard.service.jobs.lifecycle import Action
from trainyard.service.jobs.queries import JobRows
from trainyard.service.jobs.submission import initial_plan, kind_of, validate_spec
from trainyard.service.launch.slurm.launcher import SLURM
from trainyard.service.observability.logging import bind
from trainyard.service.schemas import Job, Page

NO_GPU = "there is no GPU on this host: this run will use the CPU"
KEY = re.compile(r"[\x21-\x7e]{1,255}")

OptionalText = Annotated[str | None, Query(max_length=300, pattern=r"^[^\x00]*$")]
Labels = Annotated[list[Annotated[str, Query(max_length=500)]], Query()]
Limit = Annotated[int, Query(ge=1, le=100)]

SPEC_BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {"application/json": {"schema": {"$ref": "#/components/schemas/JobSpec"}}},
    }
}
"""What the OpenAPI document says of a body that is a job spec, which the endpoint parses itself."""

_LOCATION = {"Location": {"description": "Address of the job.", "schema": {"type": "string"}}}
SUBMITTED: dict[int | str, dict[str, Any]] = {
    201: {"headers": _LOCATION},
    200: {"model": Job, "headers": _LOCATION, "description": "It was submitted before, under the same key."},
}

router = APIRouter(tags=["jobs"], route_class=ServiceRoute)


@router.post(
    "/jobs",
    status_code=201,
    dependencies=[SUBMIT],
    response_model=Job,
    responses=SUBMITTED,
    openapi_extra=SPEC_BODY,
)
def submit(
    services: StateDep,
    caller: PrincipalDep,
    body: JsonBody,
    idempotency_key: Annotated[str | None, Header()] = None,
) -> Response:
    """Launch a run. The same `Idempotency-Key` with the same body answers 200 and the job that is there."""
    digest = repository.body_digest(body)
    made = find_replay(services, idempotency_key, digest)
    if made is None:
        made = _create(services, caller, validate_spec(body, services.host_limits), idempotency_key, digest)
        services.scheduler.wake()
    bind(job_id=made.job_id)
    return created_response(services, made)


@dataclass(frozen=True)
class Submission:
    """A submission's job, and whether this request made it; ``found``: what is shown of it, as it was committed."""

    job_id: str
    created_now: bool
    rows: JobRows | None = None


def created_response(services: AppState, made: Submission) -> Response:
    """The answer to who submitted it: 201, or 200 where it was there before."""
    job = _to_response(services, made.rows) if made.rows is not None else load_response(services, made.job_id)
    return json_response(job, 201 if made.created_now else 200, {"Location": f"/jobs/{made.job_id}"})


def find_replay(services: AppState, key: str | None, digest: str) -> Submission | None:
    """The job that was made under this key. Raises RequestInvalid for what is no key, KeyReused for another body."""
    if key is None:
        return None
    if not KEY.fullmatch(key):
        message = "must be 1 to 255 printable ASCII characters"
        raise with_problems(RequestInvalid, [Problem("/header/Idempotency-Key", message)])
    with services.database.read() as session:
        job = repository.find_by_idempotency_key(session, key, digest, replay_cutoff(services))
        return Submission(job.id, False) if job is not None else None


def replay_cutoff(services: AppState) -> datetime:
    """What was made before is not replayed any more."""
    return utc_now() - timedelta(days=services.settings.idempotency_days)


def _create(services: AppState, by: Principal, spec: JobSpec, key: str | None, digest: str) -> Submission:
    kind = kind_of(spec, services.host_limits)
    facts = initial_plan(spec, kind)
    now = utc_now()
    falls_back = kind == "cpu" and spec.resources.device == "auto" and spec.resources.launcher != SLURM
    alerts = [repository.new_alert("cpu_fallback", NO_GPU, now)] if falls_back else []
    try:
        with services.database.write() as session:
            job = repository.create(session, spec, facts, alerts, by, now)
            if key is not None:
                repository.forget_keys(session, replay_cutoff(services))
            if key is not None and not repository.remember_key(session, key, digest, job, now):
                raise KeyReused()
            found = load_changed(session, job.id)
    except (KeyReused, QuotaExceeded):
        # Another request with this key was faster by a moment; its job is the one.
        made = find_replay(services, key, digest)
        if made is None:
            raise
        return made
    return Submission(job.id, True, found)


def load_changed(session: Session, job_id: str) -> JobRows:
    """What is to be shown of a job once this transaction is committed."""
    session.flush()
    return queries.job_rows(session.connection(), job_id)


def load_response(services: AppState, job_id: str) -> Job:
    """The job as it is now."""
    with services.database.connection() as connection:
        found = queries.job_rows(connection, job_id)
    return _to_response(services, found)


def _to_response(services: AppState, found: JobRows) -> Job:
    return presenters.to_job_responses(found, services.scheduler.waiting)[0]


@router.get("/jobs", dependencies=[READ])
def list_jobs(
    services: StateDep,
    status: Annotated[list[JobStatus], Query()] = [],  # noqa: B006 - FastAPI copies it
    label: Labels = [],  # noqa: B006
    name: OptionalText = None,
    order: Literal["newest", "oldest"] = "newest",
    limit: Limit = 20,
    after: OptionalText = None,
    parent: OptionalText = None,
    search: OptionalText = None,
) -> Page[Job]:
    """Jobs; `label=key=value` may stand several times and all must hold. `parent`: the forks of this job.

    `search`: a part of the name, in capitals or not, or the beginning of the id.
    """
    labels = listing.label_pairs(label)
    wanted = listing.JobFilter(tuple(status), labels, name, order == "newest", limit, after, parent, search)
    with services.database.connection() as connection:
        jobs, has_more = listing.jobs(connection, wanted)
        found = queries.load_related(connection, jobs)
    return Page(data=presenters.to_job_responses(found, services.scheduler.waiting), has_more=has_more)


@router.get("/jobs/{job_id}", dependencies=[READ])
def get_job(services: StateDep, job_id: str) -> Job:
    """One job."""
    return load_response(services, job_id)


@router.patch("/jobs/{job_id}", dependencies=[SUBMIT])
def patch_job(
    services: StateDep,
    caller: PrincipalDep,
    job_id: str,
    body: PatchJobBody = Body(default_factory=PatchJobBody),
) -> Job:
    """Change `name`, `labels`, `priority`, `log_interval`, `save_interval`, `keep_last`; a live run takes them over."""
    asked = body.given()
    with services.database.connection() as connection:
        before = queries.spec_of(connection, job_id)
    spec = changes.changed_spec(before, asked, changes.PATCH_FIELDS, services.host_limits)
    with services.database.write() as session:
        actions.patch(session, job_id, before, asked, spec, caller, utc_now())
        found = load_changed(session, job_id)
    if "priority" in asked:
        services.scheduler.wake()
    return _to_response(services, found)


@router.post("/jobs/{job_id}/pause", status_code=202, dependencies=[SUBMIT, NO_FIELDS])
def pause(services: StateDep, caller: PrincipalDep, job_id: str) -> Job:
    """Save and stop; the job can be resumed."""
    return _stop(services, caller, job_id, "pause")


@router.post("/jobs/{job_id}/cancel", status_code=202, dependencies=[SUBMIT, NO_FIELDS])
def cancel(services: StateDep, caller: PrincipalDep, job_id: str) -> Job:
    """Save and stop for good."""
    return _stop(services, caller, job_id, "cancel")


@router.post("/jobs/{job_id}/kill", status_code=202, dependencies=[SUBMIT, NO_FIELDS])
def kill(services: StateDep, caller: PrincipalDep, job_id: str) -> Job:
    """Stop now; nothing is saved."""
    return _stop(services, caller, job_id, "kill")


def _stop(services: AppState, by: Principal, job_id: str, action: Action) -> Job:
    with services.database.write() as session:
        actions.stop(session, job_id, action, by, utc_now())
        found = load_changed(session, job_id)
    services.scheduler.wake()
    return _to_response(services, found)


@router.post("/jobs/{job_id}/save", status_code=202, dependencies=[SUBMIT, NO_FIELDS])
def save(services: StateDep, caller: PrincipalDep, job_id: str) -> Job:
    """Write a checkpoint at the next step, and go on."""
    with services.database.write() as session:
        attempt = actions.save(session, job_id, caller, utc_now())
        found = load_changed(session, job_id)
    services.scheduler.save_now(attempt)
    return _to_response(services, found)


@router.post("/jobs/{job_id}/resume", status_code=202, dependencies=[SUBMIT])
def resume(
    services: StateDep,
    caller: PrincipalDep,
    job_id: str,
    body: ResumeBody = Body(default_factory=ResumeBody),
) -> Job:
    """Go on from the newest valid checkpoint, or anew where there is none; or back at the checkpoint of `step`.

    Newer checkpoints than `step` are set aside on disk when the attempt begins, and no longer listed. 409 `run_differs`
    where the corpus, the vocabulary or the shape is not the one that the checkpoint was saved with.
    """
    asked, step = body.given(), body.step
    with services.database.read() as session:
        under_way = actions.resume_in_progress(session, job_id, bool(asked))
    if not under_way:
        job = _job_row_of(services, job_id)
        _require_there(services, job_id, step)
        _require_same(services, job, step)
        spec = changes.resumed_spec(job.spec, actions.own_steps(job), asked, services.host_limits)
        with services.database.write() as session:
            actions.resume(session, job_id, job.spec, spec, step, caller, utc_now())
        services.scheduler.wake()
    return load_response(services, job_id)


def _require_there(services: AppState, job_id: str, step: int | None) -> None:
    """Raise StepUnavailable where the checkpoint of ``step`` is not on disk any more."""
    if step is None:
        return
    with services.database.read() as session:
        path = actions.checkpoint_path(session, job_id, step)
    if path is None or not os.path.exists(path):
        raise StepUnavailable()


def _require_same(services: AppState, job: JobRow, step: int | None) -> None:
    """Raise RunDiffers where its checkpoint was saved with another corpus, vocabulary or shape."""
    with services.database.read() as session:
        candidates = resume_compat.resume_candidates(session, services.settings, job, step)
    resume_compat.check_compatible(candidates, job.spec, services.settings)


def _job_row_of(services: AppState, job_id: str) -> JobRow:
    with services.database.read() as session:
        return repository.find(session, job_id)


@router.delete("/jobs/{job_id}", status_code=204, dependencies=[SUBMIT])
def delete(services: StateDep, job_id: str) -> None:
    """Remove the record and the files of a job that has ended."""
    job = _job_row_of(services, job_id)
    with deletion.mark_for_deletion(services.settings, job.id, job.spec["checkpoint"]["save_dir"]) as doomed:
        try:
            with services.database.write() as session:
                actions.remove(session, job_id)
        except ServiceError:
            doomed.forget()
            raise
        doomed.delete_files()
