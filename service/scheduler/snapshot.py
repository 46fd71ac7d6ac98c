"""Everything that a scheduling round needs, read in one transaction."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import case, or_, select
from sqlalchemy.orm import Session

from trainyard.contract.status import WAITING, CorpusStatus, Desired, JobStatus
from trainyard.service.db.models import AttemptRow, CorpusRow, DeviceLeaseRow, JobRow
from trainyard.service.devices import xids
from trainyard.service.devices.inventory import Device
from trainyard.service.jobs.lifecycle import made_a_step
from trainyard.service.launch.base import LOCAL, AttemptRef
from trainyard.service.scheduler.preparations import OrderKey, Preparation, WaitingJob
from trainyard.service.timing import Timing

PREEMPTIBLE = JobRow.spec[("resources", "preemptible")].as_boolean()  # null in specs older than the field

LAUNCHER = JobRow.spec[("resources", "launcher")].as_string()  # null: this host


LEASES = select(DeviceLeaseRow.device, DeviceLeaseRow.job_id, DeviceLeaseRow.sidecar)

LIVE_ATTEMPTS = (
    select(
        AttemptRow.id,
        AttemptRow.job_id,
        AttemptRow.number,
        AttemptRow.launcher,
        AttemptRow.launched_at,
        AttemptRow.heard_at,
        AttemptRow.start_step,
        AttemptRow.devices,
        AttemptRow.created_at,
        AttemptRow.placement,
        JobRow.desired,
        JobRow.asked_at,
        JobRow.status,
        JobRow.priority,
        JobRow.progress,
        PREEMPTIBLE.label("preemptible"),
    )
    .join(JobRow, JobRow.id == AttemptRow.job_id)
    .where(AttemptRow.ended_at.is_(None))
    .order_by(AttemptRow.created_at)
)
"""Executed on the connection: the ORM would take most of the time of a round with thousands of attempts."""


@dataclass(frozen=True)
class QueuedJob:
    """A job that waits for devices.

    ``device`` is the spec's: auto, cpu, cuda or one such as cuda:1. ``launcher`` is the spec's; None means this host.
    ``corpus_id``: the corpus that it waits for; None if that is ready.
    """

    id: str
    name: str
    device: str
    ranks: int
    priority: int
    queued_at: datetime
    number: int
    launcher: str | None = None
    corpus_id: str | None = None


@dataclass(frozen=True)
class LiveAttempt:
    """An attempt that has not ended in the database.

    ``made_progress``: it has made a step itself. ``placement``: where its cluster runs it, if known.
    """

    id: str
    name: AttemptRef
    desired: Desired
    launched: bool
    stop_requested_at: datetime | None
    last_heartbeat_at: datetime | None
    inspected_at: datetime | None = None
    notified: Desired | None = None
    running: bool = False
    made_progress: bool = False
    preemptible: bool = True
    priority: int = 0
    devices: tuple[str, ...] = ()
    created_at: datetime | None = None
    placement: Mapping[str, Any] | None = None

    @property
    def placed(self) -> bool:
        """Whether its nodes are known. An attempt on a cluster waits in the cluster's queue before that."""
        return self.name.launcher == LOCAL or bool(self.placement and self.placement["nodes"])

    @property
    def tailed(self) -> bool:
        """Whether the service reads its run directory because its agent cannot report."""
        return bool(self.placement and self.placement.get("tailed"))


@dataclass(frozen=True)
class Snapshot:
    """``inspected_at`` and ``notified`` of live attempts come from this process's memory and are empty after a restart.

    ``leases``: device -> the job that has it. ``lent``: devices that side processes have until a job needs them.
    ``preempts``: jobs of lower priority are paused for one of higher priority.
    """

    queued: Sequence[QueuedJob] = ()
    live: Sequence[LiveAttempt] = ()
    restarts_due: Sequence[str] = ()
    leases: Mapping[str, str] = field(default_factory=dict)
    lent: frozenset[str] = frozenset()
    devices: Sequence[Device] = ()
    preempts: bool = False
    preparations: Sequence[Preparation] = ()
    waiting_jobs: Sequence[WaitingJob] = ()


@dataclass
class SchedulerMemory:
    """What this process has done already. Losing it costs an additional inspection, nothing else."""

    inspected_at: dict[str, datetime] = field(default_factory=dict)
    notified: dict[str, Desired] = field(default_factory=dict)

    def forget_ended(self, live: Sequence[LiveAttempt], preparations: Sequence[Preparation] = ()) -> None:
        ids = {*(attempt.id for attempt in live), *(preparation.id for preparation in preparations)}
        self.inspected_at = {k: v for k, v in self.inspected_at.items() if k in ids}
        self.notified = {k: v for k, v in self.notified.items() if k in ids}


