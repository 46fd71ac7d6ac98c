"""Whether the service can work, part by part, each with a sentence for whoever has to mend it."""

from collections.abc import Iterator
from dataclasses import dataclass

from sqlalchemy import text
from sqlalchemy.exc import SQLAlchemyError

from trainyard.service.api.dependencies import AppState
from trainyard.service.db.engine import newest_revision
from trainyard.service.db.models import SchedulerLeaseRow
from trainyard.service.errors import DatabaseUnavailable
from trainyard.service.leadership import LEASE_SECONDS, ROW, LeaderMonitor
from trainyard.service.maintenance import warnings
from trainyard.service.maintenance.disk_monitor import DiskMonitor, DiskState
from trainyard.service.scheduler.loop import Scheduler

MAX_ROUND_SECONDS = 60.0
"""A round of the scheduler that takes longer hangs: none of its calls may."""

MAX_TAKEOVER_SECONDS = LEASE_SECONDS + 6.0
"""Somebody else schedules again within this, where there is somebody else."""


@dataclass(frozen=True)
class ComponentHealth:
    """One thing that the service needs. ``detail`` names no path, address or secret."""

    name: str
    ok: bool
    detail: str


@dataclass(frozen=True)
class DatabaseState:
    """What was found in the database: its revision, and who schedules."""

    revision: str | None
    leader: SchedulerLeaseRow | None


def check_components(services: AppState) -> Iterator[ComponentHealth]:
    """All of them."""
    looked = _query_database(services)
    if isinstance(looked, ComponentHealth):
        yield looked
    else:
        yield ComponentHealth("database", True, "answers")
        yield _migrations(looked.revision)
    yield _scheduler(services.scheduler, services.leader, looked)
    yield _disks(services.disks)


def _query_database(services: AppState) -> DatabaseState | ComponentHealth:
    try:
        services.database.require_same_file()
        with services.database.read() as session:
            session.execute(text("SELECT 1"))
            try:
                revision = session.scalar(text("SELECT version_num FROM alembic_version"))
                return DatabaseState(revision, session.get(SchedulerLeaseRow, ROW))
            except SQLAlchemyError:
                return DatabaseState(None, None)
    except DatabaseUnavailable:
        return ComponentHealth("database", False, "its file was removed or replaced")
    except SQLAlchemyError as error:
        return ComponentHealth("database", False, f"does not answer: {type(error).__name__}")


def _migrations(revision: str | None) -> ComponentHealth:
    newest = newest_revision()
    if revision == newest:
        return ComponentHealth("migrations", True, f"at {newest}")
    return ComponentHealth(
        "migrations", False, f"the tables are at {revision or 'nothing'}, this release needs {newest}"
    )


def _scheduler(scheduler: Scheduler, watch: LeaderMonitor, looked: DatabaseState | ComponentHealth) -> ComponentHealth:
    if not scheduler.alive:
        return ComponentHealth("scheduler", False, "does not run")
    if scheduler.leads and scheduler.seconds_since_round > MAX_ROUND_SECONDS:
        return ComponentHealth(
            "scheduler", False, f"has not finished a round for {scheduler.seconds_since_round:.0f} s"
        )
    if scheduler.leads:
        return ComponentHealth("scheduler", True, "runs here")
    if isinstance(looked, ComponentHealth):
        return ComponentHealth("scheduler", False, "cannot be known while the database is away")
    silence = watch.seconds_since_renewal(looked.leader)
    if silence > MAX_TAKEOVER_SECONDS:
        return ComponentHealth("scheduler", False, f"no service that schedules was heard for {silence:.0f} s")
    elsewhere = looked.leader is not None and looked.leader.holder is not None
    return ComponentHealth("scheduler", True, "runs in another service" if elsewhere else "is about to begin")


def _disks(watch: DiskMonitor) -> ComponentHealth:
    """Full or silent ones keep work from being taken; low ones are only told of."""
    if watch.stale:
        return ComponentHealth("disk", False, "a disk does not answer")
    troubled = [disk for disk in watch.readings() if disk.state is not DiskState.OK]
    ok = not any(disk.state in (DiskState.FULL, DiskState.UNREADABLE) for disk in troubled)
    return ComponentHealth("disk", ok, "; ".join(warnings.to_alert(disk) for disk in troubled) or "has room")
