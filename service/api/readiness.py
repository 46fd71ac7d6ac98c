"""Whether the service can work, part by part, each with a sentence for whoever has to mend it."""

from collections.abc import Iterator
from dataclasses import dataclass

from sqlalchemy import text
from sqlalchemy.exc import SQLAlchemyError

from trainyard.service.api.dependencies import Services
from trainyard.service.db.engine import newest_revision
from trainyard.service.db.models import LeaderRow
from trainyard.service.errors import DatabaseAway
from trainyard.service.leadership import LEASE_SECONDS, ROW, LeaderWatch
from trainyard.service.maintenance import warnings
from trainyard.service.maintenance.disk_monitor import DiskWatch, State
from trainyard.service.scheduler.loop import Scheduler

ROUND_SECONDS = 60.0
"""A round of the scheduler that takes longer hangs: none of its calls may."""

TAKEOVER_SECONDS = LEASE_SECONDS + 6.0
"""Somebody else schedules again within this, where there is somebody else."""


@dataclass(frozen=True)
class Part:
    """One thing that the service needs. ``detail`` names no path, address or secret."""

    name: str
    ok: bool
    detail: str


@dataclass(frozen=True)
class Looked:
    """What was found in the database: its revision, and who schedules."""

    revision: str | None
    leader: LeaderRow | None


def parts(services: Services) -> Iterator[Part]:
    """All of them."""
    looked = _look(services)
    if isinstance(looked, Part):
        yield looked
    else:
        yield Part("database", True, "answers")
        yield _migrations(looked.revision)
    yield _scheduler(services.scheduler, services.leader, looked)
    yield _disks(services.disks)


def _look(services: Services) -> Looked | Part:
    try:
        services.database.require_there()
        with services.database.read() as session:
            session.execute(text("SELECT 1"))
            try:
                revision = session.scalar(text("SELECT version_num FROM alembic_version"))
                return Looked(revision, session.get(LeaderRow, ROW))
            except SQLAlchemyError:
                return Looked(None, None)
    except DatabaseAway:
        return Part("database", False, "its file was removed or replaced")
    except SQLAlchemyError as error:
        return Part("database", False, f"does not answer: {type(error).__name__}")


def _migrations(revision: str | None) -> Part:
    newest = newest_revision()
    if revision == newest:
        return Part("migrations", True, f"at {newest}")
    return Part("migrations", False, f"the tables are at {revision or 'nothing'}, this release needs {newest}")


def _scheduler(scheduler: Scheduler, watch: LeaderWatch, looked: Looked | Part) -> Part:
    if not scheduler.alive:
        return Part("scheduler", False, "does not run")
    if scheduler.leads and scheduler.silence > ROUND_SECONDS:
        return Part("scheduler", False, f"has not finished a round for {scheduler.silence:.0f} s")
    if scheduler.leads:
        return Part("scheduler", True, "runs here")
    if isinstance(looked, Part):
        return Part("scheduler", False, "cannot be known while the database is away")
    silence = watch.silence(looked.leader)
    if silence > TAKEOVER_SECONDS:
        return Part("scheduler", False, f"no service that schedules was heard for {silence:.0f} s")
    elsewhere = looked.leader is not None and looked.leader.holder is not None
    return Part("scheduler", True, "runs in another service" if elsewhere else "is about to begin")


def _disks(watch: DiskWatch) -> Part:
    """Full or silent ones keep work from being taken; low ones are only told of."""
    if watch.stale:
        return Part("disk", False, "a disk does not answer")
    troubled = [disk for disk in watch.seen() if disk.state is not State.OK]
    ok = not any(disk.state in (State.FULL, State.UNREADABLE) for disk in troubled)
    return Part("disk", ok, "; ".join(warnings.described(disk) for disk in troubled) or "has room")
