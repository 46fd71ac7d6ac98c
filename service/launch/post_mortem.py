"""Exit reports for attempts whose agent left none, from rank 0's outcome.json or from what is known."""

from datetime import UTC, datetime

from trainyard.contract.messages import ErrorCard, ExitReport, Outcome, read_message
from trainyard.contract.outbox import OutboxReader
from trainyard.contract.rundir import AttemptDir
from trainyard.contract.status import Reason

LOG_TAIL_BYTES = 4096


def report_from_outcome(attempt: AttemptDir) -> ExitReport | None:
    """Return the report that rank 0's outcome.json amounts to, or None if there is none."""
    outcome = read_message(Outcome, attempt.outcome)
    if outcome is None:
        return None
    return ExitReport(
        outcome=outcome.outcome,
        step=outcome.step,
        reason=outcome.reason,
        message=outcome.message or f"{outcome.outcome} at step {outcome.step}",
        error=outcome.error,
        last_seq=count_lines(attempt),
        ended_at=last_activity(attempt),
    )


def lost_report(attempt: AttemptDir, reason: Reason, message: str) -> ExitReport:
    """Return the report of an attempt that had started and left no outcome."""
    return crash_report(attempt, ErrorCard(code=reason, message=message), count_lines(attempt), last_activity(attempt))


def not_started_report(attempt: AttemptDir) -> ExitReport:
    """Return the report of an agent that ended before it wrote its start file; its log says why."""
    log_tail = attempt.agent_log.read_bytes()[-LOG_TAIL_BYTES:].decode(errors="replace")
    last_line = next(iter(reversed(log_tail.strip().splitlines())), "it said nothing")
    message = f"the attempt's agent ended before it began: {last_line[:500]}"
    card = ErrorCard(code=Reason.LAUNCH_FAILED, message=message, traceback=log_tail or None)
    return crash_report(attempt, card, 0, datetime.fromtimestamp(attempt.agent_log.stat().st_mtime, UTC))


def crash_report(attempt: AttemptDir, card: ErrorCard, lines: int, ended_at: datetime) -> ExitReport:
    """Return the report of a crash that ``card`` describes."""
    return ExitReport(
        outcome="crashed",
        step=attempt.read_step() or 0,
        reason=Reason(card.code),
        message=card.message,
        error=card,
        last_seq=lines,
        ended_at=ended_at,
    )


def count_lines(attempt: AttemptDir) -> int:
    """Return the number of complete lines in the outbox."""
    return OutboxReader(attempt.outbox).skip_to_end()


def last_activity(attempt: AttemptDir) -> datetime:
    """Return the time of the attempt's last write."""
    files = [attempt.outcome, attempt.outbox, attempt.progress, attempt.started, attempt.spec]
    times = [file.stat().st_mtime for file in files if file.exists()]
    return datetime.fromtimestamp(max(times), UTC) if times else datetime.now(UTC)
