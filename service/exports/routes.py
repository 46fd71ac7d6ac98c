"""Exports of checkpoints: made, listed, fetched."""

import os
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Body, Header, Response

from trainyard.contract.rundir import ProductDir, RunDir
from trainyard.service.access.callers import Caller, CallerNeeded
from trainyard.service.access.scopes import READ, SUBMIT
from trainyard.service.answers import ServiceRoute, json_response
from trainyard.service.bodies import OptionalBody
from trainyard.service.checkpoints.download import Download
from trainyard.service.checkpoints.files import NAME, opened, slice_of
from trainyard.service.checkpoints.routes import BYTES, Name, Step, directory_of
from trainyard.service.context import Services, ServicesNeeded
from trainyard.service.errors import FileNotInExport
from trainyard.service.exports import making
from trainyard.service.jobs import store
from trainyard.service.jobs.store import Note
from trainyard.service.scheduler.apply import utc_now
from trainyard.service.shapes import Export, Page
from trainyard.service.tables import JobRow

Format = Literal["hf", "minimind"]

router = APIRouter(prefix="/jobs/{job_id}", tags=["products"], route_class=ServiceRoute)


class ExportBody(OptionalBody):
    """What to write the checkpoint as."""

    format: Format = "hf"


@router.post("/checkpoints/{step}/export", status_code=201, dependencies=[SUBMIT], response_model=Export)
def export(
    services: ServicesNeeded,
    caller: CallerNeeded,
    job_id: str,
    step: Step,
    asked: ExportBody = Body(default_factory=ExportBody),
) -> Response:
    """Write the checkpoint as a Hugging Face directory (`hf`), or as MiniMind's `.pth`, beside the run.

    Answers once it is written: 201, or 200 where the same weights were exported before. One at a time for each job.
    """
    with services.database.read() as session:
        job = store.find(session, job_id)
    tokenizer, weight = job.spec["data"]["tokenizer_path"], job.spec["checkpoint"]["save_weight"]
    place = directory_of(services, job_id, step)
    wanted = making.Wanted(_products(services, job), place, step, asked.format, tokenizer, weight)
    there = making.existing(wanted)
    if not there:
        making.make(wanted)
        _tell(services, job_id, wanted, caller)
    return json_response(_shown(job_id, making.described(wanted.products, step, asked.format)), 200 if there else 201)


def _tell(services: Services, job_id: str, wanted: making.Wanted, by: Caller) -> None:
    path = str(wanted.products.export(wanted.step, wanted.form))
    data = {"step": wanted.step, "format": wanted.form, "path": path}
    with services.database.write() as session:
        job = store.lock(session, job_id)
        message = f"exported the checkpoint of step {wanted.step:,} as {wanted.form}"
        store.tell(session, job, Note("exported", message, by.name, data=data), utc_now())


@router.get("/exports", dependencies=[READ])
def exports(services: ServicesNeeded, job_id: str) -> Page[Export]:
    """What was exported and is there, newest step first."""
    found = making.listed(_products(services, _job(services, job_id)))
    return Page(data=[_shown(job_id, one) for one in found], has_more=False)


@router.get(
    "/exports/{step}/{form}/files/{name}",
    dependencies=[READ],
    response_class=Response,
    responses={200: BYTES, 206: BYTES},
)
def download_export(
    services: ServicesNeeded,
    job_id: str,
    step: Step,
    form: Format,
    name: Name,
    range_: Annotated[str | None, Header(alias="Range", max_length=200)] = None,
) -> Response:
    """A file of an export. `Range` takes a piece of it."""
    directory = _products(services, _job(services, job_id)).export(step, form)
    try:
        if not NAME.fullmatch(name):
            raise FileNotFoundError(name)
        file = opened(directory, name)
    except OSError:
        raise FileNotInExport() from None
    try:
        return Download(file, slice_of(range_, os.fstat(file.fileno()).st_size), name, None)
    except BaseException:
        file.close()
        raise


def _job(services: Services, job_id: str) -> JobRow:
    with services.database.read() as session:
        return store.find(session, job_id)


def _products(services: Services, job: JobRow) -> ProductDir:
    return RunDir(services.settings.runs / job.id).products(job.spec["checkpoint"]["save_dir"])


def _shown(job_id: str, found: dict[str, Any]) -> Export:
    return Export.model_validate({"id": f"{found['step']}-{found['format']}", "job_id": job_id, **found})
