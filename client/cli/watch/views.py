"""The three outputs of `watch`: lines redrawn in place, log lines, and NDJSON."""

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, Protocol

from trainyard.client.cli.console import Console, is_utf8
from trainyard.client.cli.formatting import BLOCKS, one_line, utc
from trainyard.client.cli.watch.job_page import alert_text
from trainyard.client.cli.watch.render import Line, render
from trainyard.client.cli.watch.state import WatchState

LINE_SECONDS = 10.0


class View(Protocol):
    """Output of `watch`."""

    def show(self, state: WatchState, now: datetime) -> None:
        """Write the state. Called after every poll, about once a second."""

    def close(self) -> None:
        """Restore the terminal."""


class LiveView:
    """At most 14 lines, redrawn in place. The last state stays on the screen."""

    def __init__(self, console: Console) -> None:
        from rich.console import Console as Screen
        from rich.live import Live

        # Encodings other than UTF-8 lack the blocks of a sparkline.
        self._blocks = {} if is_utf8(console.out) else str.maketrans(BLOCKS, "_.-:=+*#")
        self._screen = Screen(file=console.out, no_color=not console.uses_colour, highlight=False, markup=False)
        self._live = Live(console=self._screen, auto_refresh=False, vertical_overflow="crop", redirect_stderr=False)
        self._live.start()

    def show(self, state: WatchState, now: datetime) -> None:
        lines = render(state, now, self._screen.width)
        drawn = [[(text.translate(self._blocks), style) for text, style in line] for line in lines]
        self._live.update(_to_text(drawn), refresh=True)

    def close(self) -> None:
        self._live.stop()


def _to_text(lines: Sequence[Line]) -> Any:
    from rich.text import Text

    spans = [span for line in lines for span in (*line, ("\n", ""))]
    return Text.assemble(*spans[:-1], no_wrap=True, overflow="crop")


class LinesView:
    """One ``key=value`` line every 10 s, and at once after a change. Times are in UTC; no ANSI codes."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._printed: tuple[Any, ...] | None = None
        self._printed_at: datetime | None = None
        self._texts: dict[str, tuple[str, ...]] = {}

    def show(self, state: WatchState, now: datetime) -> None:
        # The clock of the service may be set back.
        is_due = self._printed_at is None or abs((now - self._printed_at).total_seconds()) >= LINE_SECONDS
        if is_due or state.change_key != self._printed:
            self._printed, self._printed_at = state.change_key, now
            self._console.data(self._line(state, now))

    def _line(self, state: WatchState, now: datetime) -> str:
        # Long texts are printed once, and not on every line.
        before, self._texts = self._texts, long_texts(state)
        new = {key: [text for text in texts if text not in before.get(key, ())] for key, texts in self._texts.items()}
        return log_line(state, now, new)

    def close(self) -> None:
        """Do nothing."""


def long_texts(state: WatchState) -> dict[str, tuple[str, ...]]:
    """Return the job's alerts and message."""
    message = state.job.get("message")
    alerts = tuple(map(alert_text, state.job.get("alerts") or []))
    return {"alerts": alerts, "message": () if message is None else (message,)}


def log_line(state: WatchState, now: datetime, texts: Mapping[str, Sequence[str]]) -> str:
    """Return ``at=2026-01-31T16:31:05Z job=job_7f3kq9 status=running step=12400 ...``, without unknown values.

    ``texts``: those of `long_texts` that are to be in the line.
    """
    job, progress, saved = state.job, state.progress, state.job.get("checkpoint") or {}
    evaluation = state.curve.last_eval or {}
    # While the corpus is prepared, the progress is that of the preparation.
    advance = job.get("preparation") or progress
    pairs = {
        "at": utc(now),
        "job": job.get("id"),
        "status": job.get("status"),
        "phase": job.get("phase"),
        "attempt": job.get("attempt"),
        "step": progress.get("step"),
        "steps": progress.get("steps"),
        "percent": _short(advance.get("percent"), 1),
        "loss": _short(state.newest("loss"), 4),
        "ema": _short(state.curve.ema, 4),
        "bpb": _short(state.newest("bpb"), 4),
        "eval_loss": _short(evaluation.get("eval_loss"), 4),
        "eval_bpb": _short(evaluation.get("eval_bpb"), 4),
        "lr": None if state.newest("learning_rate") is None else f"{state.newest('learning_rate'):.6g}",
        "grad_norm": _short(state.newest("grad_norm"), 4),
        "tokens_per_second": _short(state.newest("tokens_per_second"), 0),
        "eta_seconds": _short(advance.get("eta_seconds"), 0),
        "checkpoint": saved.get("step"),
        **{key: "; ".join(chosen) or None for key, chosen in texts.items()},
        "connection": None if state.connection_error is None else "lost",
    }
    return " ".join(f"{key}={_quoted(value)}" for key, value in pairs.items() if value is not None)


def _short(value: float | None, digits: int) -> str | None:
    return None if value is None else f"{value:.{digits}f}"


def _quoted(value: object) -> str:
    text = one_line(str(value), 300)
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"' if not text or set(text) & set(' "=\\') else text


class JsonView:
    """NDJSON on stdout: ``{"event": "metric", ...}``, ``{"event": "job", ...}``, ``{"event": "connection", ...}``."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._printed: tuple[Any, ...] | None = None
        self._is_lost = False

    def show(self, state: WatchState, now: datetime) -> None:
        # Points first: a change of status comes after them.
        for metric in state.new_points:
            self._console.json({"event": "metric", "metric": metric})
        if (state.connection_error is not None) != self._is_lost:
            self._console.json({"event": "connection", "lost": state.connection_error, "at": utc(now)})
            self._is_lost = not self._is_lost
        if state.change_key[:-1] != self._printed:
            self._printed = state.change_key[:-1]
            self._console.json({"event": "job", "job": state.job})

    def close(self) -> None:
        """Do nothing."""


def view_for(console: Console, as_json: bool) -> View:
    """Return the view for the kind of stdout."""
    if as_json:
        return JsonView(console)
    return LiveView(console) if console.can_redraw else LinesView(console)
