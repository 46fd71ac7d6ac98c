"""Routes that submit, list, change, stop, resume and delete jobs. Each responds after its commit."""

import os
import re
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Body, Header, Query, Response
from sqlalchemy.orm import Session

from trainyard.contract.parsing import Problem
from trainyard.contract.patterns import WITHOUT_NUL
from trainyard.contract.spec import JobSpec, epochs_ignored, gives_both_lengths
from trainyard.contract.status import JobStatus
from trainyard.service.api.dependencies import AppState, StateDep
from trainyard.service.api.ownership import OWN_JOB
from trainyard.service.api.responses import ServiceRoute, json_response
from trainyard.service.api.routers.corpora import ensure_corpus
from trainyard.service.api.shared_reads import shared
from trainyard.service.auth.permissions import READ, SUBMIT
from trainyard.service.auth.principal import Principal, PrincipalDep
from trainyard.service.bodies import NO_FIELDS, JsonBody
from trainyard.service.clock import utc_now
from trainyard.service.db.models import JobRow
from trainyard.service.errors import (
    KeyReused,
    OutcomeUnknown,
    QuotaExceeded,
    RequestInvalid,
    ServiceError,
    StepUnavailable,
    with_problems,
)
from trainyard.service.jobs import actions, deletion, listing, presenters, queries, repository, resume_compat
from trainyard.service.jobs.actions import PatchJobBody, ResumeBody
from trainyard.service.jobs.lifecycle import Action
from trainyard.service.jobs.queries import JobRows
from trainyard.service.jobs.repository import EventDraft
from trainyard.service.jobs.submission import initial_plan, kind_of, read_inputs, validate_spec
from trainyard.service.launch.slurm.launcher import SLURM
from trainyard.service.observability.logging import bind
from trainyard.service.schemas import Job, JobSummary, Page, ResumedJob

NO_GPU = "there is no GPU on this host: this run will use the CPU"
KEY = re.compile(r"[\x21-\x7e]{1,255}")

OptionalText = Annotated[str | None, Query(max_length=300, pattern=WITHOUT_NUL)]
Labels = Annotated[list[Annotated[str, Query(max_length=500)]], Query()]
Limit = Annotated[int, Query(ge=1, le=100)]
OptionalLimit = Annotated[int | None, Query(ge=1, le=100)]

SPEC_BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {"application/json": {"schema": {"$ref": "#/components/schemas/JobSpec"}}},
    }
}
"""A job spec as body in the OpenAPI document. The endpoint parses it itself."""

_LOCATION = {"Location": {"description": "Address of the job.", "schema": {"type": "string"}}}
SUBMITTED: dict[int | str, dict[str, Any]] = {
    201: {"headers": _LOCATION},
    200: {"model": Job, "headers": _LOCATION, "description": "It was submitted before, under the same key."},
}

router = APIRouter(tags=["jobs"], route_class=ServiceRoute)


@router.post(
    "/jobs", status_code=201, dependencies=[SUBMIT], response_model=Job, responses=SUBMITTED, openapi_extra=SPEC_BODY
)
def submit_job(
    state: StateDep, caller: PrincipalDep, body: JsonBody, idempotency_key: Annotated[str | None, Header()] = None
) -> Response:
    """Submit a job. The same `Idempotency-Key` with the same body returns 200 and the existing job."""
    digest = repository.body_digest(body)
    submission = find_replay(state, caller, idempotency_key, digest)
    if submission is None:
        submission = _create(
            state, caller, validate_spec(body, state.host_limits(caller), is_new=True), idempotency_key, digest
        )
        state.scheduler.wake()
    bind(job_id=submission.job_id)
    return created_response(state, submission)


@dataclass(frozen=True)
class CreatedJob:
    """The job of a submission, and whether this request created it. ``rows``: the job as committed, if known."""

    job_id: str
    created_now: bool
    rows: JobRows | None = None


def created_response(state: AppState, submission: CreatedJob) -> Response:
    """Return the response to a submission: 201, or 200 if the job existed before."""
    rows = submission.rows
    job = _to_response(state, rows) if rows is not None else load_response(state, submission.job_id)
    location = {"Location": f"/jobs/{submission.job_id}"}
    return json_response(job, 201 if submission.created_now else 200, location)


def find_replay(state: AppState, caller: Principal, key: str | None, digest: str) -> CreatedJob | None:
    """Return the job that the caller submitted before with this key, or None.

    Raises RequestInvalid if the key is malformed, KeyReused if the body was another one.
    """
    if key is None:
        return None
    if not KEY.fullmatch(key):
        message = "must be 1 to 255 printable ASCII characters"
        raise with_problems(RequestInvalid, [Problem("/header/Idempotency-Key", message)])
    with state.database.read() as session:
        job = repository.find_by_idempotency_key(session, key, caller, digest, replay_cutoff(state))
        return CreatedJob(job.id, False) if job is not None else None


def replay_cutoff(state: AppState) -> datetime:
    """Return the time before which idempotency keys are forgotten."""
    return utc_now() - timedelta(days=state.settings.idempotency_days)


