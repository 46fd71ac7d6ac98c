"""The display of `watch` on a terminal: at most 14 lines of styled text."""

from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any, TypeAlias

from trainyard.client.cli.formatting import (
    ago,
    bar,
    compact_number,
    count,
    display_width,
    duration,
    fixed,
    local_time,
    one_line,
    scientific,
    size,
    sparkline,
    status_word,
)
from trainyard.client.cli.watch.job_page import alert_text
from trainyard.client.cli.watch.state import WatchState

Span: TypeAlias = tuple[str, str]
"""(text, style)."""

Line: TypeAlias = Sequence[Span]

MAX_LINES = 14
MAX_ALERTS = 3
BAR = 30
SPARK = 24
STYLES = {
    "running": "bold green",
    "succeeded": "bold green",
    "failed": "bold red",
    "interrupted": "bold red",
    "paused": "bold yellow",
    "cancelled": "bold yellow",
}


def render(state: WatchState, now: datetime, width: int = 100) -> list[Line]:
    """Return at most `MAX_LINES` lines, none longer than ``width``."""
    lines: list[Line] = [_title(state, width), _status(state, now), *_message(state)]
    if state.progress.get("step") or state.curve.last:
        lines += [_loss(state), _speed(state), _optimizer(state)]
    if state.job.get("checkpoint"):
        lines.append(_checkpoint(state, now))
    alerts = (state.job.get("alerts") or [])[:MAX_ALERTS]
    lines += [[("  alert     ", "yellow"), (alert_text(alert), "")] for alert in alerts]
    lines.append(_footer(state, now, width))
    return [_truncate(line, width) for line in lines[:MAX_LINES]]


def plain(lines: Sequence[Line]) -> list[str]:
    """Return the text of the lines, without styles."""
    return ["".join(text for text, _ in line).rstrip() for line in lines]


def _title(state: WatchState, width: int) -> Line:
    job = state.job
    attempt = f"   attempt {job['attempt']}" if job.get("attempt") else ""
    left = f"{one_line(str(job.get('name', state.handle)), 40)}{attempt}   {job.get('id', '')}"
    hint = "Ctrl-C detaches; the job keeps running"
    gap = width - display_width(left) - display_width(hint)
    return [(left, "bold"), (" " * gap + hint, "dim")] if gap >= 3 else [(left, "bold")]


def _status(state: WatchState, now: datetime) -> Line:
    status, progress = str(state.job.get("status", "connecting")), state.progress
    spans: list[Span] = [(status_word(status), STYLES.get(status, "bold"))]
    phase = state.job.get("phase")
    if phase and phase != "training":
        spans.append((f" ({phase})", ""))
    steps, percent = progress.get("steps"), progress.get("percent")
    if not progress.get("step") and steps is None:
        return spans
    spans.append((f"   step {count(progress['step'])} / {count(steps)}", ""))
    if percent is not None:
        spans += [(f"   {fixed(percent, 1)} %   ", ""), (bar(percent / 100, BAR), "cyan")]
    return [*spans, (_eta(state, now), "")]


def _eta(state: WatchState, now: datetime) -> str:
    eta = state.progress.get("eta_seconds")
    if not eta or state.job.get("status") != "running":
        return ""
    return f"   ETA {duration(eta)} ({(now + timedelta(seconds=eta)).astimezone():%H:%M})"


def _message(state: WatchState) -> list[Line]:
    job = state.job
    has_steps = job.get("phase") == "training" or (job.get("phase") is None and state.progress.get("steps") is not None)
    # While it trains, the numbers say all that the summary says.
    is_training = job.get("status") == "running" and has_steps
    text = job.get("message") or (None if is_training else job.get("summary"))
    return [[(f"  {one_line(str(text), 300)}", "")]] if text else []


