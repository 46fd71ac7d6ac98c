"""Routes that fork a job, and preview a fork."""

from typing import Annotated

from fastapi import APIRouter, Header, Response

from trainyard.service.api.dependencies import AppState, StateDep
from trainyard.service.api.responses import ServiceRoute
from trainyard.service.api.routers.corpora import ensure_corpus
from trainyard.service.api.routers.jobs import CreatedJob, created_response, find_replay, replay_cutoff
from trainyard.service.api.routers.planning import make_preview
from trainyard.service.auth.permissions import SUBMIT
from trainyard.service.auth.principal import Principal, PrincipalDep
from trainyard.service.bodies import JsonBody
from trainyard.service.clock import utc_now
from trainyard.service.errors import KeyReused, OutcomeUnknown, QuotaExceeded, ServiceError, StorageError
from trainyard.service.forks import service
from trainyard.service.forks.request import ForkRequest, forked_spec, parse_fork_request
from trainyard.service.ids import new_id
from trainyard.service.jobs import deletion, repository, resume_compat
from trainyard.service.jobs.resume_compat import ResumeCandidate
from trainyard.service.jobs.submission import kind_of
from trainyard.service.observability.logging import bind
from trainyard.service.planning.preview import preview_from_step, with_learning_rate
from trainyard.service.schemas import Job, PlanPreview

_FIELDS = {
    "step": {"type": "integer", "minimum": 0, "description": "Step of the checkpoint; without it: the newest one."},
    "overrides": {"type": "object", "description": "A part of a job spec. It replaces fields of the parent's spec."},
    "data": {
        "enum": ["keep", "restart"],
        "default": "keep",
        "description": "keep: the samples and the schedule continue. restart: both start from the beginning.",
    },
}
_SCHEMA = {"type": "object", "additionalProperties": False, "properties": _FIELDS}
BODY = {"requestBody": {"required": False, "content": {"application/json": {"schema": _SCHEMA}}}}
"""The body in the OpenAPI document. The endpoint parses it itself, because `overrides` are parsed like a job spec."""

router = APIRouter(tags=["jobs"], route_class=ServiceRoute)


@router.post("/jobs/{job_id}/fork", status_code=201, dependencies=[SUBMIT], response_model=Job, openapi_extra=BODY)
def fork_job(
    state: StateDep,
    caller: PrincipalDep,
    job_id: str,
    body: JsonBody,
    idempotency_key: Annotated[str | None, Header()] = None,
) -> Response:
    """Create a job that starts from this job's checkpoint of `step` (default: the newest), with `overrides`.

    `data` "keep": the fork continues the parent's run, with the same samples in the same steps. "restart": the data
    order and the schedule start from scratch, and the step count continues. The parent may be in any state, and may be
    deleted later.
    """
    digest = repository.body_digest({"fork": job_id, "body": body})
    submission = find_replay(state, caller, idempotency_key, digest)
    if submission is None:
        submission = _create(state, caller, job_id, parse_fork_request(body), idempotency_key, digest)
        state.scheduler.wake()
    bind(fork_id=submission.job_id)
    return created_response(state, submission)


@router.post("/jobs/{job_id}/fork/plan", dependencies=[SUBMIT], openapi_extra=BODY)
def plan_fork(state: StateDep, caller: PrincipalDep, job_id: str, body: JsonBody) -> PlanPreview:
    """Preview the fork of the same body, as `/jobs/plan` does for a new job. Nothing is stored.

    `steps` counts the whole curve; time and FLOPs are those of the steps after `start_step`.
    """
    request, host = parse_fork_request(body), state.host_limits(caller)
    with state.database.read() as session:
        parent = service.find_parent(session, state.settings.runs, job_id, request)
    spec = forked_spec(request, parent.origin, host)
    plan = service.fork_plan(spec, request, parent, kind_of(spec, host))
    preview = preview_from_step(make_preview(state, spec, host), parent.step, plan["base_step"], plan["steps"])
    rates = {name: plan.get(name) for name in ("learning_rate_before", "learning_rate_after")}
    return with_learning_rate(preview.model_copy(update=rates), spec)


def _create(
    state: AppState, caller: Principal, job_id: str, request: ForkRequest, key: str | None, digest: str
) -> CreatedJob:
    settings, host = state.settings, state.host_limits(caller)
    with state.database.read() as session:
        parent = service.find_parent(session, settings.runs, job_id, request)
    candidate = ResumeCandidate(parent.step, parent.checkpoint, restarts_data=request.data == "restart")
    resume_compat.check_compatible([candidate], parent.origin.spec, settings)
    spec = forked_spec(request, parent.origin, host)
    corpus_id = ensure_corpus(state, spec, caller)
    fork_id = new_id("job")
    # The files come first and the record last. If the service dies in between, the next start deletes the files.
    with deletion.mark_for_deletion(settings, fork_id, spec.checkpoint.save_dir) as pending_deletion:
        try:
            service.prepare_run_dir(settings, fork_id, spec, request, parent)
            with state.database.write() as session:
                job = service.insert(session, fork_id, spec, request, parent, host, caller, utc_now())
                job.corpus_id = corpus_id
                if key is not None:
                    repository.delete_old_keys(session, replay_cutoff(state))
                if key is not None and not repository.save_key(session, key, caller, digest, job, utc_now()):
                    # A concurrent request with the same key was first; its job is returned below.
                    raise KeyReused()
        except OutcomeUnknown:
            raise  # The fork may have been stored. The note stays: the next start deletes the files if there is no job.
        except (ServiceError, OSError) as error:
            pending_deletion.delete_files()
            earlier = find_replay(state, caller, key, digest) if isinstance(error, KeyReused | QuotaExceeded) else None
            if earlier is not None:
                return earlier
            raise StorageError.from_os_error(error) if isinstance(error, OSError) else error from error
        pending_deletion.cancel()
    return CreatedJob(fork_id, created_now=True)