def _create(state: AppState, caller: Principal, spec: JobSpec, key: str | None, digest: str) -> CreatedJob:
    kind = kind_of(spec, state.host_limits(caller))
    now = utc_now()
    falls_back = kind == "cpu" and spec.resources.device == "auto" and spec.resources.launcher != SLURM
    alerts = [repository.new_alert("cpu_fallback", NO_GPU, now)] if falls_back else []
    ignored = epochs_ignored(spec.training) if gives_both_lengths(spec) else None
    if ignored is not None:
        alerts.append(repository.new_alert("epochs_ignored", ignored, now))
    facts = {**initial_plan(spec, kind), "inputs": read_inputs(spec, state.settings.readable_roots)}
    corpus_id = ensure_corpus(state, spec, caller)
    try:
        with state.database.write() as session:
            job = repository.create(session, spec, facts, alerts, caller, now)
            job.corpus_id = corpus_id
            if ignored is not None:
                draft = EventDraft("warning", ignored, caller.name, data={"code": "epochs_ignored"})
                repository.record_event(session, job, draft, now)
            if key is not None:
                repository.delete_old_keys(session, replay_cutoff(state))
            if key is not None and not repository.save_key(session, key, caller, digest, job, now):
                raise KeyReused()
            rows = _load_changed(session, job.id)
    except (KeyReused, QuotaExceeded):
        # A concurrent request with the same key may have been first: return its job.
        earlier = find_replay(state, caller, key, digest)
        if earlier is None:
            raise
        return earlier
    return CreatedJob(job.id, True, rows)


def _load_changed(session: Session, job_id: str) -> JobRows:
    # In the same transaction: the response shows the job as it is committed, with no second read afterwards.
    session.flush()
    return queries.job_rows(session.connection(), job_id)


def load_response(state: AppState, job_id: str) -> Job:
    """Return the current state of the job."""
    with state.database.connection() as connection:
        rows = queries.job_rows(connection, job_id)
    return _to_response(state, rows)


def _to_response(state: AppState, rows: JobRows) -> Job:
    return presenters.to_job_responses(rows, state.scheduler.waiting)[0]


@router.get("/jobs", dependencies=[READ], response_model=Page[Job] | Page[JobSummary])
@shared()
def list_jobs(
    state: StateDep,
    status: Annotated[list[JobStatus], Query()] = [],  # noqa: B006 - FastAPI copies it
    label: Labels = [],  # noqa: B006
    name: OptionalText = None,
    order: Literal["newest", "oldest", "score", "-score"] = "newest",
    limit: Limit = 20,
    after: OptionalText = None,
    parent: OptionalText = None,
    search: OptionalText = None,
    fields: Literal["all", "summary"] = "all",
    group: OptionalText = None,
    discarded: bool = False,
    owner: OptionalText = None,
) -> Response:
    """List jobs. `label=key=value` may be repeated; all must match. `parent`: the forks of this job.

    `search`: a part of the name, ignoring case, or the beginning of the id. `fields=summary` leaves out `spec`, `plan`
    and `allowed_actions`. `order=score`: from the best score, which is the least, to the worst, and `-score` the other
    way; jobs without a score are last. `discarded=true`: only discarded jobs, which are not listed otherwise.
    """
    labels = listing.label_pairs(label)
    filter_ = listing.JobFilter(
        tuple(status),
        labels,
        name,
        newest_first=order in ("newest", "-score"),
        limit=limit,
        after=after,
        parent=parent,
        search=search,
        group=group,
        discarded=discarded,
        by_score=order in ("score", "-score"),
        owner=owner,
    )
    with state.database.connection() as connection:
        jobs, has_more = listing.jobs(connection, filter_)
        rows = queries.load_related(connection, jobs)
    body = state.rendered_jobs.page(rows, state.scheduler.waiting, fields == "summary", has_more)
    return Response(body, media_type="application/json")


@router.get("/jobs/{job_id}", dependencies=[READ])
@shared()
def get_job(state: StateDep, job_id: str) -> Job:
    """Return one job."""
    return load_response(state, job_id)


@router.patch("/jobs/{job_id}", dependencies=[SUBMIT, OWN_JOB])
def update_job(
    state: StateDep, caller: PrincipalDep, job_id: str, body: PatchJobBody = Body(default_factory=PatchJobBody)
) -> Job:
    """Change a job, also while it runs.

    `name`, `labels`, `description`, `group`, `priority`, `log_interval`, `save_interval` and `keep_last` are of the
    spec. `discarded` hides the job from lists, or shows it again. `owner` needs a token of the scope `admin`.
    """
    changes = body.given()
    with state.database.connection() as connection:
        before = queries.spec_of(connection, job_id)
    spec = actions.changed_spec(before, changes, actions.PATCH_FIELDS, None)
    with state.database.write() as session:
        actions.patch(session, job_id, before, changes, spec, caller, utc_now())
        rows = _load_changed(session, job_id)
    if "priority" in changes:
        state.scheduler.wake()
    return _to_response(state, rows)


