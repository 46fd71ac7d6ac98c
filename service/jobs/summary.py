"""The summary of a job: one or two plain sentences for people. Pure."""

from dataclasses import dataclass
from datetime import datetime
from typing import assert_never

from trainyard.contract.messages import HEARTBEAT_SECONDS
from trainyard.contract.status import Desired, JobStatus, Phase, Reason
from trainyard.contract.units import human_bytes
from trainyard.service.schemas import Checkpoint, Progress, Queue

SILENT_SECONDS = 10.0

PHASE_TEXT = {
    Phase.LOADING: "Loading",
    Phase.PREPARING_DATA: "Preparing the data",
    Phase.COMPILING: "Compiling the model",
    Phase.TRAINING: "Training",
    Phase.EVALUATING: "Evaluating",
    Phase.SAVING: "Saving a checkpoint",
}


@dataclass(frozen=True)
class SummaryInput:
    """All that `summary` depends on."""

    status: JobStatus
    desired: Desired
    attempt: int
    message: str | None
    hint: str | None
    phase: Phase | None
    phase_detail: dict[str, object]
    progress: Progress
    checkpoint: Checkpoint | None
    queue: Queue | None
    heard_at: datetime | None
    reason: Reason | None = None
    parent_step: int | None = None


def summary(job: SummaryInput, now: datetime) -> str:
    """Return one or two plain sentences, the most important first."""
    match job.status:
        case JobStatus.QUEUED | JobStatus.STARTING:
            return _waiting(job)
        case JobStatus.PREPARING:
            return _preparing(job)
        case JobStatus.RUNNING:
            return _silence(job, now) or _running(job, now)
        case JobStatus.PAUSING:
            why = " to make room for a job of higher priority" if job.reason is Reason.PREEMPTED else ""
            return f"Saving and pausing{_at_step(job)}{why}."
        case JobStatus.CANCELLING:
            doing = "Ending without a save" if job.desired is Desired.KILL else "Saving and stopping"
            return f"{doing}{_at_step(job)}."
        case JobStatus.PAUSED:
            return f"Paused{_at_step(job)}; {_resume_point(job)}."
        case JobStatus.CANCELLED:
            return f"Cancelled{_at_step(job)}; {_resume_point(job)}."
        case JobStatus.SUCCEEDED:
            return f"Finished{_at_step(job)}{_loss(job)}."
        case JobStatus.INTERRUPTED | JobStatus.FAILED:
            return _trouble(job)
        case _:
            assert_never(job.status)


def _waiting(job: SummaryInput) -> str:
    if job.status is JobStatus.STARTING:
        waiting = f", waiting for {job.queue.waiting_for}" if job.queue is not None else ""
        return f"Starting attempt {job.attempt}{waiting}."
    assert job.queue is not None
    return f"{_preempted(job)}Waiting for {job.queue.waiting_for}. Position {job.queue.position}."


def _preempted(job: SummaryInput) -> str:
    if job.reason is not Reason.PREEMPTED:
        return ""
    return f"Paused{_at_step(job)} to make room for a job of higher priority; resumes automatically. "


def _running(job: SummaryInput, now: datetime) -> str:
    progress = job.progress
    if job.phase not in (None, Phase.TRAINING, Phase.SAVING, Phase.EVALUATING) or not (progress.step or progress.steps):
        return _phase(job)
    parts = [f"Step {progress.step:,}"]
    if progress.steps:
        parts = [f"Step {progress.step:,} of {progress.steps:,} ({progress.percent or 0:.0f} %)"]
    if job.phase is Phase.TRAINING and (message := job.phase_detail.get("message")):
        parts.append(str(message))  # of a slow first step: how many micro-batches are done
    if progress.eta_seconds is not None:
        parts.append(f"ETA {duration(progress.eta_seconds)}")
    if progress.tokens_per_second:
        parts.append(f"{_rate(progress.tokens_per_second)} tok/s")
    if progress.loss is not None:
        parts.append(f"loss {progress.loss:.3f}")
    elif progress.nonfinite:
        parts.append("loss not finite")
    if job.checkpoint is not None:
        ago = duration((now - job.checkpoint.created_at).total_seconds())
        parts.append(f"checkpoint {ago} ago at {job.checkpoint.step:,}")
    return ", ".join(parts) + "."


def _preparing(job: SummaryInput) -> str:
    detail = job.phase_detail
    done, total, rate, eta = (detail.get(name) for name in ("done", "total", "bytes_per_second", "eta_seconds"))
    text = "Preparing its corpus, without a device"
    if isinstance(done, int) and isinstance(total, int) and total > 0:
        text += f": {human_bytes(done)} of {human_bytes(total)} ({100 * done / total:.0f} %)"
        text += f", {human_bytes(int(rate))}/s" if isinstance(rate, float) else ""
        text += f", ETA {duration(eta)}" if isinstance(eta, float) else ""
    message = f" {str(detail['message'])[:1].upper()}{str(detail['message'])[1:]}." if detail.get("message") else ""
    return f"{text}.{message}"


def _phase(job: SummaryInput) -> str:
    doing = PHASE_TEXT.get(job.phase or Phase.LOADING, "Loading")
    done, total = job.phase_detail.get("done"), job.phase_detail.get("total")
    if isinstance(done, int) and isinstance(total, int) and total > 0:
        doing += f" ({100 * done / total:.0f} %)"
    message = job.phase_detail.get("message")
    return f"{doing}: {message}." if message else f"{doing}."


def _silence(job: SummaryInput, now: datetime) -> str | None:
    if job.heard_at is None:
        return None
    silent = (now - job.heard_at).total_seconds()
    if silent < SILENT_SECONDS:
        return None
    last = f", last at step {job.progress.step:,}" if job.progress.step else ""
    expected = f"expected every {HEARTBEAT_SECONDS:g} s"
    return (
        f"No report for {duration(silent)}, {expected}{last}. Not treated as failed: its processes are being checked."
    )


def _trouble(job: SummaryInput) -> str:
    what = (job.message or "Ended for an unknown reason").rstrip(".")
    hint = f" {job.hint}" if job.hint else ""
    return f"{what[:1].upper()}{what[1:]}.{hint}"


def _at_step(job: SummaryInput) -> str:
    return f" at step {job.progress.step:,}" if job.progress.step else ""


def _loss(job: SummaryInput) -> str:
    progress = job.progress
    loss = f", loss {progress.loss:.3f}" if progress.loss is not None else ""
    if progress.eval_loss is None:
        return loss
    bits = f" ({progress.eval_bpb:.3f} bits per byte)" if progress.eval_bpb is not None else ""
    return f"{loss}, held-out loss {progress.eval_loss:.3f}{bits}"


def _resume_point(job: SummaryInput) -> str:
    if job.checkpoint is None and job.parent_step is not None:
        return f"resuming continues from step {job.parent_step:,} of its parent"
    if job.checkpoint is None:
        return "no checkpoint, so resuming starts from scratch"
    return f"resuming continues from step {job.checkpoint.step:,}"


def duration(seconds: float) -> str:
    """Return seconds as people write them: ``45 s``, ``3 min``, ``2 h 10 min``, ``3 d 4 h``."""
    whole = max(0, round(seconds))
    if whole < 90:
        return f"{whole} s"
    minutes = round(whole / 60)
    if minutes < 60:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {minutes} min" if minutes else f"{hours} h"
    days, hours = divmod(hours, 24)
    return f"{days} d {hours} h" if hours else f"{days} d"


def _rate(value: float) -> str:
    return f"{value / 1000:,.0f}k" if value >= 10_000 else f"{value:,.0f}"
