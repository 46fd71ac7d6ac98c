"""Read the rows that make up a job's response, in one transaction.

The statements are built once, because building one costs several times as much as running it. They return plain rows,
not ORM objects: do not modify them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from sqlalchemy import ColumnElement, Connection, Row, ScalarSelect, Select, and_, bindparam, func, or_, select
from sqlalchemy.orm import Session

from trainyard.contract.status import Desired, JobStatus, Reason
from trainyard.service.auth.principal import LOCAL
from trainyard.service.db.models import AttemptRow, CheckpointRow, EventRow, JobRow
from trainyard.service.errors import JobNotFound
from trainyard.service.ids import JOB_ID
from trainyard.service.jobs.lifecycle import JobState

ATTEMPTS, CHECKPOINTS, JOBS = AttemptRow.__table__, CheckpointRow.__table__, JobRow.__table__
EVENTS = EventRow.__table__

NEWEST_ATTEMPT = and_(ATTEMPTS.c.job_id == JOBS.c.id, ATTEMPTS.c.number == JOBS.c.attempt)
JOBS_WITH_PLACEMENT: Select[Any] = select(*JOBS.c, ATTEMPTS.c.placement).select_from(
    JOBS.outerjoin(ATTEMPTS, NEWEST_ATTEMPT)
)
"""Jobs, each with the placement of its newest attempt on a cluster."""

JOB_BY_ID = JOBS_WITH_PLACEMENT.where(JOBS.c.id == bindparam("job_id"))

SPEC_BY_ID = select(JOBS.c.spec).where(JOBS.c.id == bindparam("job_id"))
NUMBER_BY_ID = select(JOBS.c.number).where(JOBS.c.id == bindparam("job_id"))

CURVE_OF_JOB = select(
    JOBS.c.number, JOBS.c.status, JOBS.c.attempt, JOBS.c.sealed_step, JOBS.c.spec, JOBS.c.facts
).where(JOBS.c.id == bindparam("job_id"))
REPORTED_OF_JOB = (
    select(ATTEMPTS.c.number, ATTEMPTS.c.acked_seq, ATTEMPTS.c.start_step)
    .where(ATTEMPTS.c.job_id == bindparam("job_id"))
    .order_by(ATTEMPTS.c.number)
)
"""With `CURVE_OF_JOB`, what changes with each change of a live job's curve: every point comes in a numbered line."""

EVENTS_OF_JOB = select(func.max(EVENTS.c.number), func.count()).where(EVENTS.c.job_id == bindparam("job_id"))
"""What changes with each event that is added to a job, or removed: events are never changed."""

NEWEST_ATTEMPT_OF_JOB = select(JOBS.c.attempt).where(JOBS.c.id == bindparam("job_id"))

FULL_CHECKPOINTS = (
    select(*CHECKPOINTS.c)
    .where(CHECKPOINTS.c.job_id.in_(bindparam("ids", expanding=True)), CHECKPOINTS.c.kind == "full")
    .order_by(CHECKPOINTS.c.step.desc(), CHECKPOINTS.c.number.desc())
)

QUEUED = JOBS.c.status == JobStatus.QUEUED

_SAME_PRIORITY = JOBS.c.priority == bindparam("priority")


def _count_queued(*which: ColumnElement[bool]) -> ScalarSelect[int]:
    return select(func.count()).select_from(JOBS).where(QUEUED, *which).scalar_subquery()


# Three index ranges instead of one condition with OR, which would test every queued job at each submission.
COUNT_AHEAD = select(
    _count_queued(JOBS.c.priority > bindparam("priority"))
    + _count_queued(_SAME_PRIORITY, JOBS.c.queued_at < bindparam("queued_at"))
    + _count_queued(_SAME_PRIORITY, JOBS.c.queued_at == bindparam("queued_at"), JOBS.c.number < bindparam("number"))
)

_POSITION = func.row_number().over(order_by=(JOBS.c.priority.desc(), JOBS.c.queued_at, JOBS.c.number)).label("position")
_QUEUE = select(JOBS.c.id, _POSITION).where(QUEUED).subquery()
QUEUE_POSITIONS = select(_QUEUE.c.id, _QUEUE.c.position).where(_QUEUE.c.id.in_(bindparam("ids", expanding=True)))


@dataclass(frozen=True)
class JobRows:
    """Rows read in one transaction, to be converted after it. ``checkpoints``: full ones, newest first."""

    jobs: Sequence[JobRow]
    checkpoints: Mapping[str, Sequence[CheckpointRow]]
    positions: Mapping[str, int]
    placements: Mapping[str, dict[str, Any]] = field(default_factory=dict)


