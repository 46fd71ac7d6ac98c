"""A job's progress. Pure: each function takes the stored progress and returns the next one."""

from datetime import datetime
from typing import Any

from trainyard.contract.events import MetricEvent, Started

FIELDS = (
    *("epoch", "tokens", "loss", "bpb", "learning_rate", "grad_norm", "tokens_per_second", "mfu", "nonfinite"),
    *("step_seconds_max_rank", "step_seconds_spread"),
)


def after_start(progress: dict[str, Any], event: Started) -> dict[str, Any]:
    """Return the progress after an attempt started; steps that it will repeat no longer count."""
    return {
        **progress,
        **percent_done(event.start_step, event.steps),
        "eta_seconds": None,
        "updated_at": _time(event.at),
        "train_seconds": event.train_seconds,
    }


def after_metric(progress: dict[str, Any], event: MetricEvent, facts: dict[str, Any]) -> dict[str, Any]:
    """Return the progress after a metric. ``facts``: the job's plan, with the fields of its `Started` event."""
    steps = facts.get("steps")
    fields = {name: getattr(event, name) for name in FIELDS}
    seconds = event.step_seconds or _step_seconds(event, facts)
    eta = seconds * max(0, steps - event.step) if seconds and steps else None
    return {
        **progress,
        **fields,
        **_evaluation(event),
        **percent_done(event.step, steps),
        "eta_seconds": eta,
        "updated_at": _time(event.at),
        "step_seconds": seconds,
        "train_seconds": event.train_seconds if event.train_seconds is not None else progress.get("train_seconds"),
    }


def _evaluation(event: MetricEvent) -> dict[str, Any]:
    """Return the fields of the newest evaluation over all held-out sets; {} if this point has none."""
    if event.eval_loss is None:
        return {}
    return {"eval_loss": event.eval_loss, "eval_bpb": event.eval_bpb, "eval_step": event.step}


def after_heartbeat(progress: dict[str, Any], step: int | None, now: datetime) -> dict[str, Any]:
    """Return the progress after a heartbeat between two metrics."""
    if step is None or step <= (progress.get("step") or 0) or step > 2**53:
        return progress
    steps, seconds = progress.get("steps"), progress.get("step_seconds")
    eta = seconds * max(0, steps - step) if seconds and steps else progress.get("eta_seconds")
    return {**progress, **percent_done(step, steps), "eta_seconds": eta, "updated_at": _time(now)}


def after_end(progress: dict[str, Any], step: int, train_seconds: float | None = None) -> dict[str, Any]:
    """Return the progress after an attempt ended at ``step``, which may have no metric."""
    if train_seconds is not None:
        progress = {**progress, "train_seconds": train_seconds}
    reached = max(step, progress.get("step") or 0)
    return {**progress, **percent_done(reached, progress.get("steps")), "eta_seconds": None}


def percent_done(step: int, steps: int | None) -> dict[str, Any]:
    """Return the fields ``step``, ``steps`` and ``percent``."""
    percent = min(100.0, 100.0 * step / steps) if steps else None
    return {"step": step, "steps": steps, "percent": percent}


def _step_seconds(event: MetricEvent, facts: dict[str, Any]) -> float | None:
    per_step = facts.get("tokens_per_step")
    if not per_step or not event.tokens_per_second:
        return None
    return float(per_step / event.tokens_per_second)


def _time(at: datetime) -> str:
    return at.isoformat()
