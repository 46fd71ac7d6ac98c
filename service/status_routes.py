"""Whether the service lives, and can work."""

import platform
from importlib.metadata import PackageNotFoundError, version

from fastapi import APIRouter
from sqlalchemy import text

from service.context import ServicesNeeded
from service.errors import NotReady
from service.shapes import Health, Version

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