@router.post("/jobs/{job_id}/pause", status_code=202, dependencies=[SUBMIT, OWN_JOB, NO_FIELDS])
def pause_job(state: StateDep, caller: PrincipalDep, job_id: str) -> Job:
    """Save and stop; the job can be resumed."""
    return _stop(state, caller, job_id, "pause")


@router.post("/jobs/{job_id}/cancel", status_code=202, dependencies=[SUBMIT, OWN_JOB, NO_FIELDS])
def cancel_job(state: StateDep, caller: PrincipalDep, job_id: str) -> Job:
    """Save and stop; the job becomes cancelled."""
    return _stop(state, caller, job_id, "cancel")


@router.post("/jobs/{job_id}/kill", status_code=202, dependencies=[SUBMIT, OWN_JOB, NO_FIELDS])
def kill_job(state: StateDep, caller: PrincipalDep, job_id: str) -> Job:
    """Stop now, without saving."""
    return _stop(state, caller, job_id, "kill")


def _stop(state: AppState, caller: Principal, job_id: str, action: Action) -> Job:
    with state.database.write() as session:
        actions.stop(session, job_id, action, caller, utc_now())
        rows = _load_changed(session, job_id)
    state.scheduler.wake()
    return _to_response(state, rows)


@router.post("/jobs/{job_id}/save", status_code=202, dependencies=[SUBMIT, OWN_JOB, NO_FIELDS])
def save_checkpoint(state: StateDep, caller: PrincipalDep, job_id: str) -> Job:
    """Save a checkpoint at the next step, and continue."""
    with state.database.write() as session:
        attempt = actions.save(session, job_id, caller, utc_now())
        rows = _load_changed(session, job_id)
    state.scheduler.save_now(attempt)
    return _to_response(state, rows)


@router.post("/jobs/{job_id}/resume", status_code=202, dependencies=[SUBMIT, OWN_JOB])
def resume_job(
    state: StateDep, caller: PrincipalDep, job_id: str, body: ResumeBody = Body(default_factory=ResumeBody)
) -> ResumedJob:
    """Resume from the newest valid checkpoint, or from scratch if there is none, or from the checkpoint of `step`.

    Checkpoints newer than `step` are set aside on disk when the attempt starts, and are no longer listed. 409
    `run_differs` if the corpus, the vocabulary or the shape differs from the one that the checkpoint was saved with.

    If the run gets longer, `schedule` decides on its learning rate: `extend` follows the schedule of the longer run,
    `continue` decays from the current rate. `learning_rate_before` and `learning_rate_after` are the rates of the
    checkpoint's step and of the next one.
    """
    changes, step = body.given(), body.step
    with state.database.read() as session:
        in_progress = actions.resume_in_progress(session, job_id, changes.keys() != {"schedule"} and bool(changes))
    if not in_progress:
        job = find_job(state, job_id)
        # These checks read files, so they run outside of the transaction that changes the job.
        if step is not None:
            _check_exists(state, job_id, step)
        with state.database.read() as session:
            candidates = resume_compat.resume_candidates(session, state.settings, job, step)
        resume_compat.check_compatible(candidates, job.spec, state.settings)
        spec = actions.resumed_spec(job, changes, state.host_limits(caller))
        at_step = step if step is not None else next((candidate.step for candidate in candidates), None)
        spec, rates = actions.with_schedule(job, spec, at_step, body.schedule)
        corpus_id = ensure_corpus(state, spec, caller)
        with state.database.write() as session:
            actions.resume(session, job_id, job.spec, spec, step, caller, utc_now(), rates, corpus_id)
        state.scheduler.wake()
    resumed = load_response(state, job_id)
    names = ("learning_rate_before", "learning_rate_after")
    return ResumedJob(**dict(resumed), **{name: getattr(resumed.plan, name) for name in names})


def _check_exists(state: AppState, job_id: str, step: int) -> None:
    with state.database.read() as session:
        path = actions.checkpoint_path(session, job_id, step)
    if path is None or not os.path.exists(path):
        raise StepUnavailable()


def find_job(state: AppState, job_id: str) -> JobRow:
    """Return the row of the job. Raises JobNotFound."""
    with state.database.read() as session:
        return repository.find(session, job_id)


@router.delete("/jobs/{job_id}", status_code=204, dependencies=[SUBMIT, OWN_JOB])
def delete_job(state: StateDep, job_id: str) -> None:
    """Delete the record and the files of a job that has ended."""
    job = find_job(state, job_id)
    with deletion.mark_for_deletion(state.settings, job.id, job.spec["checkpoint"]["save_dir"]) as pending_deletion:
        try:
            with state.database.write() as session:
                actions.remove(session, job_id)
        except OutcomeUnknown:
            raise  # The deletion may have been stored. The note stays: the next start deletes the files if it was.
        except ServiceError:
            pending_deletion.cancel()
            raise
        pending_deletion.delete_files()
