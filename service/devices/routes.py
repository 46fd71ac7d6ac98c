"""GET /devices."""

from fastapi import APIRouter
from sqlalchemy import select

from service.context import ServicesNeeded
from service.shapes import LeasedDevice, Page
from service.tables import LeaseRow

router = APIRouter(tags=["service"])


@router.get("/devices")
def devices(services: ServicesNeeded) -> Page[LeasedDevice]:
    """Every device of this host, who leases it, and processes on it that belong to no attempt."""
    there = services.inventory.devices()
    with services.database.read() as session:
        leases = {lease.device: lease for lease in session.scalars(select(LeaseRow))}
    shown = [
        LeasedDevice(
            id=device.id,
            kind=device.kind,
            model=device.model,
            memory_bytes=device.memory_bytes,
            memory_used_bytes=device.memory_used_bytes,
            job_id=leases[device.id].job_id if device.id in leases else None,
            attempt_id=leases[device.id].attempt_id if device.id in leases else None,
            processes=list(device.strangers),
        )
        for device in there
    ]
    return Page(data=shown, has_more=False)
