"""Routes that export a checkpoint, list the exports, and download their files."""

import asyncio
from contextvars import copy_context
from functools import partial
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Body, Header, Response

from trainyard.contract.rundir import RunDir
from trainyard.service.api.dependencies import AppState, StateDep
from trainyard.service.api.ownership import OWN_JOB
from trainyard.service.api.responses import ServiceRoute, json_response
from trainyard.service.api.routers.checkpoints import BYTES, Name, Step, artifact_dir, artifact_dirs, find_directory
from trainyard.service.api.routers.jobs import OptionalLimit, OptionalText, find_job
from trainyard.service.auth.permissions import READ, SUBMIT
from trainyard.service.auth.principal import Principal, PrincipalDep
from trainyard.service.bodies import OptionalBody
from trainyard.service.clock import utc_now
from trainyard.service.errors import FileNotInExport, ServiceError
from trainyard.service.exports import exporter
from trainyard.service.jobs import repository
from trainyard.service.jobs.listing import page_of_all
from trainyard.service.jobs.repository import EventDraft
from trainyard.service.schemas import Export, Page
from trainyard.service.storage.checkpoint_files import FILE_NAME, open_file
from trainyard.service.storage.range_response import FileRangeResponse

Format = Literal["hf", "minimind"]

router = APIRouter(prefix="/jobs/{job_id}", tags=["exports"], route_class=ServiceRoute)


class ExportBody(OptionalBody):
    """The format to export to."""

    format: Format = "hf"


@router.post("/checkpoints/{step}/export", status_code=201, dependencies=[SUBMIT, OWN_JOB], response_model=Export)
async def export_checkpoint(
    state: StateDep, caller: PrincipalDep, job_id: str, step: Step, body: ExportBody = Body(default_factory=ExportBody)
) -> Response:
    """Export the checkpoint to a Hugging Face directory (`hf`) or to MiniMind's `.pth`, in the run's directory.

    Responds after the export: 201, or 200 if the same weights were exported before. A job has one export at a time.
    The service runs a few at a time, and others wait.
    """
    request, exists = await asyncio.to_thread(_find, state, job_id, step, body.format)
    work = partial(copy_context().run, _export, state, caller, job_id, request, exists)
    return await asyncio.get_running_loop().run_in_executor(None if exists else state.exports, work)


def _find(state: AppState, job_id: str, step: int, form: Format) -> tuple[exporter.ExportRequest, bool]:
    """Return the request, and whether exactly this was exported before."""
    job = find_job(state, job_id)
    tokenizer, stem = job.spec["data"]["tokenizer_path"], job.spec["checkpoint"]["save_weight"]
    checkpoint = find_directory(state, job_id, step)
    request = exporter.ExportRequest(
        artifact_dir(state, job),
        checkpoint,
        step,
        form,
        tokenizer,
        stem,
        state.settings.readable_roots,
        state.settings.writable_roots,
    )
    return request, exporter.is_exported(request)


def _export(state: AppState, caller: Principal, job_id: str, request: exporter.ExportRequest, exists: bool) -> Response:
    try:
        if not exists:
            # An equal request may have been done while this one waited.
            exists = not exporter.run_export(request, state.exports_stopping)
        if not exists:
            _record_event(state, job_id, request, caller)
        exported = exporter.describe_export(request.artifacts, request.step, request.format)
    except (ServiceError, OSError):
        # If the job was deleted meanwhile, its files are missing: the 404 says so, and the error would show a path.
        find_job(state, job_id)
        raise
    return json_response(_to_response(job_id, exported), 200 if exists else 201)


def _record_event(state: AppState, job_id: str, request: exporter.ExportRequest, caller: Principal) -> None:
    path = str(request.artifacts.export(request.step, request.format))
    data = {"step": request.step, "format": request.format, "path": path}
    with state.database.write() as session:
        job = repository.lock(session, job_id)
        message = f"exported the checkpoint of step {request.step:,} as {request.format}"
        repository.record_event(session, job, EventDraft("exported", message, caller.name, data=data), utc_now())


@router.get("/exports", dependencies=[READ])
def list_exports(state: StateDep, job_id: str, limit: OptionalLimit = None, after: OptionalText = None) -> Page[Export]:
    """List the exports, newest step first."""
    found = exporter.list_exports(artifact_dirs(state, find_job(state, job_id)))
    data, has_more = page_of_all([_to_response(job_id, one) for one in found], limit, after)
    return Page(data=list(data), has_more=has_more)


@router.get(
    "/exports/{step}/{form}/files/{name}",
    dependencies=[READ],
    response_class=Response,
    responses={200: BYTES, 206: BYTES},
)
def download_export_file(
    state: StateDep,
    job_id: str,
    step: Step,
    form: Format,
    name: Name,
    range_: Annotated[str | None, Header(alias="Range", max_length=200)] = None,
) -> Response:
    """Download a file of an export. `Range` requests a part of it."""
    job = find_job(state, job_id)
    run, save_dir = RunDir(state.settings.runs / job.id), job.spec["checkpoint"]["save_dir"]
    directory = run.find_directory(save_dir, lambda artifacts: artifacts.export(step, form))
    try:
        if not FILE_NAME.fullmatch(name):
            raise FileNotFoundError(name)
        file = open_file(directory, name, state.settings.writable_roots)
    except OSError:
        raise FileNotInExport() from None
    return FileRangeResponse(file, range_, name)


def _to_response(job_id: str, export: dict[str, Any]) -> Export:
    return Export.model_validate({"id": f"{export['step']}-{export['format']}", "job_id": job_id, **export})