def _loss(state: WatchState) -> Line:
    curve = state.curve
    spans: list[Span] = [(f"  loss      {fixed(curve.ema)} ema   {fixed(state.newest('loss'))} last   ", "")]
    spans.append((sparkline(curve.losses, SPARK), "magenta"))
    if curve.last_eval:
        loss, bpb, step = (curve.last_eval.get(name) for name in ("eval_loss", "eval_bpb", "step"))
        bits = "" if bpb is None else f", {fixed(bpb)} bits/byte"
        spans.append((f"   eval {fixed(loss)}{bits} at {count(step)}", ""))
    return spans


def _speed(state: WatchState) -> Line:
    mfu = state.newest("mfu")
    parts = [
        f"{count(state.newest('tokens_per_second'))} tok/s",
        f"{fixed(state.newest('step_seconds'))} s/step",
        *([] if mfu is None else [f"MFU {100 * mfu:.0f} %"]),
        f"tokens {compact_number(state.newest('tokens'))}{_total_tokens(state)}",
    ]
    return [("  speed     " + "   ".join(parts), "")]


def _total_tokens(state: WatchState) -> str:
    per_step, steps = (state.job.get("plan") or {}).get("tokens_per_step"), state.progress.get("steps")
    return f" of {compact_number(per_step * steps)}" if per_step and steps else ""


def _optimizer(state: WatchState) -> Line:
    rate, norm = scientific(state.newest("learning_rate")), fixed(state.newest("grad_norm"), 2)
    return [(f"  optim     lr {rate}   grad norm {norm}", "")]


def _checkpoint(state: WatchState, now: datetime) -> Line:
    saved, kept = state.job["checkpoint"], state.checkpoints
    verified = ", verified" if kept and kept.verified and kept.step == saved.get("step") else ""
    sizes = f"; {kept.count} kept, {size(kept.bytes)}" if kept else f"; {size(saved.get('bytes'))}"
    when = f"{count(saved.get('step'))} saved {ago(saved.get('created_at'), now)}"
    return [(f"  ckpt      {when}{verified}{_next_save(state, now)}{sizes}", "")]


def _next_save(state: WatchState, now: datetime) -> str:
    due = [seconds for seconds in (_by_steps(state), _by_minutes(state, now)) if seconds is not None]
    return f"; next in {duration(min(due))}" if due and state.job.get("status") == "running" else ""


def _checkpoint_spec(state: WatchState) -> Mapping[str, Any]:
    return (state.job.get("spec") or {}).get("checkpoint") or {}


def _by_steps(state: WatchState) -> float | None:
    interval = _checkpoint_spec(state).get("save_interval")
    step, steps, seconds = state.progress.get("step"), state.progress.get("steps"), state.newest("step_seconds")
    if not interval or step is None or not seconds:
        return None
    next_step = interval * (step // interval + 1)
    return float((min(next_step, steps or next_step) - step) * seconds)


def _by_minutes(state: WatchState, now: datetime) -> float | None:
    minutes = _checkpoint_spec(state).get("save_minutes")
    saved = local_time(state.job["checkpoint"].get("created_at"))
    return max(0.0, 60 * minutes - (now - saved).total_seconds()) if minutes and saved else None


def _footer(state: WatchState, now: datetime, width: int) -> Line:
    url = f"{state.url}/jobs/{state.job['id']}" if state.job.get("id") else state.url
    if state.connection_error is not None:
        since = f"for {duration((now - state.answered_at).total_seconds())}" if state.answered_at else "yet"
        return [(f"reconnecting, no answer {since}", "bold yellow"), (f"   {url}", "")]
    updated = local_time(state.progress.get("updated_at")) or state.answered_at
    age = f", updated {duration((now - updated).total_seconds())} ago" if updated else ""
    # Half an address opens nothing, so on a narrow terminal the age is left out first.
    fitting = (text for text in (f"live{age}   {url}", f"live   {url}") if display_width(text) <= width)
    return [(next(fitting, f"live{age}"), "dim")]


def _truncate(line: Line, width: int) -> Line:
    # A line that wraps would break the redrawing in place.
    spans: list[Span] = []
    left = width
    for text, style in line:
        spans.append((one_line(text, left), style))
        left -= display_width(text)
        if left <= 0:
            break
    return spans
