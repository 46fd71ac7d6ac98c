"""The files of one checkpoint, and its removal."""

import os
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Header
from fastapi import Path as InPath
from fastapi.responses import Response
from sqlalchemy import select

from trainyard.contract.rundir import RunDir
from trainyard.service.api.dependencies import AppState, StateDep
from trainyard.service.api.responses import ServiceRoute
from trainyard.service.auth.permissions import READ, SUBMIT
from trainyard.service.auth.principal import PrincipalDep
from trainyard.service.clock import utc_now
from trainyard.service.db.models import CheckpointRow
from trainyard.service.errors import CheckpointNotFound
from trainyard.service.jobs import checkpoint_deletion, repository
from trainyard.service.storage.checkpoint_files import checkpoint_directory, open_listed, parse_range
from trainyard.service.storage.range_response import FileRangeResponse

MAX_STEP = 2**53 - 1
Step = Annotated[int, InPath(ge=0, le=MAX_STEP)]
Name = Annotated[str, InPath(max_length=200)]
BYTES: dict[str, Any] = {"content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}}

router = APIRouter(prefix="/jobs/{job_id}/checkpoints/{step}", tags=["products"], route_class=ServiceRoute)


@router.get("/files/{name}", dependencies=[READ], response_class=Response, responses={200: BYTES, 206: BYTES})
def download(
    services: StateDep,
    job_id: str,
    step: Step,
    name: Name,
    range_: Annotated[str | None, Header(alias="Range", max_length=200)] = None,
    if_range: Annotated[str | None, Header(max_length=200)] = None,
) -> Response:
    """A file that the checkpoint's manifest names, or the manifest itself. `Range` takes a piece of it.

    `ETag` is the sha256 that the manifest gives: a piece asked for with `If-Range` is of the same file, or all of it.
    """
    file, sha256 = open_listed(find_directory(services, job_id, step), name)
    try:
        etag = f'"{sha256}"' if sha256 is not None else None
        wanted = range_ if if_range in (None, etag) else None
        return FileRangeResponse(file, parse_range(wanted, os.fstat(file.fileno()).st_size), name, etag)
    except BaseException:
        file.close()
        raise


def find_directory(services: AppState, job_id: str, step: int) -> Path:
    """Where the checkpoint's files are, the full one where there are both. Raises CheckpointNotFound."""
    with services.database.read() as session:
        job = repository.find(session, job_id)
        of_step = (CheckpointRow.job_id == job.id, CheckpointRow.step == step)
        paths = session.scalars(select(CheckpointRow.path).where(*of_step).order_by(CheckpointRow.kind)).all()
    products = RunDir(services.settings.runs / job.id).artifacts(job.spec["checkpoint"]["save_dir"])
    place = next((place for path in paths if (place := checkpoint_directory(products, step, path)) is not None), None)
    if place is None or not place.is_dir():
        raise CheckpointNotFound()
    return place


@router.delete("", status_code=204, dependencies=[SUBMIT])
def remove(services: StateDep, caller: PrincipalDep, job_id: str, step: Step) -> None:
    """Remove a full checkpoint with its files; never the last valid one, nor one that a live run may need."""
    with services.database.write() as session:
        leaving = checkpoint_deletion.unpublish(session, services.settings.runs, job_id, step, caller, utc_now())
    checkpoint_deletion.delete_files(leaving)
