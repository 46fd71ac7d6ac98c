"""The route that lists the devices."""

from collections.abc import Iterator, Sequence

from fastapi import APIRouter
from sqlalchemy import select

from trainyard.service.api.dependencies import StateDep
from trainyard.service.api.responses import ServiceRoute
from trainyard.service.api.routers.jobs import OptionalLimit, OptionalText
from trainyard.service.auth.permissions import READ
from trainyard.service.db.models import AttemptRow, DeviceLeaseRow
from trainyard.service.jobs.listing import page_of_all
from trainyard.service.schemas import DeviceResponse, Page

router = APIRouter(tags=["devices"], route_class=ServiceRoute)


@router.get("/devices", dependencies=[READ])
def list_devices(state: StateDep, limit: OptionalLimit = None, after: OptionalText = None) -> Page[DeviceResponse]:
    """List the devices of this host, with the attempt that leases each, and processes of other programs.

    They are followed by the devices that a cluster has allocated to live attempts.
    """
    host_devices = state.inventory.devices()
    with state.database.read() as session:
        leases = {lease.device: lease for lease in session.scalars(select(DeviceLeaseRow))}
        live = (AttemptRow.ended_at.is_(None), AttemptRow.placement.is_not(None))
        on_clusters = session.scalars(select(AttemptRow).where(*live).order_by(AttemptRow.created_at)).all()
    responses = [
        DeviceResponse(
            id=device.id,
            kind=device.kind,
            model=device.model,
            memory_bytes=device.memory_bytes,
            memory_used_bytes=device.memory_used_bytes,
            temperature_celsius=device.temperature_celsius,
            job_id=leases[device.id].job_id if device.id in leases else None,
            attempt_id=leases[device.id].attempt_id if device.id in leases else None,
            processes=list(device.strangers),
        )
        for device in host_devices
    ]
    data, has_more = page_of_all([*responses, *_cluster_devices(on_clusters)], limit, after)
    return Page(data=list(data), has_more=has_more)


def _cluster_devices(attempts: Sequence[AttemptRow]) -> Iterator[DeviceResponse]:
    for attempt in attempts:
        for device in (attempt.placement or {}).get("devices", ()):
            kind = device.rpartition("/")[2].partition(":")[0]
            yield DeviceResponse(id=device, kind=kind, job_id=attempt.job_id, attempt_id=attempt.id)
