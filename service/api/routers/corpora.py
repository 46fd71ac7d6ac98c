"""Routes that prepare a corpus without a job, list the corpora with their progress, and delete them from the cache."""

from typing import Annotated, Any

from fastapi import APIRouter, Query, Response
from sqlalchemy.orm import Session

from trainyard.contract.parsing import GROUPS, Problem, nearest, pointer_to, printable
from trainyard.contract.patterns import WITHOUT_NUL
from trainyard.contract.prepared import PreparedCorpus
from trainyard.contract.scopes import Scope
from trainyard.contract.spec import JobSpec
from trainyard.contract.status import CorpusStatus
from trainyard.service.api.dependencies import AppState, StateDep
from trainyard.service.api.responses import ServiceRoute, json_response
from trainyard.service.auth.permissions import READ, SUBMIT
from trainyard.service.auth.principal import Principal, PrincipalDep
from trainyard.service.bodies import JsonBody
from trainyard.service.clock import utc_now
from trainyard.service.corpora import presenters, registry
from trainyard.service.corpora.files import delete_corpus_files, delete_run_directory, is_open
from trainyard.service.db.models import CorpusRow
from trainyard.service.errors import CorpusInUse, CorpusNotFound, Forbidden, RequestInvalid, SpecInvalid, with_problems
from trainyard.service.jobs.submission import HostLimits, validate_spec
from trainyard.service.schemas import Page, TokenizedCorpus

FIELDS = GROUPS["data"]

BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {"application/json": {"schema": {"$ref": "#/components/schemas/DataSpec"}}},
    }
}
"""The body in the OpenAPI document. The endpoint parses it itself, as the ``data`` of a job spec."""

router = APIRouter(prefix="/corpora", tags=["corpora"], route_class=ServiceRoute)

OptionalText = Annotated[str | None, Query(max_length=300, pattern=WITHOUT_NUL)]


@router.post("", status_code=202, dependencies=[SUBMIT], response_model=TokenizedCorpus, openapi_extra=BODY)
def create_corpus(state: StateDep, caller: PrincipalDep, body: JsonBody) -> Response:
    """Tokenize a corpus now, on CPUs, without a job. The body has the fields of a job spec's `data`.

    A job with the same corpus and tokenizer starts without a preparation. The same request again returns the same
    corpus; if it is in the cache, its status is `ready` at once.
    """
    spec = corpus_spec(body, state.host_limits(caller))
    corpus_id = ensure_corpus(state, spec, caller, requested=True)
    if corpus_id is None:
        raise with_problems(RequestInvalid, [Problem("", "a file of the corpus is gone: try again")])
    state.scheduler.wake()
    return json_response(_load(state, corpus_id), 202, {"Location": f"/corpora/{corpus_id}"})


@router.get("", dependencies=[READ])
def list_corpora(
    state: StateDep, limit: Annotated[int, Query(ge=1, le=100)] = 20, after: OptionalText = None
) -> Page[TokenizedCorpus]:
    """List the corpora, newest first."""
    with state.database.read() as session:
        rows, has_more = registry.list_corpora(session, after, limit)
        data = [_present(state, session, row) for row in rows]
    return Page(data=data, has_more=has_more)


@router.get("/{corpus_id}", dependencies=[READ])
def get_corpus(state: StateDep, corpus_id: str) -> TokenizedCorpus:
    """Return one corpus: its progress, and what is in it once it is ready."""
    return _load(state, corpus_id)


@router.delete("/{corpus_id}", status_code=204, dependencies=[SUBMIT])
def delete_corpus(state: StateDep, caller: PrincipalDep, corpus_id: str) -> None:
    """Delete a corpus from the cache. The files that it was made of stay. A preparation that no job waits for stops."""
    settings = state.settings
    with state.database.read() as session:
        found = registry.find(session, corpus_id)
    if found.submitted_by != caller.name and not caller.scope.covers(Scope.OPERATE):
        raise Forbidden(
            f"The corpus belongs to {found.submitted_by}. To delete it, the token {caller.name} needs the scope "
            f"{Scope.OPERATE}, and it has {caller.scope}."
        )
    before = found.prepared
    if before is not None and is_open(settings.corpus_cache, PreparedCorpus.model_validate(before)):
        raise CorpusInUse("A process has it open.")
    with state.database.write() as session:
        row = registry.lock(session, corpus_id)
        if row is None or row.deleted:
            raise CorpusNotFound()
        registry.require_unused(session, row)
        if row.status == CorpusStatus.PREPARING:
            # The scheduler stops the process, and deletes the rest when it has ended.
            row.deleted, row.requested = True, False
            state.scheduler.wake()
            return
        unshared = registry.unshared(session, row)
        session.delete(row)
    delete_corpus_files(settings.corpus_cache, unshared)
    delete_run_directory(settings.home, corpus_id)


def corpus_spec(body: object, host: HostLimits) -> JobSpec:
    """Return the spec of a job with the body as its ``data``. Raises RequestInvalid with every mistake."""
    if not isinstance(body, dict):
        raise with_problems(RequestInvalid, [Problem("", "must be a JSON object")])
    unknown = [_unknown(name) for name in body if name not in FIELDS]
    known = {name: value for name, value in body.items() if name in FIELDS}
    try:
        # A weighted mixture has no end of its own, and a corpus needs none.
        spec = validate_spec({"data": known, "training": {"max_steps": 1}}, host)
    except SpecInvalid as error:
        found = [Problem(each["pointer"].removeprefix("/data"), each["message"]) for each in error.extra["errors"]]
        raise with_problems(RequestInvalid, [*unknown, *found]) from None
    if unknown:
        raise with_problems(RequestInvalid, unknown)
    return spec


def _unknown(name: str) -> Problem:
    near = nearest(name, FIELDS)
    others = f"did you mean {near}?" if near is not None else f"those here are {', '.join(FIELDS)}"
    return Problem(pointer_to(printable(name)), f"is not a field; {others}")


def ensure_corpus(state: AppState, spec: JobSpec, caller: Principal, requested: bool = False) -> str | None:
    """Return the id of the spec's corpus, which waits to be prepared unless it is in the cache.

    None if corpora are not prepared by this service, or if a file is missing: then the run reports it. Reads files,
    so it runs outside of the transaction that queues the job.
    """
    if not state.scheduler.prepares:
        return None
    check = registry.check_corpus(spec, state.settings.corpus_cache)
    if check is None:
        return None
    if check.prepared is not None:
        with state.database.read() as session:
            if (ready := registry.find_ready(session, check)) is not None:
                return ready
    with state.database.write() as session:
        return registry.ensure(session, check, spec, caller, utc_now(), requested).id


def _load(state: AppState, corpus_id: str) -> TokenizedCorpus:
    with state.database.read() as session:
        return _present(state, session, registry.find(session, corpus_id))


def _present(state: AppState, session: Session, row: CorpusRow) -> TokenizedCorpus:
    is_wanted = row.status != CorpusStatus.QUEUED or registry.is_wanted(session, row)
    return presenters.to_corpus_response(row, registry.jobs_of(session, row.id), is_wanted, state.settings.corpus_cache)
