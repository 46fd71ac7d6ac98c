"""The routes of devices: the list, and the errors of a GPU that was repaired."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, cast

from fastapi import APIRouter, Path
from sqlalchemy import select

from trainyard.service.api.dependencies import StateDep
from trainyard.service.api.responses import ServiceRoute
from trainyard.service.api.routers.jobs import OptionalLimit, OptionalText
from trainyard.service.api.shared_reads import shared
from trainyard.service.auth.permissions import ADMIN, READ
from trainyard.service.bodies import NO_FIELDS
from trainyard.service.clock import utc_now
from trainyard.service.db.models import AttemptRow, DeviceLeaseRow
from trainyard.service.devices import xids
from trainyard.service.devices.inventory import Device
from trainyard.service.devices.xids import XidError
from trainyard.service.errors import DeviceNotFound
from trainyard.service.jobs.listing import page_of_all
from trainyard.service.schemas import DeviceResponse, Page, XidErrorResponse

# Built once, and read as plain rows: that is most of the cost of the list.
LEASES = select(*DeviceLeaseRow.__table__.c)
LIVE_ON_CLUSTERS = (
    select(AttemptRow.id, AttemptRow.job_id, AttemptRow.placement)
    .where(AttemptRow.ended_at.is_(None), AttemptRow.placement.is_not(None))
    .order_by(AttemptRow.created_at)
)

router = APIRouter(tags=["devices"], route_class=ServiceRoute)

log = logging.getLogger("trainyard")

DeviceId = Annotated[str, Path(description="Id of a device, such as `cuda:3`; or the UUID of a GPU.")]


@router.get("/devices", dependencies=[READ])
@shared()
def list_devices(state: StateDep, limit: OptionalLimit = None, after: OptionalText = None) -> Page[DeviceResponse]:
    """List the devices of this host, with the attempt that leases each, and processes of other programs.

    They are followed by the devices that a cluster has allocated to live attempts.
    """
    host_devices = state.inventory.devices()
    with state.database.read() as session:
        connection = session.connection()
        leases = {lease.device: cast(DeviceLeaseRow, lease) for lease in connection.execute(LEASES)}
        has_gpu = any(device.uuid is not None for device in host_devices)
        errors = xids.uncleared(session, utc_now()) if has_gpu else {}
        on_clusters = cast(Sequence[AttemptRow], connection.execute(LIVE_ON_CLUSTERS).all())
    responses = [_response(device, leases.get(device.id), errors) for device in host_devices]
    data, has_more = page_of_all([*responses, *_cluster_devices(on_clusters)], limit, after)
    return Page(data=list(data), has_more=has_more)


@router.post("/devices/{device_id}/clear", dependencies=[ADMIN, NO_FIELDS])
def clear_device(state: StateDep, device_id: DeviceId) -> DeviceResponse:
    """Clear the XID errors of a GPU that was checked or repaired. It may be leased again at once."""
    device = next((device for device in state.inventory.devices() if device_id in (device.id, device.uuid)), None)
    if device is None:
        raise DeviceNotFound()
    with state.database.write() as session:
        count = xids.clear(session, device.uuid, utc_now()) if device.uuid is not None else 0
        lease = session.scalar(select(DeviceLeaseRow).where(DeviceLeaseRow.device == device.id))
        response = _response(device, lease, {})
    log.info("the errors of a device were cleared", extra={"device": device.id, "errors": count})
    state.scheduler.wake()
    return response


def _response(device: Device, lease: DeviceLeaseRow | None, errors: Mapping[str, Sequence[XidError]]) -> DeviceResponse:
    return DeviceResponse(
        id=device.id,
        kind=device.kind,
        model=device.model,
        memory_bytes=device.memory_bytes,
        memory_used_bytes=device.memory_used_bytes,
        temperature_celsius=device.temperature_celsius,
        uuid=device.uuid,
        pci_bus_id=device.pci_bus_id,
        numa_node=device.numa_node,
        link=device.link,
        nvlink_peers=list(device.nvlink_peers),
        xid_errors=[XidErrorResponse(xid=error.xid, at=error.at) for error in errors.get(device.uuid or "", ())],
        fault=device.fault,
        job_id=lease.job_id if lease is not None else None,
        attempt_id=lease.attempt_id if lease is not None else None,
        processes=list(device.strangers),
    )


def _cluster_devices(attempts: Sequence[AttemptRow]) -> Iterator[DeviceResponse]:
    for attempt in attempts:
        for device in (attempt.placement or {}).get("devices", ()):
            kind = device.rpartition("/")[2].partition(":")[0]
            yield DeviceResponse(id=device, kind=kind, job_id=attempt.job_id, attempt_id=attempt.id)
