"""The page of `trainyard show`: summary, facts, alerts, error and allowed actions of a job, as lines of text."""

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from trainyard.client.cli.formatting import ago, compact_number, count, duration, fixed, scientific, size, status_word
from trainyard.client.cli.hints import error_card, next_actions

MAX_SETS = 20
"""Held-out sets whose results are listed."""

MAX_LISTED = 5
"""Files or sources of a corpus that are listed."""


def job_page(
    job: Mapping[str, Any],
    now: datetime,
    held_out: Mapping[str, Mapping[str, Any]] | None = None,
    scores: Sequence[Any] = (),
) -> list[str]:
    """Return the lines of the page.

    ``held_out``: the newest results of each held-out set; ``scores``: the newest one on each task.
    """
    phase = f" ({job['phase']})" if job.get("phase") else ""
    lines = [f"{job['name']}   {job['id']}   {status_word(job['status'])}{phase}"]
    summary, message = str(job.get("summary") or ""), str(job.get("message") or "")
    is_repeated = message.rstrip(".").lower() in summary.lower()
    lines += [text for text in (summary, "" if is_repeated else message) if text]
    commands = [f"  {line}" for line in next_actions(job)]
    suggestions = ["next:", *commands] if commands else []
    sets, tasks = _held_out_sets(held_out or {}), _scores(scores)
    for block in (_facts(job, now), sets, tasks, _alerts(job), error_card(job), suggestions, _actions(job)):
        lines += ["", *block] if block else []
    return lines


def _facts(job: Mapping[str, Any], now: datetime) -> list[str]:
    facts = [
        ("progress", _progress(job.get("progress") or {})),
        ("numbers", _numbers(job.get("progress") or {})),
        ("slowest", _slowest(job.get("progress") or {})),
        ("held-out", _evaluation(job.get("progress") or {})),
        ("checkpoint", _checkpoint(job.get("checkpoint"), now)),
        ("weights", _text(job.get("weights_path"))),
        ("queue", _queue(job.get("queue"))),
        ("attempt", _text(job.get("attempt"))),
        ("reason", f"{job['status']} by user" if job.get("reason") == "user" else _text(job.get("reason"))),
        ("submitted", f"by {job['submitted_by']}" if job.get("submitted_by") else ""),
        ("labels", " ".join(f"{key}={value}" for key, value in sorted((job.get("labels") or {}).items()))),
        ("corpus", _corpus((job.get("spec") or {}).get("data") or {})),
        ("limits", _limits_left(job.get("limits_left"))),
        ("times", _times(job, now)),
        ("resume", _resume(job)),
    ]
    return [f"  {name:<11}{value}" for name, value in facts if value]


def _scores(scores: Sequence[Any]) -> list[str]:
    return [f"  task {score['task']}: {score_text(score)}, step {count(score['step'])}" for score in scores]


def score_text(score: Mapping[str, Any]) -> str:
    """Return the numbers of a score on a task, such as ``acc 0.5210, bpb 1.2034``."""
    numbers = ((name, score.get(name)) for name in ("acc", "acc_norm", "bpb"))
    return ", ".join(f"{name} {fixed(value, 4)}" for name, value in numbers if value is not None) or "not finite"


def _text(value: object) -> str:
    return "" if value is None else str(value)


def _corpus(data: Mapping[str, Any]) -> str:
    sources = [f"{source['name']}: {_paths(source['path'])}" for source in data.get("sources") or ()]
    return _listed(sources, "; ") or _paths(data.get("data_path"))


def _paths(path: object) -> str:
    return _listed(path, ", ") if isinstance(path, list) else _text(path)


def _listed(texts: Sequence[object], separator: str) -> str:
    more = [f"and {len(texts) - MAX_LISTED:,} more"] if len(texts) > MAX_LISTED else []
    return separator.join([*map(str, texts[:MAX_LISTED]), *more])


