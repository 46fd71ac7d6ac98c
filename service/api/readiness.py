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
from trainyard.service.schemas import ReadyPart

MAX_ROUND_SECONDS = 60.0
"""A scheduler round that takes longer is hung: each of its calls has a shorter timeout."""

MAX_TAKEOVER_SECONDS = LEASE_SECONDS + 6.0
"""Another service, if there is one, takes over the scheduling within this time."""


@dataclass(frozen=True)
class DatabaseState:
    """The revision of the tables, and the leader lease."""

    revision: str | None
    leader: SchedulerLeaseRow | None


def check_components(state: AppState) -> Iterator[ReadyPart]:
    """Yield the health of each component."""
    database = _query_database(state)
    if isinstance(database, ReadyPart):
        yield database
    else:
        yield ReadyPart(name="database", ok=True, detail="answers")
        yield _migrations(database.revision)
    yield _scheduler(state.scheduler, state.leader, database)
    yield _disks(state.disks)


def _query_database(state: AppState) -> DatabaseState | ReadyPart:
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
        return ReadyPart(name="database", ok=False, detail="its file was removed or replaced")
    except SQLAlchemyError as error:
        return ReadyPart(name="database", ok=False, detail=f"does not answer: {type(error).__name__}")


def _migrations(revision: str | None) -> ReadyPart:
    newest = newest_revision()
    if revision == newest:
        return ReadyPart(name="migrations", ok=True, detail=f"at {newest}")
    return ReadyPart(
        name="migrations", ok=False, detail=f"the tables are at {revision or 'nothing'}, this release needs {newest}"
    )


def _scheduler(scheduler: Scheduler, monitor: LeaderMonitor, database: DatabaseState | ReadyPart) -> ReadyPart:
    if not scheduler.alive:
        return ReadyPart(name="scheduler", ok=False, detail="does not run")
    if not scheduler.launches:
        return ReadyPart(name="scheduler", ok=False, detail="the service is stopping: its runs save first")
    if scheduler.leads and scheduler.seconds_since_round > MAX_ROUND_SECONDS:
        return ReadyPart(
            name="scheduler", ok=False, detail=f"has not finished a round for {scheduler.seconds_since_round:.0f} s"
        )
    if scheduler.leads:
        return ReadyPart(name="scheduler", ok=True, detail="runs here")
    if isinstance(database, ReadyPart):
        return ReadyPart(name="scheduler", ok=False, detail="unknown while the database is unavailable")
    silence = monitor.seconds_since_renewal(database.leader)
    if silence > MAX_TAKEOVER_SECONDS:
        return ReadyPart(
            name="scheduler", ok=False, detail=f"no service has renewed the scheduler lease for {silence:.0f} s"
        )
    elsewhere = database.leader is not None and database.leader.holder is not None
    return ReadyPart(name="scheduler", ok=True, detail="runs in another service" if elsewhere else "is about to begin")


def _disks(monitor: DiskMonitor) -> ReadyPart:
    if monitor.stale:
        return ReadyPart(name="disk", ok=False, detail="a disk does not answer")
    # A disk that is only low is reported, but the service is still ready.
    not_ok = [disk for disk in monitor.readings() if disk.state is not DiskState.OK]
    ready = not any(disk.state in (DiskState.FULL, DiskState.UNREADABLE) for disk in not_ok)
    return ReadyPart(name="disk", ok=ready, detail="; ".join(warnings.to_alert(disk) for disk in not_ok) or "has room")
