"""The three faces of `watch`: a picture redrawn in place, lines for a log, NDJSON for a program."""

from datetime import datetime
from typing import Any, Protocol

from trainyard.client.cli.console import Console
from trainyard.client.cli.formatting import one_line, utc
from trainyard.client.cli.watch.job_page import alert_text
from trainyard.client.cli.watch.render import Line, render
from trainyard.client.cli.watch.state import WatchState

LINE_SECONDS = 10.0


class View(Protocol):
    """Shows what is known of a run."""

    def show(self, scene: WatchState, now: datetime) -> None:
        """Called after every look, about once a second."""

    def close(self) -> None:
        """Leave the screen in order."""


class LiveView:
    """At most 14 lines, redrawn in place; the last one stays."""

    def __init__(self, console: Console) -> None:
        from rich.console import Console as Screen
        from rich.live import Live

        self._screen = Screen(file=console.out, no_color=not console.colours, highlight=False, markup=False)
        self._live = Live(console=self._screen, auto_refresh=False, vertical_overflow="crop", redirect_stderr=False)
        self._live.start()

    def show(self, scene: WatchState, now: datetime) -> None:
        """Draw the picture over the one before."""
        self._live.update(_rendered(render(scene, now, self._screen.width)), refresh=True)

    def close(self) -> None:
        """Leave the last picture and give the cursor back."""
        self._live.stop()


def _rendered(lines: list[Line]) -> Any:
    from rich.text import Text

    pieces = [piece for line in lines for piece in (*line, ("\n", ""))]
    return Text.assemble(*pieces[:-1], no_wrap=True, overflow="crop")


class LinesView:
    """One ``key=value`` line each 10 s, and at once when something changes. UTC, no ANSI."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._state: tuple[Any, ...] | None = None
        self._said_at: datetime | None = None

    def show(self, scene: WatchState, now: datetime) -> None:
        """Print a line where one is due."""
        due = self._said_at is None or (now - self._said_at).total_seconds() >= LINE_SECONDS
        if due or scene.state != self._state:
            self._state, self._said_at = scene.state, now
            self._console.data(log_line(scene, now))

    def close(self) -> None:
        """Nothing is open."""


def log_line(scene: WatchState, now: datetime) -> str:
    """``at=2026-01-31T16:31:05Z job=job_7f3kq9 status=running step=12400 ...``; unknown values are left out."""
    job, progress, saved = scene.job, scene.progress, scene.job.get("checkpoint") or {}
    pairs = {
        "at": utc(now),
        "job": job.get("id"),
        "status": job.get("status"),
        "phase": job.get("phase"),
        "attempt": job.get("attempt"),
        "step": progress.get("step"),
        "steps": progress.get("steps"),
        "percent": _short(progress.get("percent"), 1),
        "loss": _short(scene.newest("loss"), 4),
        "ema": _short(scene.curve.ema, 4),
        "lr": None if scene.newest("learning_rate") is None else f"{scene.newest('learning_rate'):.6g}",
        "grad_norm": _short(scene.newest("grad_norm"), 4),
        "tokens_per_second": _short(scene.newest("tokens_per_second"), 0),
        "eta_seconds": _short(progress.get("eta_seconds"), 0),
        "checkpoint": saved.get("step"),
        "alerts": "; ".join(map(alert_text, job.get("alerts") or [])) or None,
        "message": job.get("message"),
        "connection": None if scene.lost is None else "lost",
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
        self._state: tuple[Any, ...] | None = None
        self._lost: str | None = None

    def show(self, scene: WatchState, now: datetime) -> None:
        """Print what is new, the points before the change that they led to."""
        for metric in scene.fresh:
            self._console.json({"event": "metric", "metric": metric})
        if (scene.lost is None) != (self._lost is None):
            self._console.json({"event": "connection", "lost": scene.lost, "at": utc(now)})
            self._lost = scene.lost
        if scene.state[:-1] != self._state:
            self._state = scene.state[:-1]
            self._console.json({"event": "job", "job": scene.job})

    def close(self) -> None:
        """Nothing is open."""


def view_for(console: Console, as_json: bool) -> View:
    """The face that fits where stdout goes."""
    if as_json:
        return JsonView(console)
    return LiveView(console) if console.draws else LinesView(console)