def require_job(connection: Connection, job_id: str) -> None:
    """Raise JobNotFound if there is no such job, also for text that is no job id."""
    if not JOB_ID.fullmatch(job_id) or connection.scalar(NUMBER_BY_ID, {"job_id": job_id}) is None:
        raise JobNotFound()


def spec_of(connection: Connection, job_id: str) -> dict[str, Any]:
    """Return the job's spec as it is stored. Raises JobNotFound."""
    row = connection.execute(SPEC_BY_ID, {"job_id": job_id}).first() if JOB_ID.fullmatch(job_id) else None
    if row is None:
        raise JobNotFound()
    spec: dict[str, Any] = row.spec
    return spec


def newest_attempt(connection: Connection, job_id: str) -> int:
    """Return the number of the job's newest attempt; 0: it was never started. Raises JobNotFound."""
    number = connection.scalar(NEWEST_ATTEMPT_OF_JOB, {"job_id": job_id}) if JOB_ID.fullmatch(job_id) else None
    if number is None:
        raise JobNotFound()
    return int(number)


def owner_of(connection: Connection, job_id: str) -> str:
    """Return the owner of the job: the name of the token that submitted it, or ``local``. Raises JobNotFound."""
    query = select(JobRow.submitted_by).where(JobRow.id == job_id)
    row = connection.execute(query).first() if JOB_ID.fullmatch(job_id) else None
    if row is None:
        raise JobNotFound()
    return row.submitted_by or LOCAL.name


def owned_by(owner: str) -> ColumnElement[bool]:
    """Return the condition that the job has this owner, as `owner_of` defines it."""
    submitted = JobRow.submitted_by == owner
    return or_(submitted, JobRow.submitted_by.is_(None)) if owner == LOCAL.name else submitted


def job_rows(connection: Connection, job_id: str) -> JobRows:
    """Return the rows of one job. Raises JobNotFound, also for text that is no job id."""
    row = connection.execute(JOB_BY_ID, {"job_id": job_id}).first() if JOB_ID.fullmatch(job_id) else None
    if row is None:
        raise JobNotFound()
    return load_related(connection, [row])


def load_related(connection: Connection, rows: Sequence[Row[Any]]) -> JobRows:
    """Return the rows of the jobs in ``rows``, which come from `JOBS_WITH_PLACEMENT`."""
    # Plain rows have all columns of a JobRow at a tenth of its cost: the session does not track them.
    jobs = cast(Sequence[JobRow], rows)
    placements = {row.id: row.placement for row in rows if row.placement is not None}
    return JobRows(jobs, _checkpoints(connection, jobs), _positions(connection, jobs), placements)


def _checkpoints(connection: Connection, jobs: Sequence[JobRow]) -> dict[str, list[CheckpointRow]]:
    ids = [job.id for job in jobs if job.attempt]
    by_job: dict[str, list[CheckpointRow]] = {}
    for row in connection.execute(FULL_CHECKPOINTS, {"ids": ids}) if ids else ():
        by_job.setdefault(row.job_id, []).append(cast(CheckpointRow, row))
    return by_job


def _positions(connection: Connection, jobs: Sequence[JobRow]) -> dict[str, int]:
    """Return the queue position of each queued job; 1 is next."""
    queued = [job for job in jobs if job.status == JobStatus.QUEUED]
    if not queued:
        return {}
    if len(queued) > 1:
        rows = connection.execute(QUEUE_POSITIONS, {"ids": [job.id for job in queued]})
        return {row.id: row.position for row in rows}
    job = queued[0]
    key = {"priority": job.priority, "queued_at": job.queued_at, "number": job.number}
    return {job.id: (connection.scalar(COUNT_AHEAD, key) or 0) + 1}


def job_state(job: JobRow) -> JobState:
    """Return the job's state as `lifecycle.decide` needs it."""
    return JobState(
        JobStatus(job.status),
        Desired(job.desired),
        job.restart_at is not None,
        job.attempt,
        job.preempted_by is not None,
        at_limit=job.reason == Reason.LIMIT,
    )


def train_seconds(job: JobRow) -> float:
    """Return the active training time of all attempts at the last report, see `RunDir.train_seconds`."""
    return float(job.progress.get("train_seconds") or 0.0)


def newest_step(session: Session, job_id: str) -> int | None:
    """Return the step of the newest full checkpoint that was reported, or None. Does not read the disk."""
    full = (CheckpointRow.job_id == job_id, CheckpointRow.kind == "full")
    return session.scalar(select(CheckpointRow.step).where(*full).order_by(CheckpointRow.step.desc()).limit(1))
