"""Health of the service by component: database, migrations, scheduler and disks."""

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
"""A scheduler round that takes longer is hung: each of its calls has a shorter timeout."""

MAX_TAKEOVER_SECONDS = LEASE_SECONDS + 6.0
"""Another service, if there is one, takes over the scheduling within this time."""


@dataclass(frozen=True)
class ComponentHealth:
    """The health of one component. ``detail`` contains no path, address or secret."""

    name: str
    ok: bool
    detail: str


@dataclass(frozen=True)
class DatabaseState:
    """The revision of the tables, and the leader lease."""

    revision: str | None
    leader: SchedulerLeaseRow | None


def check_components(state: AppState) -> Iterator[ComponentHealth]:
    """Yield the health of each component."""
    database = _query_database(state)
    if isinstance(database, ComponentHealth):
        yield database
    else:
        yield ComponentHealth("database", True, "answers")
        yield _migrations(database.revision)
    yield _scheduler(state.scheduler, state.leader, database)
    yield _disks(state.disks)


def _query_database(state: AppState) -> DatabaseState | ComponentHealth:
    try:
        state.database.require_same_file()
        with state.database.read() as session:
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


def _scheduler(
    scheduler: Scheduler, monitor: LeaderMonitor, database: DatabaseState | ComponentHealth
) -> ComponentHealth:
    if not scheduler.alive:
        return ComponentHealth("scheduler", False, "does not run")
    if scheduler.leads and scheduler.seconds_since_round > MAX_ROUND_SECONDS:
        return ComponentHealth(
            "scheduler", False, f"has not finished a round for {scheduler.seconds_since_round:.0f} s"
        )
    if scheduler.leads:
        return ComponentHealth("scheduler", True, "runs here")
    if isinstance(database, ComponentHealth):
        return ComponentHealth("scheduler", False, "unknown while the database is unavailable")
    silence = monitor.seconds_since_renewal(database.leader)
    if silence > MAX_TAKEOVER_SECONDS:
        return ComponentHealth("scheduler", False, f"no service has renewed the scheduler lease for {silence:.0f} s")
    elsewhere = database.leader is not None and database.leader.holder is not None
    return ComponentHealth("scheduler", True, "runs in another service" if elsewhere else "is about to begin")


def _disks(monitor: DiskMonitor) -> ComponentHealth:
    if monitor.stale:
        return ComponentHealth("disk", False, "a disk does not answer")
    # A disk that is only low is reported, but the service is still ready.
    not_ok = [disk for disk in monitor.readings() if disk.state is not DiskState.OK]
    ready = not any(disk.state in (DiskState.FULL, DiskState.UNREADABLE) for disk in not_ok)
    return ComponentHealth("disk", ready, "; ".join(warnings.to_alert(disk) for disk in not_ok) or "has room")