def load_snapshot(
    session: Session,
    devices: Sequence[Device],
    memory: SchedulerMemory,
    now: datetime,
    preempts: bool = False,
    timing: Timing = Timing(),
) -> Snapshot:
    awaiting_restart = (JobRow.status == JobStatus.INTERRUPTED, JobRow.restart_at.is_not(None))
    restarts = session.execute(select(JobRow.id, JobRow.restart_at).where(*awaiting_restart)).all()
    waiting = _waiting_jobs(session)
    leases = session.connection().execute(LEASES).all()
    return Snapshot(
        queued=_queued(session),
        live=_live(session, memory),
        restarts_due=[row.id for row in restarts if timing.is_due(row.restart_at, now)],
        leases={device: job_id for device, job_id, _ in leases if job_id is not None},
        lent=frozenset(device for device, _, sidecar in leases if sidecar is not None),
        devices=xids.with_xid_errors(devices, xids.uncleared(session, now)),
        preempts=preempts,
        preparations=_preparations(session, memory, waiting),
        waiting_jobs=[job for job, _ in waiting],
    )


def _waiting_jobs(session: Session) -> list[tuple[WaitingJob, OrderKey]]:
    """Return the jobs with a corpus that are queued or preparing, and their places in the queue."""
    columns = (JobRow.id, JobRow.status, JobRow.corpus_id, CorpusRow.status.label("corpus_status"))
    order = (JobRow.priority, JobRow.queued_at, JobRow.number)
    rows = session.execute(
        select(*columns, *order)
        .outerjoin(CorpusRow, CorpusRow.id == JobRow.corpus_id)
        .where(JobRow.status.in_(sorted(WAITING)), JobRow.corpus_id.is_not(None))
    ).all()
    return [
        (
            WaitingJob(
                row.id,
                JobStatus(row.status),
                row.corpus_id,
                CorpusStatus(row.corpus_status) if row.corpus_status is not None else None,
            ),
            (-row.priority, row.queued_at, row.number),
        )
        for row in rows
    ]


def _preparations(
    session: Session, memory: SchedulerMemory, waiting: Sequence[tuple[WaitingJob, OrderKey]]
) -> list[Preparation]:
    orders: dict[str, OrderKey] = {}
    for job, order in waiting:
        if job.corpus_status is not CorpusStatus.READY:
            orders[job.corpus_id] = min(order, orders.get(job.corpus_id, order))
    alive = or_(CorpusRow.status == CorpusStatus.PREPARING, CorpusRow.requested.is_(True), CorpusRow.id.in_(orders))
    rows = session.scalars(select(CorpusRow).where(alive, CorpusRow.status != CorpusStatus.READY)).all()
    return [
        Preparation(
            id=row.id,
            name=AttemptRef(row.id, row.attempt, row.launcher),
            status=CorpusStatus(row.status),
            order=None if row.deleted else _earliest(row, orders.get(row.id)),
            launched=row.launched_at is not None,
            acked_seq=row.acked_seq,
            restart_at=row.restart_at,
            asked_at=row.asked_at,
            heard_at=row.heard_at,
            inspected_at=memory.inspected_at.get(row.id),
            stall=timedelta(seconds=row.spec["resources"]["timeouts"]["preparing"]),
        )
        for row in rows
    ]


def _earliest(row: CorpusRow, order: OrderKey | None) -> OrderKey | None:
    requested = (0, row.queued_at, 0) if row.requested else None
    return min((each for each in (requested, order) if each is not None), default=None)


def _queued(session: Session) -> list[QueuedJob]:
    unready = case((CorpusRow.status != CorpusStatus.READY, CorpusRow.id))
    columns = (JobRow.id, JobRow.name, JobRow.device, JobRow.ranks, JobRow.priority, JobRow.queued_at, JobRow.number)
    query = select(*columns, LAUNCHER, unready).outerjoin(CorpusRow, CorpusRow.id == JobRow.corpus_id)
    rows = session.execute(query.where(JobRow.status == JobStatus.QUEUED)).all()
    return [QueuedJob(*row) for row in rows]


def _live(session: Session, memory: SchedulerMemory) -> list[LiveAttempt]:
    rows = session.connection().execute(LIVE_ATTEMPTS).all()
    return [
        LiveAttempt(
            id=row.id,
            name=AttemptRef(row.job_id, row.number, row.launcher),
            desired=Desired(row.desired),
            launched=row.launched_at is not None,
            stop_requested_at=row.asked_at,
            last_heartbeat_at=max(filter(None, (row.heard_at, row.launched_at)), default=None),
            inspected_at=memory.inspected_at.get(row.id),
            notified=memory.notified.get(row.id),
            running=row.status == JobStatus.RUNNING,
            made_progress=made_a_step(row.start_step, row.progress.get("step")),
            preemptible=row.preemptible is not False,
            priority=row.priority,
            devices=tuple(row.devices),
            created_at=row.created_at,
            placement=row.placement,
        )
        for row in rows
    ]
