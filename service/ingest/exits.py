"""The end of an attempt: its row, its leases and its job, in one transaction."""

from datetime import datetime, timedelta

from sqlalchemy import delete, select
from sqlalchemy.orm import Session

from trainyard.contract.messages import ExitReport
from trainyard.contract.status import (
    LIVE,
    TERMINAL,
    Desired,
    JobStatus,
    Reason,
    can_transition,
)
from trainyard.service.db.models import (
    AttemptRow,
    DeviceLeaseRow,
    JobRow,
    MetricRow,
)
from trainyard.service.ingest.parsing import plain_report
from trainyard.service.jobs import repository, restart_policy
from trainyard.service.jobs.lifecycle import ExitDecision, after_exit
from trainyard.service.jobs.repository import EventDraft
from trainyard.service.metrics.progress import after_end
from trainyard.service.timing import Timing

NOT_LAUNCHED = "not_launched"
"""An attempt's outcome where the service ended between its decision and the launch."""

MAX_ATTEMPTS_READ = 10
"""So many attempts are looked back at; none of the rules asks for more."""


def close_attempt(
    session: Session, job: JobRow, attempt: AttemptRow, report: ExitReport, now: datetime, timing: Timing
) -> None:
    """Nothing of the attempt lives any more: close it, free its devices, and move the job on. Twice is once."""
    if attempt.ended_at is not None:
        return
    report = _with_peak_memory(session, attempt, plain_report(report))
    report = report.model_copy(update={"ended_at": _plausible_end(report.ended_at, attempt.created_at, now)})
    _close(session, attempt, report.outcome, now)
    attempt.ended_at = report.ended_at
    attempt.end_step = report.step
    attempt.reason = report.reason
    attempt.message = report.message
    attempt.error = report.error.model_dump(mode="json") if report.error else None
    attempt.ranks = [rank.model_dump(mode="json") for rank in report.ranks]
    if attempt.number == job.attempt and JobStatus(job.status) in LIVE:
        max_restarts = int(job.spec["resources"]["max_restarts"])
        past = _restart_history(session, job, attempt)
        ending = after_exit(JobStatus(job.status), report, past, max_restarts, job.preempted_by, timing)
        if ending.requeue:
            attempt.reason = ending.reason
        _transition_job(session, job, attempt, ending, report, now)


def _with_peak_memory(session: Session, attempt: AttemptRow, report: ExitReport) -> ExitReport:
    """The report's card with the most memory that any rank has told of, where the report does not know it better."""
    if report.error is None or report.error.peak_memory_bytes is not None:
        return report
    told = (MetricRow.job_id == attempt.job_id, MetricRow.attempt == attempt.number)
    newest = select(MetricRow.memory_bytes).where(*told).order_by(MetricRow.seq.desc()).limit(1)
    card = report.error.model_copy(update={"peak_memory_bytes": session.scalar(newest)})
    return report.model_copy(update={"error": card})


def _plausible_end(said: datetime, created_at: datetime, now: datetime) -> datetime:
    """The time that the agent says, as far as it can be: its host has a clock of its own, and old jobs are deleted."""
    return max(created_at, min(said, now))


def _restart_history(session: Session, job: JobRow, attempt: AttemptRow) -> restart_policy.RestartHistory:
    """What this attempt and those before it have come to."""
    earlier = (AttemptRow.job_id == job.id, AttemptRow.number < attempt.number, AttemptRow.outcome != NOT_LAUNCHED)
    newest_first = select(AttemptRow).where(*earlier).order_by(AttemptRow.number.desc()).limit(MAX_ATTEMPTS_READ)
    return restart_policy.restart_history(
        job.restarts, map(_to_ended_attempt, (attempt, *session.scalars(newest_first)))
    )


def _to_ended_attempt(row: AttemptRow) -> restart_policy.EndedAttempt:
    reason = Reason(row.reason) if row.reason else None
    why = restart_policy.fault(row.outcome or "", reason)
    return restart_policy.EndedAttempt(row.trigger, why, restart_policy.made_a_step(row.start_step, row.end_step))


def never_launched(session: Session, job: JobRow, attempt: AttemptRow, now: datetime) -> None:
    """The attempt was decided and never started: the job takes its place in the queue again, or stops as asked."""
    if attempt.ended_at is not None:
        return
    _close(session, attempt, NOT_LAUNCHED, now)
    attempt.message = "the service ended before the launch"
    if attempt.number != job.attempt:
        return
    match JobStatus(job.status):
        case JobStatus.STARTING:
            note = EventDraft("status", "the launch did not happen: queued again", "scheduler", attempt.number)
            repository.transition(session, job, JobStatus.QUEUED, note, now)
        case JobStatus.PAUSING:
            note = EventDraft("status", "paused before it was launched", "scheduler", attempt.number)
            repository.transition(session, job, JobStatus.PAUSED, note, now, reason=Reason.USER, message=note.message)
        case JobStatus.CANCELLING:
            note = EventDraft("status", "cancelled before it was launched", "scheduler", attempt.number)
            ended = {"reason": Reason.USER, "message": note.message, "finished_at": now}
            repository.transition(session, job, JobStatus.CANCELLED, note, now, **ended)


def _close(session: Session, attempt: AttemptRow, outcome: str, now: datetime) -> None:
    session.execute(delete(DeviceLeaseRow).where(DeviceLeaseRow.attempt_id == attempt.id))
    attempt.ended_at = now
    attempt.outcome = outcome
    if attempt.placement is not None:
        attempt.placement = {**attempt.placement, "state": "ended", "waiting_for": None}


def _transition_job(
    session: Session, job: JobRow, attempt: AttemptRow, ending: ExitDecision, report: ExitReport, now: datetime
) -> None:
    if not can_transition(JobStatus(job.status), ending.status):
        # The report is the first word of an attempt that ran while nobody listened.
        note = EventDraft("status", f"attempt {attempt.number} had been running", "agent", attempt.number)
        repository.transition(
            session, job, JobStatus.RUNNING, note, now, started_at=job.started_at or attempt.created_at
        )
    restart_at = now + timedelta(seconds=ending.restart_seconds) if ending.restart_seconds is not None else None
    changes = {
        "reason": ending.reason,
        "message": ending.message,
        "error": ending.error.model_dump(mode="json") if ending.error else None,
        "phase": None,
        "phase_detail": None,
        "restarts": ending.restarts,
        "restart_at": restart_at,
        "asked_at": None,
        "preempted_by": None,
        "finished_at": report.ended_at if ending.status in TERMINAL else None,
        "desired": Desired.RUN if restart_at is not None else job.desired,
    }
    job.progress = after_end(job.progress, report.step)
    repository.transition(
        session, job, ending.status, EventDraft("status", ending.message, "agent", attempt.number), now, **changes
    )
    if ending.requeue:
        note = EventDraft("status", "queued again: it goes on when devices are free", "scheduler", attempt.number)
        again = {"desired": Desired.RUN, "trigger": "preemption", "reason": ending.reason}
        repository.transition(session, job, JobStatus.QUEUED, note, now, **again)
