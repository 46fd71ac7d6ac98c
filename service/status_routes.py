"""Whether the service lives, can work, and how much it does."""

import platform
from importlib.metadata import PackageNotFoundError, version

from fastapi import APIRouter, Response
from sqlalchemy import func, select, text

from contract.status import JobStatus
from service.context import ServicesNeeded
from service.errors import NotReady
from service.shapes import Health, Version
from service.tables import JobRow, LeaseRow, MetricRow

API_VERSION = 1

router = APIRouter(tags=["service"])


@router.get("/health")
def health() -> Health:
    """The process answers."""
    return Health()


@router.get("/ready")
def ready(services: ServicesNeeded) -> Health:
    """The database answers and the scheduler runs."""
    with services.database.read() as session:
        session.execute(text("SELECT 1"))
    if not services.scheduler.alive:
        raise NotReady("The scheduler does not run.")
    return Health()


@router.get("/version")
def show_version(services: ServicesNeeded) -> Version:
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


@router.get("/metrics", response_class=Response)
def prometheus(services: ServicesNeeded) -> Response:
    """Prometheus text."""
    with services.database.read() as session:
        counted = session.execute(select(JobRow.status, func.count()).group_by(JobRow.status)).all()
        leased = session.scalar(select(func.count()).select_from(LeaseRow)) or 0
        tokens = session.execute(
            select(JobRow.id, func.max(MetricRow.tokens))
            .join(MetricRow, MetricRow.job_id == JobRow.id)
            .where(JobRow.status == JobStatus.RUNNING)
            .group_by(JobRow.id)
        ).all()
    by_status = {row[0]: row[1] for row in counted}
    lines = ["# TYPE trainyard_jobs gauge"]
    lines += [f'trainyard_jobs{{status="{status}"}} {by_status.get(status, 0)}' for status in JobStatus]
    lines += ["# TYPE trainyard_devices gauge", f"trainyard_devices {len(services.inventory.devices())}"]
    lines += ["# TYPE trainyard_devices_leased gauge", f"trainyard_devices_leased {leased}"]
    lines += ["# TYPE trainyard_job_tokens counter"]
    lines += [f'trainyard_job_tokens{{job="{job_id}"}} {count}' for job_id, count in tokens]
    return Response("\n".join(lines) + "\n", media_type="text/plain; version=0.0.4")
