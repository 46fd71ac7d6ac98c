"""Routes that download and delete a checkpoint."""

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Header
from fastapi import Path as InPath
from fastapi.responses import Response
from sqlalchemy import select

from trainyard.contract.rundir import ArtifactDir, RunDir
from trainyard.service.api.dependencies import AppState, StateDep
from trainyard.service.api.ownership import OWN_JOB
from trainyard.service.api.responses import ServiceRoute
from trainyard.service.auth.permissions import READ, SUBMIT
from trainyard.service.auth.principal import PrincipalDep
from trainyard.service.clock import utc_now
from trainyard.service.db.models import CheckpointRow, JobRow
from trainyard.service.errors import CheckpointNotFound, OutcomeUnknown
from trainyard.service.jobs import checkpoint_deletion, repository
from trainyard.service.storage.checkpoint_files import checkpoint_directory, open_listed
from trainyard.service.storage.range_response import FileRangeResponse

MAX_STEP = 2**53 - 1
Step = Annotated[int, InPath(ge=0, le=MAX_STEP)]
Name = Annotated[str, InPath(max_length=200)]
BYTES: dict[str, Any] = {"content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}}

router = APIRouter(prefix="/jobs/{job_id}/checkpoints/{step}", tags=["checkpoints"], route_class=ServiceRoute)


@router.get("/files/{name}", dependencies=[READ], response_class=Response, responses={200: BYTES, 206: BYTES})
def download_checkpoint_file(
    state: StateDep,
    job_id: str,
    step: Step,
    name: Name,
    range_: Annotated[str | None, Header(alias="Range", max_length=200)] = None,
    if_range: Annotated[str | None, Header(max_length=200)] = None,
) -> Response:
    """Download a file that the checkpoint's manifest lists, or the manifest itself. `Range` requests a part of it.

    `ETag` is the sha256 of the manifest. With `If-Range`, a file that has changed is sent as a whole.
    """
    file, sha256 = open_listed(find_directory(state, job_id, step), name, state.settings.writable_roots)
    etag = f'"{sha256}"' if sha256 is not None else None
    return FileRangeResponse(file, range_ if if_range in (None, etag) else None, name, etag)


def find_directory(state: AppState, job_id: str, step: int) -> Path:
    """Return the directory of the checkpoint, of the full one if there are both kinds. Raises CheckpointNotFound."""
    return find_checkpoint(state, job_id, step)[1]


def find_checkpoint(state: AppState, job_id: str, step: int | None) -> tuple[int, Path]:
    """Return step and directory of a checkpoint as `find_directory` does; None: the newest one."""
    with state.database.read() as session:
        job = repository.find(session, job_id)
        query = select(CheckpointRow.step, CheckpointRow.path).where(CheckpointRow.job_id == job.id)
        if step is not None:
            query = query.where(CheckpointRow.step == step)
        rows = session.execute(query.order_by(CheckpointRow.step.desc(), CheckpointRow.kind)).all()
    run, save_dir = RunDir(state.settings.runs / job.id), job.spec["checkpoint"]["save_dir"]
    for row in rows:
        path = checkpoint_directory(run, save_dir, row.step, row.path)
        if path is not None and path.is_dir():
            return row.step, path
    raise CheckpointNotFound("The job has no checkpoint yet." if step is None else None)


def artifact_dir(state: AppState, job: JobRow) -> ArtifactDir:
    """Return the directory for new exports and evaluations of the job."""
    return next(artifact_dirs(state, job))


def artifact_dirs(state: AppState, job: JobRow) -> Iterator[ArtifactDir]:
    """Yield the directories that may hold checkpoints and exports of the job, see `RunDir.artifact_dirs`."""
    return RunDir(state.settings.runs / job.id).artifact_dirs(job.spec["checkpoint"]["save_dir"])


@router.delete("", status_code=204, dependencies=[SUBMIT, OWN_JOB])
def delete_checkpoint(state: StateDep, caller: PrincipalDep, job_id: str, step: Step) -> None:
    """Delete a full checkpoint and its files. The last valid one, and one that a live run may need, is not deleted."""
    roots, unpublished = state.settings.writable_roots, None
    try:
        with state.database.write() as session:
            unpublished = checkpoint_deletion.unpublish(session, state.settings, job_id, step, caller, utc_now())
    except OutcomeUnknown:
        raise  # The deletion may have been stored. The job's next attempt deletes the files.
    except Exception:
        if unpublished is not None:
            checkpoint_deletion.restore(unpublished, roots)
        raise
    checkpoint_deletion.delete_files(unpublished, roots)
