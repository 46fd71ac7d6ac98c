"""POST /jobs/plan: what a run would be. Nothing is stored."""

from collections.abc import Sequence

from fastapi import APIRouter
from sqlalchemy import func, select
from sqlalchemy.orm import Session

from trainyard.contract.spec import JobSpec
from trainyard.contract.status import JobStatus
from trainyard.service.api.bodies import JsonBody
from trainyard.service.api.dependencies import Services, ServicesNeeded
from trainyard.service.api.responses import ServiceRoute
from trainyard.service.api.routers.jobs import SPEC_BODY
from trainyard.service.auth.permissions import SUBMIT
from trainyard.service.db.models import JobRow, LeaseRow
from trainyard.service.devices.inventory import Device
from trainyard.service.jobs.submission import accept, kind_of
from trainyard.service.launch.slurm.launcher import SLURM
from trainyard.service.planning.preview import Line, forecast, look
from trainyard.service.planning.throughput import pace
from trainyard.service.schemas import Forecast

router = APIRouter(tags=["jobs"], route_class=ServiceRoute)


@router.post("/jobs/plan", dependencies=[SUBMIT], openapi_extra=SPEC_BODY)
def plan(services: ServicesNeeded, body: JsonBody) -> Forecast:
    """What the run of this spec would be: size, memory, disk, time, and what to know before. Nothing is stored.

    What depends on the corpus is estimated from at most 4 MiB of it; a job's own plan is exact once it has started.
    """
    return planned(services, accept(body, services.host))


def planned(services: Services, spec: JobSpec) -> Forecast:
    """The plan of a spec that was accepted."""
    # A cluster's devices are not this host's: nothing is known of them before Slurm has chosen some.
    devices = services.inventory.devices() if spec.resources.launcher != SLURM else ()
    kind = kind_of(spec, services.host)
    looked = look(spec)
    with services.database.read() as session:
        past = pace(session, spec, kind)
        line = _line(session, spec, kind, devices)
    return forecast(spec, kind, looked, devices, past, line, services.settings.home)


def _line(session: Session, spec: JobSpec, kind: str, devices: Sequence[Device]) -> Line:
    before = (JobRow.status == JobStatus.QUEUED, JobRow.priority >= spec.resources.priority)
    ahead = session.scalar(select(func.count()).select_from(JobRow).where(*before)) or 0
    leased = set(session.scalars(select(LeaseRow.device)))
    free = [d for d in devices if kind in (d.kind, d.id) and d.id not in leased and not d.processes]
    return Line(ahead, len(free))
