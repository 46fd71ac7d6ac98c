"""What follows after the process that prepares a corpus has ended, and its progress. Pure."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from trainyard.contract.events import Event, PhaseChanged
from trainyard.contract.messages import ErrorCard, ExitReport
from trainyard.contract.status import RESTARTABLE, UNCOUNTED_REASONS, CorpusStatus, Reason
from trainyard.service.jobs.lifecycle import fault
from trainyard.service.timing import Timing

RATE_SECONDS = 10.0
"""Time constant of the moving average of the speed."""


@dataclass(frozen=True)
class PreparationEnd:
    """The next state of a corpus. ``restart_seconds``: how long its next attempt waits; None if there is none."""

    status: CorpusStatus
    reason: Reason | None
    message: str
    error: ErrorCard | None = None
    restart_seconds: float | None = None
    restarts: int = 0
    fruitless: int = 0


def after_preparation(
    report: ExitReport,
    *,
    wanted: bool,
    restarts: int,
    fruitless: int,
    made_progress: bool,
    max_restarts: int,
    timing: Timing = Timing(),
) -> PreparationEnd:
    """Return the state of a corpus after an attempt to prepare it.

    Args:
        report: how the attempt ended.
        wanted: a job or a request still waits for it.
        restarts: attempts after a crash so far.
        fruitless: consecutive attempts before this one that made no progress.
        made_progress: this one did. Its work is kept, so the next attempt may start at once.
        max_restarts: attempts without progress after which the preparation fails.
        timing: delays before a restart.
    """
    if report.outcome == "completed":
        return PreparationEnd(CorpusStatus.READY, None, report.message)
    if not wanted:
        return PreparationEnd(CorpusStatus.STOPPED, Reason.USER, "no job waits for it; the finished part is kept")
    if report.outcome == "stopped" and report.reason is Reason.USER:
        # It was asked to stop, by the service that ends or because no job waited for it, and now one does.
        return PreparationEnd(CorpusStatus.QUEUED, None, report.message, restart_seconds=0.0, restarts=restarts)
    reason = fault(report.outcome, report.reason)
    error = report.error or ErrorCard(code=reason, message=report.message)
    if reason not in RESTARTABLE:
        return PreparationEnd(CorpusStatus.FAILED, reason, report.message, error)
    counted = reason not in UNCOUNTED_REASONS
    fruitless = 0 if made_progress else fruitless + counted
    if fruitless > max_restarts:
        why = Reason.MAX_RESTARTS if max_restarts else reason
        tries = f"; {fruitless} attempts in a row made no progress" if fruitless > 1 else ""
        return PreparationEnd(CorpusStatus.FAILED, why, f"{report.message}{tries}", error)
    waits = timing.backoff_seconds
    seconds = 0.0 if made_progress else waits[min(max(0, fruitless - 1), len(waits) - 1)]
    return PreparationEnd(
        CorpusStatus.QUEUED, reason, report.message, error, seconds, restarts=restarts + 1, fruitless=fruitless
    )


def at_start(progress: Mapping[str, Any]) -> dict[str, Any]:
    """Return the progress at the start of an attempt. ``best``: the most bytes that any attempt before has done."""
    return {"best": max(progress.get("best") or 0, progress.get("done") or 0)}


def after_events(progress: Mapping[str, Any], events: Iterable[Event]) -> dict[str, Any]:
    """Return the progress after these lines of the outbox: bytes ``done`` of ``total``, and the speed."""
    for event in events:
        if isinstance(event, PhaseChanged) and event.done is not None:
            progress = _after_phase(progress, event, event.done)
    return dict(progress)


def _after_phase(progress: Mapping[str, Any], event: PhaseChanged, done: int) -> dict[str, Any]:
    after = {**progress, "done": done, "total": event.total, "at": event.at.isoformat(), "message": event.message}
    before, at = progress.get("done"), progress.get("at")
    if before is None or at is None or done <= before:
        # The first bytes of an attempt may be those that an earlier one has done.
        return after
    seconds = (event.at - datetime.fromisoformat(at)).total_seconds()
    if seconds > 0:
        rate, known = (done - before) / seconds, progress.get("bytes_per_second")
        share = min(1.0, seconds / RATE_SECONDS) if known is not None else 1.0
        after["bytes_per_second"] = rate * share + (known or 0.0) * (1.0 - share)
    return after


def made_progress(progress: Mapping[str, Any]) -> bool:
    """Return whether the attempt has done more bytes than those before."""
    return (progress.get("done") or 0) > (progress.get("best") or 0)


def eta_seconds(progress: Mapping[str, Any]) -> float | None:
    """Return the seconds until all bytes are done, or None if unknown."""
    done, total, rate = (progress.get(name) for name in ("done", "total", "bytes_per_second"))
    return max(0.0, (total - done) / rate) if done is not None and total and rate else None


def phase_detail(progress: Mapping[str, Any], message: str | None = None) -> dict[str, Any]:
    """Return the progress as a job's ``phase_detail``."""
    return {
        "message": message,
        "done": progress.get("done"),
        "total": progress.get("total"),
        "bytes_per_second": progress.get("bytes_per_second"),
        "eta_seconds": eta_seconds(progress),
    }
