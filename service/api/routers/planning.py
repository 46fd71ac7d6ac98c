"""POST /jobs/plan: what a run would be. Nothing is stored."""

from collections.abc import Sequence

from fastapi import APIRouter
from sqlalchemy import func, select
from sqlalchemy.orm import Session

from trainyard.contract.spec import JobSpec
from trainyard.contract.status import JobStatus
from trainyard.service.api.dependencies import AppState, StateDep
from trainyard.service.api.responses import ServiceRoute
from trainyard.service.api.routers.jobs import SPEC_BODY
from trainyard.service.auth.permissions import SUBMIT
from trainyard.service.bodies import JsonBody
from trainyard.service.db.models import DeviceLeaseRow, JobRow
from trainyard.service.devices.inventory import Device
from trainyard.service.jobs.submission import kind_of, validate_spec
from trainyard.service.launch.slurm.launcher import SLURM
from trainyard.service.planning.preview import QueuePosition, preview, sample_corpus
from trainyard.service.planning.throughput import find_throughput
from trainyard.service.schemas import PlanPreview

router = APIRouter(tags=["jobs"], route_class=ServiceRoute)


@router.post("/jobs/plan", dependencies=[SUBMIT], openapi_extra=SPEC_BODY)
def plan(services: StateDep, body: JsonBody) -> PlanPreview:
    """What the run of this spec would be: size, memory, disk, time, and what to know before. Nothing is stored.

    What depends on the corpus is estimated from at most 4 MiB of it; a job's own plan is exact once it has started.
    """
    return make_preview(services, validate_spec(body, services.host_limits))


def make_preview(services: AppState, spec: JobSpec) -> PlanPreview:
    """The plan of a spec that was accepted."""
    # A cluster's devices are not this host's: nothing is known of them before Slurm has chosen some.
    devices = services.inventory.devices() if spec.resources.launcher != SLURM else ()
    kind = kind_of(spec, services.host_limits)
    looked = sample_corpus(spec)
    with services.database.read() as session:
        past = find_throughput(session, spec, kind)
        line = _line(session, spec, kind, devices)
    return preview(spec, kind, looked, devices, past, line, services.settings.home)


def _line(session: Session, spec: JobSpec, kind: str, devices: Sequence[Device]) -> QueuePosition:
    before = (JobRow.status == JobStatus.QUEUED, JobRow.priority >= spec.resources.priority)
    ahead = session.scalar(select(func.count()).select_from(JobRow).where(*before)) or 0
    leased = set(session.scalars(select(DeviceLeaseRow.device)))
    free = [d for d in devices if kind in (d.kind, d.id) and d.id not in leased and not d.processes]
    return QueuePosition(ahead, len(free))
