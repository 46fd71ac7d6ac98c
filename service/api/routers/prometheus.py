"""GET /metrics: the service's state as Prometheus text."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from fastapi import APIRouter, Response
from prometheus_client import Metric, generate_latest
from prometheus_client.core import CounterMetricFamily as Counter
from prometheus_client.core import GaugeMetricFamily as Gauge
from prometheus_client.registry import Collector
from sqlalchemy import func, select
from sqlalchemy.exc import InterfaceError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.orm import Session

from trainyard.contract.status import JobStatus
from trainyard.service.api.dependencies import AppState, StateDep
from trainyard.service.api.responses import ServiceRoute
from trainyard.service.auth.permissions import READ
from trainyard.service.clock import utc_now
from trainyard.service.db.models import AttemptRow, DeviceLeaseRow, JobRow
from trainyard.service.maintenance.disk_monitor import DiskState

TEXT = "text/plain; version=0.0.4"
TEXT_CONTENT: dict[str, Any] = {"content": {"text/plain": {"schema": {"type": "string"}}}}

Kind = type[Gauge] | type[Counter]

router = APIRouter(tags=["service"], route_class=ServiceRoute)


@router.get("/metrics", dependencies=[READ], response_class=Response, responses={200: TEXT_CONTENT})
def prometheus(services: StateDep) -> Response:
    """Prometheus text: jobs, queue, devices, attempts, reports, requests, streams."""
    return Response(generate_latest(StateCollector(services)), media_type=TEXT)


@dataclass(frozen=True)
class StateCollector(Collector):
    """The state of the database, the devices and the disks, and what this process counts."""

    services: AppState

    def collect(self) -> Iterator[Metric]:
        """Yield every metric of the service, read now."""
        try:
            metrics, up = _of_the_database(self.services), 1
        except (OperationalError, InterfaceError, PoolTimeout):
            metrics, up = [], 0  # an alert on an outage needs what this process still knows
        yield from metrics
        yield Gauge("trainyard_database_up", "Whether the database answers.", up)
        yield from _scheduler(self.services)
        yield from _disks(self.services)
        yield from self.services.metrics.collect()


def _by(label: str, name: str, explained: str, values: Mapping[str, float], kind: Kind = Gauge) -> Metric:
    family = kind(name, explained, labels=[label])
    for text, value in values.items():
        family.add_metric([text], value)
    return family


def _of_the_database(services: AppState) -> list[Metric]:
    now = utc_now()
    with services.database.read() as session:
        metrics = [*_jobs(session, now), *_attempts(session, now), _running(session)]
        leased = session.scalar(select(func.count()).select_from(DeviceLeaseRow)) or 0
    return [
        *metrics,
        Gauge("trainyard_devices", "Devices of this host.", len(services.inventory.devices())),
        Gauge("trainyard_devices_leased", "Devices that an attempt has.", leased),
        Gauge("trainyard_streams", "Streams that are open here.", services.broadcaster.readers),
    ]


def _jobs(session: Session, now: datetime) -> Iterator[Metric]:
    counted = {row[0]: row[1] for row in session.execute(select(JobRow.status, func.count()).group_by(JobRow.status))}
    by_status = {status.value: counted.get(status.value, 0) for status in JobStatus}
    yield _by("status", "trainyard_jobs", "Jobs by status.", by_status)
    yield Gauge("trainyard_queue_length", "Jobs that wait for devices.", by_status[JobStatus.QUEUED.value])
    oldest = session.scalar(select(func.min(JobRow.queued_at)).where(JobRow.status == JobStatus.QUEUED))
    waits = (now - oldest).total_seconds() if oldest is not None else 0.0
    yield Gauge("trainyard_queue_oldest_seconds", "How long the oldest of them has waited.", waits)


def _attempts(session: Session, now: datetime) -> Iterator[Metric]:
    ended = session.execute(
        select(AttemptRow.outcome, func.count()).where(AttemptRow.ended_at.is_not(None)).group_by(AttemptRow.outcome)
    ).all()
    live, quiet = session.execute(
        select(func.count(), func.min(AttemptRow.heard_at)).where(AttemptRow.ended_at.is_(None))
    ).one()
    by_outcome = {str(outcome): number for outcome, number in ended}
    silence = (now - quiet).total_seconds() if quiet is not None else 0.0
    # Deleting a job takes its attempts along, so that this may go down: a gauge.
    yield _by("outcome", "trainyard_attempts_ended", "Attempts that have ended, by outcome.", by_outcome)
    yield Gauge("trainyard_attempts_live", "Attempts that have not ended.", live)
    yield Gauge("trainyard_report_age_seconds", "Since the quietest live attempt was heard.", silence)


def _running(session: Session) -> Metric:
    rows = session.execute(select(JobRow.id, JobRow.progress).where(JobRow.status == JobStatus.RUNNING)).all()
    tokens = {job_id: float(progress.get("tokens") or 0) for job_id, progress in rows}
    return _by("job", "trainyard_job_tokens_total", "Tokens that a running job was trained on.", tokens, Counter)


def _scheduler(services: AppState) -> Iterator[Metric]:
    leads = services.scheduler.leads
    yield Gauge("trainyard_scheduler_leads", "Whether this service schedules.", float(leads))
    silence = services.scheduler.seconds_since_round if leads else None  # None: the metric has no sample
    yield Gauge("trainyard_scheduler_silence_seconds", "Since it finished a round, where it schedules.", silence)


def _disks(services: AppState) -> Iterator[Metric]:
    disks = services.disks.readings()
    known = [disk for disk in disks if disk.state is not DiskState.UNREADABLE]
    free = {disk.name: disk.usage.free for disk in known}
    size = {disk.name: disk.usage.total for disk in known}
    low = {disk.name: disk.state is not DiskState.OK for disk in disks}
    yield _by("disk", "trainyard_disk_free_bytes", "Free on a disk that the service writes to.", free)
    yield _by("disk", "trainyard_disk_size_bytes", "Size of such a disk.", size)
    yield _by("disk", "trainyard_disk_low", "Whether it is nearly full, full, or does not answer.", low)
