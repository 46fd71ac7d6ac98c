"""Whether the service lives, and can work."""

import platform
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version

from fastapi import APIRouter

from trainyard.service.api import readiness
from trainyard.service.api.dependencies import StateDep
from trainyard.service.api.responses import ServiceRoute
from trainyard.service.auth.permissions import OPEN, READ
from trainyard.service.errors import DatabaseUnavailable, NotReady
from trainyard.service.maintenance.disk_monitor import Disk, DiskState
from trainyard.service.schemas import (
    DiskUsage,
    Health,
    Readiness,
    ReadyPart,
    ServiceStatus,
    Version,
)

API_VERSION = 1

router = APIRouter(tags=["service"], route_class=ServiceRoute)


@router.get("/health", dependencies=[OPEN])
async def health() -> Health:
    """The process answers."""
    return Health()


@router.get("/ready", dependencies=[OPEN])
def ready(services: StateDep) -> Readiness:
    """Whether it can take work: its database, its tables, the scheduler and the disks. 503 says what is wrong."""
    found = list(readiness.check_components(services))
    broken = [part for part in found if not part.ok]
    if broken:
        detail = "; ".join(f"{part.name}: {part.detail}" for part in broken)
        kind = DatabaseUnavailable if broken[0].name == "database" else NotReady
        raise kind(f"Not ready. {detail}.", {"Retry-After": "1"}, parts=[asdict(part) for part in found])
    return Readiness(parts=[ReadyPart.model_validate(part) for part in found])


@router.get("/status", dependencies=[READ])
def status(services: StateDep) -> ServiceStatus:
    """How the service itself is: what /ready looks at, and its disks."""
    parts = [ReadyPart.model_validate(part) for part in readiness.check_components(services)]
    disks = [_shown(disk) for disk in services.disks.readings()]
    return ServiceStatus(
        ready=all(part.ok for part in parts), parts=parts, disks=disks, schedules=services.scheduler.leads
    )


def _shown(disk: Disk) -> DiskUsage:
    known = disk.state is not DiskState.UNREADABLE
    return DiskUsage(
        id=disk.name,
        paths=[str(path) for path in disk.paths],
        state=disk.state,
        total_bytes=disk.usage.total if known else None,
        free_bytes=disk.usage.free if known else None,
        low_below_bytes=disk.limit if known else None,
    )


@router.get("/version", dependencies=[READ])
def show_version(services: StateDep) -> Version:
    """What is running here."""
    return Version(
        name="trainyard",
        version=package_version(),
        api=API_VERSION,
        python=platform.python_version(),
        database=services.database.engine.dialect.name,
    )


def package_version() -> str:
    """The installed package's version."""
    try:
        return version("trainyard")
    except PackageNotFoundError:
        return "unknown"
