"""The picture that `watch` draws: at most 14 lines of styled pieces. Pure; nothing here knows of a terminal."""

from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any, TypeAlias

from trainyard.client.cli.formatting import (
    ago,
    bar,
    compact_number,
    count,
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

Piece: TypeAlias = tuple[str, str]
"""(text, style)."""

Line: TypeAlias = Sequence[Piece]

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


def render(scene: WatchState, now: datetime, width: int = 100) -> list[Line]:
    """The whole picture, at most `MOST_LINES` lines, none longer than ``width``."""
    lines: list[Line] = [_title(scene, width), _state(scene, now), *_sentence(scene)]
    if scene.progress.get("step") or scene.curve.last:
        lines += [_loss(scene), _speed(scene), _optimizer(scene)]
    if scene.job.get("checkpoint"):
        lines.append(_checkpoint(scene, now))
    lines += [[("  alert     ", "yellow"), (alert_text(alert), "")] for alert in _alerts(scene)]
    lines.append(_footer(scene, now))
    return [_cut(line, width) for line in lines[:MAX_LINES]]


def plain(lines: Sequence[Line]) -> list[str]:
    """The same without styles."""
    return ["".join(text for text, _ in line).rstrip() for line in lines]


def _alerts(scene: WatchState) -> list[Any]:
    return list(scene.job.get("alerts") or [])[:MAX_ALERTS]


def _title(scene: WatchState, width: int) -> Line:
    job = scene.job
    attempt = f"   attempt {job['attempt']}" if job.get("attempt") else ""
    left = f"{one_line(str(job.get('name', scene.handle)), 40)}{attempt}   {job.get('id', '')}"
    hint = "Ctrl-C detaches; the job keeps running"
    gap = width - len(left) - len(hint)
    return [(left, "bold"), (" " * gap + hint, "dim")] if gap >= 3 else [(left, "bold")]


def _state(scene: WatchState, now: datetime) -> Line:
    status, progress = str(scene.job.get("status", "connecting")), scene.progress
    pieces: list[Piece] = [(status_word(status), STYLES.get(status, "bold"))]
    phase = scene.job.get("phase")
    if phase and phase != "training":
        pieces.append((f" ({phase})", ""))
    steps, percent = progress.get("steps"), progress.get("percent")
    if not progress.get("step") and steps is None:
        return pieces
    pieces.append((f"   step {count(progress['step'])} / {count(steps)}", ""))
    if percent is not None:
        pieces += [(f"   {fixed(percent, 1)} %   ", ""), (bar(percent / 100, BAR), "cyan")]
    return [*pieces, (_eta(scene, now), "")]


def _eta(scene: WatchState, now: datetime) -> str:
    eta = scene.progress.get("eta_seconds")
    if not eta or scene.job.get("status") != "running":
        return ""
    return f"   ETA {duration(eta)} ({(now + timedelta(seconds=eta)).astimezone():%H:%M})"


def _sentence(scene: WatchState) -> list[Line]:
    """What the numbers do not say: why the job waits, restarts, or ended."""
    job = scene.job
    begun = job.get("phase") == "training" or (job.get("phase") is None and scene.progress.get("steps") is not None)
    training = job.get("status") == "running" and begun
    text = job.get("message") or (None if training else job.get("summary"))
    return [[(f"  {one_line(str(text), 300)}", "")]] if text else []


def _loss(scene: WatchState) -> Line:
    curve = scene.curve
    pieces: list[Piece] = [(f"  loss      {fixed(curve.ema)} ema   {fixed(scene.newest('loss'))} last   ", "")]
    pieces.append((sparkline(curve.losses, SPARK), "magenta"))
    if curve.evaluated:
        step, loss = curve.evaluated
        pieces.append((f"   eval {fixed(loss)} at {count(step)}", ""))
    return pieces


def _speed(scene: WatchState) -> Line:
    mfu = scene.newest("mfu")
    parts = [
        f"{count(scene.newest('tokens_per_second'))} tok/s",
        f"{fixed(scene.newest('step_seconds'))} s/step",
        *([] if mfu is None else [f"MFU {100 * mfu:.0f} %"]),
        f"tokens {compact_number(scene.newest('tokens'))}{_of_all_tokens(scene)}",
    ]
    return [("  speed     " + "   ".join(parts), "")]


def _of_all_tokens(scene: WatchState) -> str:
    per_step, steps = (scene.job.get("plan") or {}).get("tokens_per_step"), scene.progress.get("steps")
    return f" of {compact_number(per_step * steps)}" if per_step and steps else ""


def _optimizer(scene: WatchState) -> Line:
    rate, norm = scientific(scene.newest("learning_rate")), fixed(scene.newest("grad_norm"), 2)
    return [(f"  optim     lr {rate}   grad norm {norm}", "")]


def _checkpoint(scene: WatchState, now: datetime) -> Line:
    saved, kept = scene.job["checkpoint"], scene.kept
    verified = ", verified" if kept and kept.verified and kept.step == saved.get("step") else ""
    there = f"; {kept.count} kept, {size(kept.bytes)}" if kept else f"; {size(saved.get('bytes'))}"
    when = f"{count(saved.get('step'))} saved {ago(saved.get('created_at'), now)}"
    return [(f"  ckpt      {when}{verified}{_next_save(scene, now)}{there}", "")]


def _next_save(scene: WatchState, now: datetime) -> str:
    due = [seconds for seconds in (_by_steps(scene), _by_minutes(scene, now)) if seconds is not None]
    return f"; next in {duration(min(due))}" if due and scene.job.get("status") == "running" else ""


def _keeping(scene: WatchState) -> Mapping[str, Any]:
    return (scene.job.get("spec") or {}).get("checkpoint") or {}


def _by_steps(scene: WatchState) -> float | None:
    interval = _keeping(scene).get("save_interval")
    step, steps, seconds = scene.progress.get("step"), scene.progress.get("steps"), scene.newest("step_seconds")
    if not interval or step is None or not seconds:
        return None
    following = interval * (step // interval + 1)
    return float((min(following, steps or following) - step) * seconds)


def _by_minutes(scene: WatchState, now: datetime) -> float | None:
    minutes, saved = _keeping(scene).get("save_minutes"), local_time(scene.job["checkpoint"].get("created_at"))
    return max(0.0, 60 * minutes - (now - saved).total_seconds()) if minutes and saved else None


def _footer(scene: WatchState, now: datetime) -> Line:
    where = f"{scene.url}/jobs/{scene.job['id']}" if scene.job.get("id") else scene.url
    if scene.lost is not None:
        since = duration((now - scene.seen_at).total_seconds()) if scene.seen_at else "now"
        return [(f"reconnecting, no answer for {since}", "bold yellow"), (f"   {where}", "")]
    updated = local_time(scene.progress.get("updated_at")) or scene.seen_at
    age = f", updated {duration((now - updated).total_seconds())} ago" if updated else ""
    return [(f"live{age}   {where}", "dim")]


def _cut(line: Line, width: int) -> Line:
    """The line without what does not fit: a line that wraps would break the redrawing in place."""
    kept: list[Piece] = []
    left = width
    for text, style in line:
        kept.append((one_line(text, left), style))
        left -= len(text)
        if left <= 0:
            break
    return kept