def _progress(progress: Mapping[str, Any]) -> str:
    if progress.get("step") is None:
        return ""
    percent = f", {fixed(progress.get('percent'), 1)} %" if progress.get("percent") is not None else ""
    eta = f", ETA {duration(progress['eta_seconds'])}" if progress.get("eta_seconds") else ""
    return f"step {count(progress['step'])} of {count(progress.get('steps'))}{percent}{eta}"


def _limits_left(left: Mapping[str, Any] | None) -> str:
    seconds, tokens = (None, None) if left is None else (left["seconds"], left["tokens"])
    parts = [f"{duration(seconds)} of training"] if seconds is not None else []
    parts += [f"{compact_number(tokens)} tokens"] if tokens is not None else []
    return f"{', '.join(parts)} left" if parts else ""


def _numbers(progress: Mapping[str, Any]) -> str:
    if progress.get("loss") is None:
        return ""
    return (
        f"loss {fixed(progress['loss'])}{_bits(progress.get('bpb'))}, lr {scientific(progress.get('learning_rate'))}, "
        f"grad norm {fixed(progress.get('grad_norm'), 2)}, {count(progress.get('tokens_per_second'))} tok/s, "
        f"{compact_number(progress.get('tokens'))} tokens"
    )


def _slowest(progress: Mapping[str, Any]) -> str:
    rank, spread = progress.get("step_seconds_max_rank"), progress.get("step_seconds_spread")
    return (
        ""
        if rank is None or spread is None
        else f"rank {rank} computes {fixed(spread, 2)} x as long as the median rank"
    )


def _bits(bpb: float | None) -> str:
    return "" if bpb is None else f" ({fixed(bpb)} bits per byte)"


def _evaluation(progress: Mapping[str, Any]) -> str:
    if progress.get("eval_loss") is None:
        return ""
    return (
        f"loss {fixed(progress['eval_loss'])}{_bits(progress.get('eval_bpb'))} at step {count(progress['eval_step'])}"
    )


def _held_out_sets(results: Mapping[str, Mapping[str, Any]]) -> list[str]:
    if len(results) < 2:
        return []  # the line of all sets together is the same
    names = list(results)[:MAX_SETS]
    width = max(map(len, names))
    lines = [
        f"  {name:<{width}}  loss {fixed(results[name].get('loss'))}{_bits(results[name].get('bpb'))}" for name in names
    ]
    more = len(results) - len(names)
    return ["held-out sets:", *lines, *([f"  and {more:,} more: trainyard metrics JOB --csv"] if more else [])]


def _checkpoint(checkpoint: Mapping[str, Any] | None, now: datetime) -> str:
    if not checkpoint:
        return ""
    saved = f"step {count(checkpoint.get('step'))}, {ago(checkpoint.get('created_at'), now)}"
    return f"{saved}, {size(checkpoint.get('bytes'))}, {checkpoint.get('path')}"


def _queue(queue: Mapping[str, Any] | None) -> str:
    if not queue or queue.get("position") is None:
        return ""
    return f"position {queue['position']}" + (
        f", waiting for {queue['waiting_for']}" if queue.get("waiting_for") else ""
    )


def _times(job: Mapping[str, Any], now: datetime) -> str:
    named = (("created", "created_at"), ("started", "started_at"), ("finished", "finished_at"))
    return ", ".join(f"{word} {ago(job[key], now)}" for word, key in named if job.get(key))


def _resume(job: Mapping[str, Any]) -> str:
    if job.get("resumable"):
        return "possible"
    return f"not possible: {job['resume_blocker']}" if job.get("resume_blocker") else ""


def _alerts(job: Mapping[str, Any]) -> list[str]:
    return [f"  alert: {alert_text(alert)}" for alert in job.get("alerts") or []]


def alert_text(alert: object) -> str:
    """Return the message of an alert, which is an object with a ``message`` or a text."""
    return str(alert.get("message", alert)) if isinstance(alert, Mapping) else str(alert)


def _actions(job: Mapping[str, Any]) -> list[str]:
    actions = job.get("allowed_actions") or []
    can = [str(action["action"]) for action in actions if action.get("allowed")]
    return [f"  you can: {', '.join(can)}"] if can else []
