"""Routes about the service itself: health, readiness, status and version."""

import platform
from importlib.metadata import PackageNotFoundError, version

from fastapi import APIRouter, Request, Response

from trainyard.contract.service_proof import NONCE, NONCE_HEADER, PROOF_HEADER, prove_service
from trainyard.service.api import readiness
from trainyard.service.api.dependencies import StateDep
from trainyard.service.api.responses import ServiceRoute
from trainyard.service.auth.permissions import OPEN, READ
from trainyard.service.auth.principal import PrincipalDep
from trainyard.service.errors import DatabaseUnavailable, NotReady
from trainyard.service.maintenance.disk_monitor import Disk, DiskState
from trainyard.service.schemas import DiskUsage, Health, Readiness, ServiceStatus, Version

API_VERSION = 1

router = APIRouter(tags=["service"], route_class=ServiceRoute)


@router.get("/health", dependencies=[OPEN])
async def get_health(state: StateDep, request: Request, response: Response) -> Health:
    """Return ok if the process responds."""
    nonce = request.headers.get(NONCE_HEADER, "")
    if NONCE.fullmatch(nonce):
        # A client asks whether this is the service of a home that it knows, before it sends a token.
        address, port = request.scope["server"]
        response.headers[PROOF_HEADER] = prove_service(state.service_key, nonce, address, port or 0)
    return Health()


@router.get("/ready", dependencies=[OPEN])
def get_readiness(state: StateDep) -> Readiness:
    """Check the database, its tables, the scheduler and the disks. A 503 names the component that is not ready."""
    components = list(readiness.check_components(state))
    failed = [component for component in components if not component.ok]
    if failed:
        detail = "; ".join(f"{component.name}: {component.detail}" for component in failed)
        kind = DatabaseUnavailable if failed[0].name == "database" else NotReady
        raise kind(f"Not ready. {detail}.", parts=[component.model_dump() for component in components])
    return Readiness(parts=components)


@router.get("/status", dependencies=[READ])
def get_status(state: StateDep) -> ServiceStatus:
    """Return the components that /ready checks, and the disks."""
    parts = list(readiness.check_components(state))
    disks = [_to_response(disk) for disk in state.disks.readings()]
    return ServiceStatus(
        ready=all(part.ok for part in parts), parts=parts, disks=disks, schedules=state.scheduler.leads
    )


def _to_response(disk: Disk) -> DiskUsage:
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
def get_version(state: StateDep, caller: PrincipalDep) -> Version:
    """Return the version of the service, of the API and of Python, and the name and the scope of the token."""
    return Version(
        name="trainyard",
        version=package_version(),
        api=API_VERSION,
        python=platform.python_version(),
        database=state.database.engine.dialect.name,
        caller=caller.name,
        scope=caller.scope,
    )


def package_version() -> str:
    """Return the version of the installed package."""
    try:
        return version("trainyard")
    except PackageNotFoundError:
        return "unknown"
