"""The route that exposes the state of the service as Prometheus metrics."""

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
from trainyard.service.devices import xids
from trainyard.service.maintenance.disk_monitor import DiskState

TEXT = "text/plain; version=0.0.4"
TEXT_CONTENT: dict[str, Any] = {"content": {"text/plain": {"schema": {"type": "string"}}}}

Kind = type[Gauge] | type[Counter]

router = APIRouter(tags=["service"], route_class=ServiceRoute)


@router.get("/metrics", dependencies=[READ], response_class=Response, responses={200: TEXT_CONTENT})
def get_prometheus_metrics(state: StateDep) -> Response:
    """Return Prometheus metrics of jobs, queue, devices, attempts, reports, requests and streams."""
    return Response(generate_latest(StateCollector(state)), media_type=TEXT)


@dataclass(frozen=True)
class StateCollector(Collector):
    """Metrics of the database, the devices and the disks, and the counters of this process."""

    state: AppState

    def collect(self) -> Iterator[Metric]:
        """Yield every metric with its current value."""
        try:
            metrics, up = _database_metrics(self.state), 1
        except (OperationalError, InterfaceError, PoolTimeout):
            metrics, up = [], 0  # The other metrics are still served: an alert on the outage needs them.
        yield from metrics
        yield Gauge("trainyard_database_up", "Whether the database answers.", up)
        yield from _scheduler(self.state)
        yield from _disks(self.state)
        yield from self.state.metrics.collect()


def _labelled(label: str, name: str, explained: str, values: Mapping[str, float], kind: Kind = Gauge) -> Metric:
    family = kind(name, explained, labels=[label])
    for text, value in values.items():
        family.add_metric([text], value)
    return family


def _database_metrics(state: AppState) -> list[Metric]:
    now = utc_now()
    with state.database.read() as session:
        metrics = [*_jobs(session, now), *_attempts(session, now), _running(session)]
        leased = session.scalar(select(func.count()).select_from(DeviceLeaseRow)) or 0
        devices = xids.with_xid_errors(state.inventory.devices(), xids.uncleared(session, now))
    errors = {device.id: float(len(device.xid_errors)) for device in devices if device.kind == "cuda"}
    return [
        *metrics,
        Gauge("trainyard_devices", "Devices of this host.", len(devices)),
        Gauge("trainyard_devices_leased", "Devices leased to attempts.", leased),
        _labelled("device", "trainyard_device_xid_errors", "XID errors that keep a GPU from being leased.", errors),
        Gauge("trainyard_streams", "Open streams of this service.", state.broadcaster.readers),
    ]


def _jobs(session: Session, now: datetime) -> Iterator[Metric]:
    counted = {row[0]: row[1] for row in session.execute(select(JobRow.status, func.count()).group_by(JobRow.status))}
    by_status = {status.value: counted.get(status.value, 0) for status in JobStatus}
    yield _labelled("status", "trainyard_jobs", "Jobs by status.", by_status)
    yield Gauge("trainyard_queue_length", "Jobs that wait for devices.", by_status[JobStatus.QUEUED.value])
    oldest = session.scalar(select(func.min(JobRow.queued_at)).where(JobRow.status == JobStatus.QUEUED))
    seconds = (now - oldest).total_seconds() if oldest is not None else 0.0
    yield Gauge("trainyard_queue_oldest_seconds", "Waiting time of the oldest queued job.", seconds)


def _attempts(session: Session, now: datetime) -> Iterator[Metric]:
    outcomes = session.execute(
        select(AttemptRow.outcome, func.count()).where(AttemptRow.ended_at.is_not(None)).group_by(AttemptRow.outcome)
    ).all()
    live, oldest_report = session.execute(
        select(func.count(), func.min(AttemptRow.heard_at)).where(AttemptRow.ended_at.is_(None))
    ).one()
    by_outcome = {str(outcome): number for outcome, number in outcomes}
    silence = (now - oldest_report).total_seconds() if oldest_report is not None else 0.0
    # A gauge and not a counter: deleting a job deletes its attempts.
    yield _labelled("outcome", "trainyard_attempts_ended", "Attempts that have ended, by outcome.", by_outcome)
    yield Gauge("trainyard_attempts_live", "Attempts that have not ended.", live)
    yield Gauge("trainyard_report_age_seconds", "Longest time since the last report of a live attempt.", silence)


def _running(session: Session) -> Metric:
    rows = session.execute(select(JobRow.id, JobRow.progress).where(JobRow.status == JobStatus.RUNNING)).all()
    tokens = {job_id: float(progress.get("tokens") or 0) for job_id, progress in rows}
    return _labelled("job", "trainyard_job_tokens_total", "Training tokens of a running job.", tokens, Counter)


def _scheduler(state: AppState) -> Iterator[Metric]:
    leads = state.scheduler.leads
    yield Gauge("trainyard_scheduler_leads", "Whether this service schedules.", float(leads))
    silence = state.scheduler.seconds_since_round if leads else None  # None: the metric has no sample.
    yield Gauge("trainyard_scheduler_silence_seconds", "Time since it finished a round, if it schedules.", silence)


def _disks(state: AppState) -> Iterator[Metric]:
    disks = state.disks.readings()
    known = [disk for disk in disks if disk.state is not DiskState.UNREADABLE]
    free = {disk.name: disk.usage.free for disk in known}
    size = {disk.name: disk.usage.total for disk in known}
    low = {disk.name: disk.state is not DiskState.OK for disk in disks}
    yield _labelled("disk", "trainyard_disk_free_bytes", "Free bytes of a disk that the service writes to.", free)
    yield _labelled("disk", "trainyard_disk_size_bytes", "Size of a disk that the service writes to.", size)
    yield _labelled("disk", "trainyard_disk_low", "Whether the disk is low, full or does not answer.", low)
