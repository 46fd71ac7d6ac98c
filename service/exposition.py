"""GET /metrics: the service's state as Prometheus text."""

from collections.abc import Iterator
from datetime import datetime
from typing import Any

from fastapi import APIRouter, Response
from sqlalchemy import func, select
from sqlalchemy.exc import InterfaceError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.orm import Session

from contract.status import JobStatus
from service.access.scopes import READ
from service.answers import ServiceRoute
from service.context import Services, ServicesNeeded
from service.scheduler.apply import utc_now
from service.tables import AttemptRow, JobRow, LeaseRow
from service.telemetry import counter, gauge
from service.upkeep.disks import State

TEXT = "text/plain; version=0.0.4"
TEXT_CONTENT: dict[str, Any] = {"content": {"text/plain": {"schema": {"type": "string"}}}}

router = APIRouter(tags=["service"], route_class=ServiceRoute)


@router.get("/metrics", dependencies=[READ], response_class=Response, responses={200: TEXT_CONTENT})
def prometheus(services: ServicesNeeded) -> Response:
    """Prometheus text: jobs, queue, devices, attempts, reports, requests, streams."""
    try:
        lines, up = _of_the_database(services), 1
    except (OperationalError, InterfaceError, PoolTimeout):
        lines, up = [], 0  # an alert on an outage needs what this process still knows
    lines += gauge("trainyard_database_up", "Whether the database answers.", [((), up)])
    lines += [*_scheduler(services), *_disks(services), *services.telemetry.lines()]
    return Response("\n".join(lines) + "\n", media_type=TEXT)


def _of_the_database(services: Services) -> list[str]:
    now = utc_now()
    with services.database.read() as session:
        lines = [*_jobs(session, now), *_attempts(session, now), *_running(session)]
        leased = session.scalar(select(func.count()).select_from(LeaseRow)) or 0
    return [*lines, *_devices(services, leased)]


def _jobs(session: Session, now: datetime) -> Iterator[str]:
    counted = {row[0]: row[1] for row in session.execute(select(JobRow.status, func.count()).group_by(JobRow.status))}
    by_status = [((("status", status.value),), counted.get(status.value, 0)) for status in JobStatus]
    yield from gauge("trainyard_jobs", "Jobs by status.", by_status)
    oldest = session.scalar(select(func.min(JobRow.queued_at)).where(JobRow.status == JobStatus.QUEUED))
    waits = (now - oldest).total_seconds() if oldest is not None else 0.0
    queued = counted.get(JobStatus.QUEUED.value, 0)
    yield from gauge("trainyard_queue_length", "Jobs that wait for devices.", [((), queued)])
    yield from gauge("trainyard_queue_oldest_seconds", "How long the oldest of them has waited.", [((), waits)])


def _attempts(session: Session, now: datetime) -> Iterator[str]:
    ended = session.execute(
        select(AttemptRow.outcome, func.count()).where(AttemptRow.ended_at.is_not(None)).group_by(AttemptRow.outcome)
    ).all()
    live, quiet = session.execute(
        select(func.count(), func.min(AttemptRow.heard_at)).where(AttemptRow.ended_at.is_(None))
    ).one()
    by_outcome = [((("outcome", str(outcome)),), float(number)) for outcome, number in ended]
    silence = (now - quiet).total_seconds() if quiet is not None else 0.0
    # Deleting a job takes its attempts along, so that this may go down: a gauge.
    yield from gauge("trainyard_attempts_ended", "Attempts that have ended, by outcome.", by_outcome)
    yield from gauge("trainyard_attempts_live", "Attempts that have not ended.", [((), float(live))])
    yield from gauge("trainyard_report_age_seconds", "Since the quietest live attempt was heard.", [((), silence)])


def _running(session: Session) -> Iterator[str]:
    rows = session.execute(select(JobRow.id, JobRow.progress).where(JobRow.status == JobStatus.RUNNING)).all()
    values = [((("job", job_id),), float(progress.get("tokens") or 0)) for job_id, progress in rows]
    yield from counter("trainyard_job_tokens_total", "Tokens that a running job was trained on.", values)


def _scheduler(services: Services) -> Iterator[str]:
    scheduler = services.scheduler
    yield from gauge("trainyard_scheduler_leads", "Whether this service schedules.", [((), scheduler.leads)])
    silence = [((), scheduler.silence)] if scheduler.leads else []
    yield from gauge("trainyard_scheduler_silence_seconds", "Since it finished a round, where it schedules.", silence)


def _disks(services: Services) -> Iterator[str]:
    known = [((("disk", disk.name),), disk) for disk in services.disks.seen() if disk.state is not State.UNREADABLE]
    all_ = [((("disk", disk.name),), disk.state is not State.OK) for disk in services.disks.seen()]
    free = [(labels, disk.usage.free) for labels, disk in known]
    total = [(labels, disk.usage.total) for labels, disk in known]
    yield from gauge("trainyard_disk_free_bytes", "Free on a disk that the service writes to.", free)
    yield from gauge("trainyard_disk_size_bytes", "Size of such a disk.", total)
    yield from gauge("trainyard_disk_low", "Whether it is nearly full, full, or does not answer.", all_)


def _devices(services: Services, leased: int) -> Iterator[str]:
    devices = len(services.inventory.devices())
    yield from gauge("trainyard_devices", "Devices of this host.", [((), devices)])
    yield from gauge("trainyard_devices_leased", "Devices that an attempt has.", [((), leased)])
    yield from gauge("trainyard_streams", "Streams that are open here.", [((), services.pulse.readers)])
