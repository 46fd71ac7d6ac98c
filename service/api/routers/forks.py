"""POST /jobs/{id}/fork."""

from typing import Annotated

from fastapi import APIRouter, Header, Response

from trainyard.service.api.dependencies import AppState, StateDep
from trainyard.service.api.responses import ServiceRoute
from trainyard.service.api.routers.jobs import (
    Submission,
    created_response,
    find_replay,
    replay_cutoff,
)
from trainyard.service.api.routers.planning import make_preview
from trainyard.service.auth.permissions import SUBMIT
from trainyard.service.auth.principal import Principal, PrincipalDep
from trainyard.service.bodies import JsonBody
from trainyard.service.clock import utc_now
from trainyard.service.errors import (
    KeyReused,
    QuotaExceeded,
    ServiceError,
    StorageError,
)
from trainyard.service.forks import service
from trainyard.service.forks.request import ForkRequest, forked_spec, parse_fork_request
from trainyard.service.ids import new_id
from trainyard.service.jobs import deletion, repository, resume_compat
from trainyard.service.jobs.resume_compat import ResumeCandidate
from trainyard.service.jobs.submission import kind_of
from trainyard.service.observability.logging import bind
from trainyard.service.planning.preview import queue_position
from trainyard.service.schemas import Job, PlanPreview

_FIELDS = {
    "step": {"type": "integer", "minimum": 0},
    "overrides": {"type": "object"},
    "data": {"enum": ["keep", "restart"], "default": "keep"},
}
_SCHEMA = {"type": "object", "additionalProperties": False, "properties": _FIELDS}
BODY = {"requestBody": {"required": False, "content": {"application/json": {"schema": _SCHEMA}}}}
"""What the OpenAPI document says of the body, whose `overrides` are parsed as a job spec is."""

router = APIRouter(tags=["jobs"], route_class=ServiceRoute)


@router.post("/jobs/{job_id}/fork", status_code=201, dependencies=[SUBMIT], response_model=Job, openapi_extra=BODY)
def fork(
    services: StateDep,
    caller: PrincipalDep,
    job_id: str,
    body: JsonBody,
    idempotency_key: Annotated[str | None, Header()] = None,
) -> Response:
    """A new job that begins at this job's checkpoint of `step` (the newest where none is named), with `overrides`.

    `data` "keep": the run goes on as the parent's would, the same samples in the same steps. "restart": the data and
    the schedule begin anew, the steps go on being counted. The parent may be in any state, and may be deleted later.
    """
    digest = repository.body_digest({"fork": job_id, "body": body})
    made = find_replay(services, idempotency_key, digest)
    if made is None:
        made = _make(services, caller, job_id, parse_fork_request(body), idempotency_key, digest)
        services.scheduler.wake()
    bind(fork_id=made.job_id)
    return created_response(services, made)


@router.post("/jobs/{job_id}/fork/plan", dependencies=[SUBMIT], openapi_extra=BODY)
def plan_fork(services: StateDep, job_id: str, body: JsonBody) -> PlanPreview:
    """What the fork of the same body would be, as `/jobs/plan` says it of a new job. Nothing is stored.

    `steps` counts the whole curve, time and FLOPs are those of what is left behind `start_step`.
    """
    asked, host = parse_fork_request(body), services.host_limits
    with services.database.read() as session:
        parent = service.find_parent(session, services.settings.runs, job_id, asked)
    spec = forked_spec(asked, parent.origin, host)
    facts = service.fork_plan(spec, asked, parent, kind_of(spec, host))
    return queue_position(make_preview(services, spec), parent.step, facts["base_step"], facts["steps"])


def _make(
    services: AppState, by: Principal, job_id: str, asked: ForkRequest, key: str | None, digest: str
) -> Submission:
    settings, host = services.settings, services.host_limits
    with services.database.read() as session:
        parent = service.find_parent(session, settings.runs, job_id, asked)
    begin = ResumeCandidate(parent.step, parent.checkpoint, restarts_data=asked.data == "restart")
    resume_compat.check_compatible([begin], parent.origin.spec, settings)
    spec = forked_spec(asked, parent.origin, host)
    fork_id = new_id("job")
    with deletion.mark_for_deletion(settings, fork_id, spec.checkpoint.save_dir) as half_made:
        try:
            service.prepare_run_dir(settings, fork_id, spec, asked, parent)
            with services.database.write() as session:
                job = service.insert(session, fork_id, spec, asked, parent, host, by, utc_now())
                if key is not None:
                    repository.forget_keys(session, replay_cutoff(services))
                if key is not None and not repository.remember_key(session, key, digest, job, utc_now()):
                    # Another request with this key was faster by a moment; its job is the one.
                    raise KeyReused()
        except (ServiceError, OSError) as error:
            half_made.delete_files()
            earlier = find_replay(services, key, digest) if isinstance(error, KeyReused | QuotaExceeded) else None
            if earlier is not None:
                return earlier
            raise StorageError.from_os_error(error) if isinstance(error, OSError) else error from error
        half_made.forget()
    return Submission(fork_id, created_now=True)
