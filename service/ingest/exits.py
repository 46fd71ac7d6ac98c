"""Record the end of an attempt: its row, its device leases and its job change in one transaction."""

from datetime import datetime, timedelta

from sqlalchemy import delete, select
from sqlalchemy.orm import Session

from trainyard.contract.messages import ExitReport
from trainyard.contract.status import LIVE, TERMINAL, Desired, JobStatus, Reason, can_transition
from trainyard.service.db.models import AttemptRow, DeviceLeaseRow, JobRow, MetricRow
from trainyard.service.ingest.parsing import plain_report
from trainyard.service.jobs import lifecycle, repository
from trainyard.service.jobs.lifecycle import ExitDecision, after_exit
from trainyard.service.jobs.repository import EventDraft
from trainyard.service.launch.base import LOCAL
from trainyard.service.metrics.progress import after_end
from trainyard.service.timing import Timing

NOT_LAUNCHED = "not_launched"
"""Outcome of an attempt that the service recorded but did not launch, because it ended in between."""

MAX_ATTEMPTS_READ = 10
"""Enough for every rule of `lifecycle.restart_history`."""


def close_attempt(
    session: Session,
    job: JobRow,
    attempt: AttemptRow,
    report: ExitReport,
    now: datetime,
    timing: Timing,
    service_stops: bool = False,
) -> None:
    """Close an attempt whose processes are gone: free its devices and move the job to its next status. Idempotent.

    ``service_stops``: attempts of this host end because the service does, see `lifecycle.after_exit`.
    """
    if attempt.ended_at is not None:
        return
    report = _with_peak_memory(session, attempt, plain_report(report))
    # The agent's clock may be wrong, and retention deletes by this time.
    ended_at = max(attempt.created_at, min(report.ended_at, now))
    report = report.model_copy(update={"ended_at": ended_at})
    _close(session, attempt, report.outcome, now)
    attempt.ended_at = report.ended_at
    attempt.end_step = report.step
    attempt.reason = report.reason
    attempt.message = report.message
    attempt.error = report.error.model_dump(mode="json") if report.error else None
    attempt.ranks = [rank.model_dump(mode="json") for rank in report.ranks]
    if attempt.number == job.attempt and JobStatus(job.status) in LIVE:
        max_restarts = int(job.spec["resources"]["max_restarts"])
        history = _restart_history(session, job, attempt)
        service_stops = service_stops and attempt.launcher == LOCAL
        decision = after_exit(
            JobStatus(job.status), report, history, max_restarts, job.preempted_by, timing, service_stops
        )
        if decision.requeue:
            attempt.reason = decision.reason
        _transition_job(session, job, attempt, decision, report, now)


def _with_peak_memory(session: Session, attempt: AttemptRow, report: ExitReport) -> ExitReport:
    # If the failed rank could not report its peak memory, take that of the last metric.
    if report.error is None or report.error.peak_memory_bytes is not None:
        return report
    own = (MetricRow.job_id == attempt.job_id, MetricRow.attempt == attempt.number)
    newest = select(MetricRow.memory_bytes).where(*own).order_by(MetricRow.seq.desc()).limit(1)
    card = report.error.model_copy(update={"peak_memory_bytes": session.scalar(newest)})
    return report.model_copy(update={"error": card})


def _restart_history(session: Session, job: JobRow, attempt: AttemptRow) -> lifecycle.RestartHistory:
    earlier = (AttemptRow.job_id == job.id, AttemptRow.number < attempt.number, AttemptRow.outcome != NOT_LAUNCHED)
    newest_first = select(AttemptRow).where(*earlier).order_by(AttemptRow.number.desc()).limit(MAX_ATTEMPTS_READ)
    return lifecycle.restart_history(job.restarts, map(_to_ended_attempt, (attempt, *session.scalars(newest_first))))


def _to_ended_attempt(row: AttemptRow) -> lifecycle.EndedAttempt:
    reason = Reason(row.reason) if row.reason else None
    why = lifecycle.fault(row.outcome or "", reason)
    return lifecycle.EndedAttempt(row.trigger, why, lifecycle.made_a_step(row.start_step, row.end_step))


def never_launched(session: Session, job: JobRow, attempt: AttemptRow, now: datetime) -> None:
    """Close an attempt that was recorded but not launched: queue the job again, or stop it as requested."""
    if attempt.ended_at is not None:
        return
    _close(session, attempt, NOT_LAUNCHED, now)
    attempt.message = "the service ended, or stopped leading, before the launch"
    if attempt.number != job.attempt:
        return
    match JobStatus(job.status):
        case JobStatus.STARTING:
            draft = EventDraft("status", "the launch did not happen: queued again", "scheduler", attempt.number)
            repository.transition(session, job, JobStatus.QUEUED, draft, now)
        case JobStatus.PAUSING:
            draft = EventDraft("status", "paused before it was launched", "scheduler", attempt.number)
            repository.transition(session, job, JobStatus.PAUSED, draft, now, reason=Reason.USER, message=draft.message)
        case JobStatus.CANCELLING:
            draft = EventDraft("status", "cancelled before it was launched", "scheduler", attempt.number)
            ended = {"reason": Reason.USER, "message": draft.message, "finished_at": now}
            repository.transition(session, job, JobStatus.CANCELLED, draft, now, **ended)


def _close(session: Session, attempt: AttemptRow, outcome: str, now: datetime) -> None:
    session.execute(delete(DeviceLeaseRow).where(DeviceLeaseRow.attempt_id == attempt.id))
    attempt.ended_at = now
    attempt.outcome = outcome
    if attempt.placement is not None:
        attempt.placement = {**attempt.placement, "state": "ended", "waiting_for": None}


def _transition_job(
    session: Session, job: JobRow, attempt: AttemptRow, decision: ExitDecision, report: ExitReport, now: datetime
) -> None:
    if not can_transition(JobStatus(job.status), decision.status):
        # The exit is this attempt's first report: it ran while no service was reachable.
        draft = EventDraft("status", f"attempt {attempt.number} had been running", "agent", attempt.number)
        repository.transition(
            session, job, JobStatus.RUNNING, draft, now, started_at=job.started_at or attempt.created_at
        )
    restart_at = now + timedelta(seconds=decision.restart_seconds) if decision.restart_seconds is not None else None
    changes = {
        "reason": decision.reason,
        "message": decision.message,
        "error": decision.error.model_dump(mode="json") if decision.error else None,
        "phase": None,
        "phase_detail": None,
        "restarts": decision.restarts,
        "restart_at": restart_at,
        "asked_at": None,
        "preempted_by": None,
        "finished_at": report.ended_at if decision.status in TERMINAL else None,
        "desired": Desired.RUN if restart_at is not None else job.desired,
    }
    job.progress = after_end(job.progress, report.step, report.train_seconds)
    repository.transition(
        session, job, decision.status, EventDraft("status", decision.message, "agent", attempt.number), now, **changes
    )
    if decision.requeue:
        trigger, when = ("restart", "a service starts")
        if decision.reason is Reason.PREEMPTED:
            trigger, when = ("preemption", "devices are free")
        draft = EventDraft("status", f"queued again: it resumes when {when}", "scheduler", attempt.number)
        again = {"desired": Desired.RUN, "trigger": trigger, "reason": decision.reason}
        repository.transition(session, job, JobStatus.QUEUED, draft, now, **again)
