"""Exports of checkpoints: made, listed, fetched."""

import os
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Body, Header, Response

from trainyard.contract.rundir import ArtifactDir, RunDir
from trainyard.service.api.dependencies import AppState, StateDep
from trainyard.service.api.responses import ServiceRoute, json_response
from trainyard.service.api.routers.checkpoints import (
    BYTES,
    Name,
    Step,
    find_directory,
)
from trainyard.service.auth.permissions import READ, SUBMIT
from trainyard.service.auth.principal import Principal, PrincipalDep
from trainyard.service.bodies import OptionalBody
from trainyard.service.clock import utc_now
from trainyard.service.db.models import JobRow
from trainyard.service.errors import FileNotInExport
from trainyard.service.exports import exporter
from trainyard.service.jobs import repository
from trainyard.service.jobs.repository import EventDraft
from trainyard.service.schemas import Export, Page
from trainyard.service.storage.checkpoint_files import FILE_NAME, open_file, parse_range
from trainyard.service.storage.range_response import FileRangeResponse

Format = Literal["hf", "minimind"]

router = APIRouter(prefix="/jobs/{job_id}", tags=["products"], route_class=ServiceRoute)


class ExportBody(OptionalBody):
    """What to write the checkpoint as."""

    format: Format = "hf"


@router.post("/checkpoints/{step}/export", status_code=201, dependencies=[SUBMIT], response_model=Export)
def export(
    services: StateDep,
    caller: PrincipalDep,
    job_id: str,
    step: Step,
    asked: ExportBody = Body(default_factory=ExportBody),
) -> Response:
    """Write the checkpoint as a Hugging Face directory (`hf`), or as MiniMind's `.pth`, beside the run.

    Answers once it is written: 201, or 200 where the same weights were exported before. One at a time for each job.
    """
    with services.database.read() as session:
        job = repository.find(session, job_id)
    tokenizer, weight = job.spec["data"]["tokenizer_path"], job.spec["checkpoint"]["save_weight"]
    place = find_directory(services, job_id, step)
    wanted = exporter.ExportRequest(_products(services, job), place, step, asked.format, tokenizer, weight)
    there = exporter.is_exported(wanted)
    if not there:
        exporter.run_export(wanted)
        _tell(services, job_id, wanted, caller)
    return json_response(
        _shown(job_id, exporter.to_export_response(wanted.artifacts, step, asked.format)), 200 if there else 201
    )


def _tell(services: AppState, job_id: str, wanted: exporter.ExportRequest, by: Principal) -> None:
    path = str(wanted.artifacts.export(wanted.step, wanted.format))
    data = {"step": wanted.step, "format": wanted.format, "path": path}
    with services.database.write() as session:
        job = repository.lock(session, job_id)
        message = f"exported the checkpoint of step {wanted.step:,} as {wanted.format}"
        repository.record_event(session, job, EventDraft("exported", message, by.name, data=data), utc_now())


@router.get("/exports", dependencies=[READ])
def exports(services: StateDep, job_id: str) -> Page[Export]:
    """What was exported and is there, newest step first."""
    found = exporter.list_exports(_products(services, _job(services, job_id)))
    return Page(data=[_shown(job_id, one) for one in found], has_more=False)


@router.get(
    "/exports/{step}/{form}/files/{name}",
    dependencies=[READ],
    response_class=Response,
    responses={200: BYTES, 206: BYTES},
)
def download_export(
    services: StateDep,
    job_id: str,
    step: Step,
    form: Format,
    name: Name,
    range_: Annotated[str | None, Header(alias="Range", max_length=200)] = None,
) -> Response:
    """A file of an export. `Range` takes a piece of it."""
    directory = _products(services, _job(services, job_id)).export(step, form)
    try:
        if not FILE_NAME.fullmatch(name):
            raise FileNotFoundError(name)
        file = open_file(directory, name)
    except OSError:
        raise FileNotInExport() from None
    try:
        return FileRangeResponse(file, parse_range(range_, os.fstat(file.fileno()).st_size), name, None)
    except BaseException:
        file.close()
        raise


def _job(services: AppState, job_id: str) -> JobRow:
    with services.database.read() as session:
        return repository.find(session, job_id)


def _products(services: AppState, job: JobRow) -> ArtifactDir:
    return RunDir(services.settings.runs / job.id).artifacts(job.spec["checkpoint"]["save_dir"])


def _shown(job_id: str, found: dict[str, Any]) -> Export:
    return Export.model_validate({"id": f"{found['step']}-{found['format']}", "job_id": job_id, **found})
