"""The rows that a job's shape is made of, read in one transaction.

The statements are built once: to build one anew costs several times what it takes to run. They give plain rows, which
nobody is to change.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from sqlalchemy import ColumnElement, Connection, Row, ScalarSelect, Select, and_, bindparam, func, select
from sqlalchemy.orm import Session

from trainyard.contract.status import Desired, JobStatus
from trainyard.service.db.models import AttemptRow, CheckpointRow, JobRow
from trainyard.service.errors import JobNotFound
from trainyard.service.ids import JOB_ID
from trainyard.service.jobs.lifecycle import JobState

ATTEMPTS, CHECKPOINTS, JOBS = AttemptRow.__table__, CheckpointRow.__table__, JobRow.__table__

NEWEST_ATTEMPT = and_(ATTEMPTS.c.job_id == JOBS.c.id, ATTEMPTS.c.number == JOBS.c.attempt)
JOBS_WITH_PLACEMENT: Select[Any] = select(*JOBS.c, ATTEMPTS.c.placement).select_from(
    JOBS.outerjoin(ATTEMPTS, NEWEST_ATTEMPT)
)
"""Jobs, each with where a cluster has put its newest attempt."""

JOB_BY_ID = JOBS_WITH_PLACEMENT.where(JOBS.c.id == bindparam("job_id"))

SPEC_BY_ID = select(JOBS.c.spec).where(JOBS.c.id == bindparam("job_id"))
NUMBER_BY_ID = select(JOBS.c.number).where(JOBS.c.id == bindparam("job_id"))

FULL_CHECKPOINTS = (
    select(*CHECKPOINTS.c)
    .where(CHECKPOINTS.c.job_id.in_(bindparam("ids", expanding=True)), CHECKPOINTS.c.kind == "full")
    .order_by(CHECKPOINTS.c.step.desc(), CHECKPOINTS.c.number.desc())
)

QUEUED = JOBS.c.status == JobStatus.QUEUED

_SAME_PRIORITY = JOBS.c.priority == bindparam("priority")


def _count_queued(*which: ColumnElement[bool]) -> ScalarSelect[int]:
    return select(func.count()).select_from(JOBS).where(QUEUED, *which).scalar_subquery()


# Three stretches of the index one behind the other, instead of a condition on each who waits: where the queue is long,
# who submits should not pay for all who did before.
COUNT_AHEAD = select(
    _count_queued(JOBS.c.priority > bindparam("priority"))
    + _count_queued(_SAME_PRIORITY, JOBS.c.queued_at < bindparam("queued_at"))
    + _count_queued(_SAME_PRIORITY, JOBS.c.queued_at == bindparam("queued_at"), JOBS.c.number < bindparam("number"))
)

_POSITION = func.row_number().over(order_by=(JOBS.c.priority.desc(), JOBS.c.queued_at, JOBS.c.number)).label("place")
_QUEUE = select(JOBS.c.id, _POSITION).where(QUEUED).subquery()
QUEUE_POSITIONS = select(_QUEUE.c.id, _QUEUE.c.place).where(_QUEUE.c.id.in_(bindparam("ids", expanding=True)))


@dataclass(frozen=True)
class JobRows:
    """Rows read in one transaction, to be shown after it. ``checkpoints``: full ones, newest first."""

    jobs: Sequence[JobRow]
    checkpoints: Mapping[str, Sequence[CheckpointRow]]
    positions: Mapping[str, int]
    placements: Mapping[str, dict[str, Any]] = field(default_factory=dict)


def require_job(connection: Connection, job_id: str) -> None:
    """Raise JobNotFound where there is no such job, also for what cannot be an id."""
    if not JOB_ID.fullmatch(job_id) or connection.scalar(NUMBER_BY_ID, {"job_id": job_id}) is None:
        raise JobNotFound()


def spec_of(connection: Connection, job_id: str) -> dict[str, Any]:
    """The job's spec as it is stored. Raises JobNotFound."""
    row = connection.execute(SPEC_BY_ID, {"job_id": job_id}).first() if JOB_ID.fullmatch(job_id) else None
    if row is None:
        raise JobNotFound()
    spec: dict[str, Any] = row.spec
    return spec


def job_rows(connection: Connection, job_id: str) -> JobRows:
    """What belongs to a job. Raises JobNotFound, also for what cannot be an id."""
    row = connection.execute(JOB_BY_ID, {"job_id": job_id}).first() if JOB_ID.fullmatch(job_id) else None
    if row is None:
        raise JobNotFound()
    return load_related(connection, [row])


def load_related(connection: Connection, rows: Sequence[Row[Any]]) -> JobRows:
    """What belongs to the jobs of these rows of `PLACED`."""
    # They have all that a JobRow has, and cost a tenth of it: nothing watches them for changes.
    jobs = cast(Sequence[JobRow], rows)
    placements = {row.id: row.placement for row in rows if row.placement is not None}
    return JobRows(jobs, _checkpoints(connection, jobs), _positions(connection, jobs), placements)


def _checkpoints(connection: Connection, jobs: Sequence[JobRow]) -> dict[str, list[CheckpointRow]]:
    begun = [job.id for job in jobs if job.attempt]
    found: dict[str, list[CheckpointRow]] = {}
    for row in connection.execute(FULL_CHECKPOINTS, {"ids": begun}) if begun else ():
        found.setdefault(row.job_id, []).append(cast(CheckpointRow, row))
    return found


def _positions(connection: Connection, jobs: Sequence[JobRow]) -> dict[str, int]:
    """The place in the queue of each of ``jobs`` that is queued; 1 is next."""
    queued = [job for job in jobs if job.status == JobStatus.QUEUED]
    if not queued:
        return {}
    if len(queued) > 1:
        rows = connection.execute(QUEUE_POSITIONS, {"ids": [job.id for job in queued]})
        return {row.id: row.place for row in rows}
    job = queued[0]
    place = {"priority": job.priority, "queued_at": job.queued_at, "number": job.number}
    return {job.id: (connection.scalar(COUNT_AHEAD, place) or 0) + 1}


def job_state(job: JobRow) -> JobState:
    """Return the job as the rules see it."""
    return JobState(
        JobStatus(job.status),
        Desired(job.desired),
        job.restart_at is not None,
        job.attempt,
        job.preempted_by is not None,
    )


def newest_step(session: Session, job_id: str) -> int | None:
    """Step of the newest full checkpoint that was reported; the disk is not read in a transaction."""
    full = (CheckpointRow.job_id == job_id, CheckpointRow.kind == "full")
    return session.scalar(select(CheckpointRow.step).where(*full).order_by(CheckpointRow.step.desc()).limit(1))
