"""What is said of an attempt whose agent left no report: rank 0's own word where there is one, else what is known."""

from datetime import UTC, datetime

from trainyard.contract.messages import (
    ErrorCard,
    ExitReport,
    Outcome,
    read_message,
)
from trainyard.contract.outbox import OutboxReader
from trainyard.contract.rundir import AttemptDir
from trainyard.contract.status import Reason

LOG_TAIL_BYTES = 4096


def report_from_outcome(attempt: AttemptDir) -> ExitReport | None:
    """The report that rank 0's outcome.json amounts to; None where it left none."""
    said = read_message(Outcome, attempt.outcome)
    if said is None:
        return None
    return ExitReport(
        outcome=said.outcome,
        step=said.step,
        reason=said.reason,
        message=said.message or f"{said.outcome} at step {said.step}",
        error=said.error,
        last_seq=tail_lines(attempt),
        ended_at=last_activity(attempt),
    )


def lost_report(attempt: AttemptDir, reason: Reason, message: str) -> ExitReport:
    """It had begun, and nothing was said at its end."""
    return crash_report(attempt, ErrorCard(code=reason, message=message), tail_lines(attempt), last_activity(attempt))


def not_started_report(attempt: AttemptDir) -> ExitReport:
    """Its agent was started and ended before it could leave its name: the host cannot run it, and why is in its log."""
    tail = attempt.agent_log.read_bytes()[-LOG_TAIL_BYTES:].decode(errors="replace")
    last = next(iter(reversed(tail.strip().splitlines())), "it said nothing")
    message = f"the attempt's agent ended before it began: {last[:500]}"
    card = ErrorCard(code=Reason.LAUNCH_FAILED, message=message, traceback=tail or None)
    return crash_report(attempt, card, 0, datetime.fromtimestamp(attempt.agent_log.stat().st_mtime, UTC))


def crash_report(attempt: AttemptDir, card: ErrorCard, lines: int, ended_at: datetime) -> ExitReport:
    """The report of a crash that ``card`` describes."""
    return ExitReport(
        outcome="crashed",
        step=attempt.read_step() or 0,
        reason=Reason(card.code),
        message=card.message,
        error=card,
        last_seq=lines,
        ended_at=ended_at,
    )


def tail_lines(attempt: AttemptDir) -> int:
    """Complete lines in its outbox."""
    return OutboxReader(attempt.outbox).skip_to_end()


def last_activity(attempt: AttemptDir) -> datetime:
    """When the attempt last wrote anything."""
    files = [attempt.outcome, attempt.outbox, attempt.progress, attempt.started, attempt.spec]
    times = [file.stat().st_mtime for file in files if file.exists()]
    return datetime.fromtimestamp(max(times), UTC) if times else datetime.now(UTC)
