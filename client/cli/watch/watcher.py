"""`trainyard watch`: poll a run about once a second until it is idle, even if the service restarts meanwhile."""

import shlex
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from types import SimpleNamespace

from trainyard.client.api import Client, Job
from trainyard.client.cli.console import Console
from trainyard.client.cli.find import find_job
from trainyard.client.cli.hints import end_report
from trainyard.client.cli.watch.checkpoints import CheckpointPoller
from trainyard.client.cli.watch.state import WatchState
from trainyard.client.cli.watch.views import View, view_for
from trainyard.client.connection import RetryPolicy
from trainyard.client.errors import ApiError, ServiceUnreachable
from trainyard.client.exit_codes import Exit, exit_of_job, is_idle
from trainyard.client.sse import EventStream, StreamEvent

INTERVAL = 1.0
MAX_BACKLOG = 2000
"""Maximum number of points that are fetched at the start, one per log interval. The sparkline needs no more."""

MAX_LOST_SECONDS = 900.0
"""Without a terminal, the command ends after the service has not responded for this long."""

NO_RETRIES = RetryPolicy(seconds=0.0)
"""`poll_until_idle` itself polls again, and updates the display in between."""


@dataclass(frozen=True)
class Clock:
    """The time and how to sleep; tests replace both. ``utc_now``: by the clock of the service."""

    monotonic: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep
    utc_now: Callable[[], datetime] = lambda: datetime.now(UTC)

    def now(self) -> datetime:
        """Return the current time in UTC."""
        return self.utc_now()


def watch(args: SimpleNamespace, console: Console) -> int:
    with Client(args.url, args.token) as trainyard:
        job_id = find_job(trainyard, args.job, console)["id"]
    return follow_job(job_id, args, console, handle=args.job)


def follow_job(job_id: str, args: SimpleNamespace, console: Console, handle: str) -> int:
    """Follow a job with a new client, and return the exit code. ``handle``: the name or id that the user gave."""
    with Client(args.url, args.token, timeout=5.0, retries=NO_RETRIES) as trainyard:
        return follow(
            Watcher(trainyard, job_id, handle, streams=True),
            args,
            console,
            Clock(utc_now=lambda: trainyard.server_time),
        )


def follow(watcher: "Watcher", args: SimpleNamespace, console: Console, clock: Clock) -> int:
    """Show the run until it is idle, and return the exit code for its status."""
    handle = watcher.state.handle
    view = view_for(console, args.json)
    try:
        state, code = poll_until_idle(watcher, view, clock, args.timeout, max_lost_seconds(console))
    except KeyboardInterrupt:
        view.close()
        console.error(f"Detached. Job continues. Re-attach: trainyard watch {shlex.quote(handle)}")
        return Exit.DETACHED
    finally:
        view.close()
        watcher.close()
    if code == Exit.TIMED_OUT:
        how = "Job continues." if state.connection_error is None else f"The service is lost: {state.connection_error}."
        console.error(f"{args.timeout:g} s passed. {how} Re-attach: trainyard watch {shlex.quote(handle)}")
    elif code == Exit.NO_SERVICE:
        console.error(
            f"The service is lost: {state.connection_error}. Re-attach: trainyard watch {shlex.quote(handle)}"
        )
    else:
        for line in end_report(state.job, handle):
            console.error(line)
    return code


def max_lost_seconds(console: Console) -> float | None:
    """Return how long to wait for a service that does not respond; None on a terminal, where the user decides."""
    return None if console.can_redraw else MAX_LOST_SECONDS


def poll_until_idle(
    watcher: "Watcher", view: View, clock: Clock, timeout: float | None, max_lost: float | None
) -> tuple[WatchState, Exit]:
    """Poll, show and sleep until the job is idle, for at most ``timeout`` s, or ``max_lost`` s without a response."""
    answered_at = clock.monotonic()
    deadline = None if timeout is None else clock.monotonic() + timeout
    while True:
        state = watcher.poll(clock.now())
        view.show(state, clock.now())
        code = exit_of_job(state.job) if state.job and state.connection_error is None else None
        if code is not None:
            return state, code
        if deadline is not None and clock.monotonic() >= deadline:
            return state, Exit.TIMED_OUT
        if state.connection_error is None:
            answered_at = clock.monotonic()
        if max_lost is not None and clock.monotonic() - answered_at >= max_lost:
            return state, Exit.NO_SERVICE
        clock.sleep(INTERVAL if deadline is None else min(INTERVAL, max(0.0, deadline - clock.monotonic())))


class Watcher:
    """Polls the service and keeps the state. If there is no response, the state stays as it was.

    With ``streams``, points are read from a stream, and by requests while the stream is not connected.
    """

    def __init__(self, trainyard: Client, job_id: str, handle: str, streams: bool = False) -> None:
        self._trainyard = trainyard
        self._job_id = job_id
        self._streams = streams
        self._stream: EventStream | None = None
        self._attempt: int | None = None
        self._checkpoints = CheckpointPoller(trainyard, job_id)
        self.state = WatchState(handle=handle, url=trainyard.url)

    def close(self) -> None:
        """Stop the stream."""
        if self._stream is not None:
            self._stream.close()

    def poll(self, now: datetime) -> WatchState:
        """Update the state and return it. Raises ApiError if the job or the token is not valid any more."""
        state = self.state
        state.new_points = []
        try:
            self._update(self._trainyard.job(self._job_id))
            state.answered_at, state.connection_error = now, None
        except ServiceUnreachable as error:
            state.connection_error = error.cause
        except ApiError as error:
            if error.status < 500:
                raise
            state.connection_error = error.detail
        return state

    def _update(self, job: Job) -> None:
        state = self.state
        first = not state.job
        state.checkpoints = self._checkpoints.poll(job.get("checkpoint"))
        # The last points of an idle job may not have arrived in the stream yet, so fetch them.
        if self._stream is None or not self._stream.healthy or is_idle(job):
            self._fetch(job, first)
        else:
            self._apply_events(self._stream)
        state.job = job
        if first and self._streams:
            step = state.curve.step
            self._stream = EventStream(lambda last_id: self._open_stream(step, last_id)).start()

    def _open_stream(self, after_step: int, last_id: str | None) -> Iterator[StreamEvent]:
        return self._trainyard.metric_stream(self._job_id, after_step=after_step, last_event_id=last_id)

    def _fetch(self, job: Job, first: bool) -> None:
        state = self.state
        if first:
            start = _backlog_start(job)
        elif job.get("attempt") != self._attempt:
            # A new attempt starts from the newest checkpoint, and reports the points after it again.
            saved = job.get("checkpoint")
            start = min(state.curve.step, saved["step"] if saved else 0)
            state.curve.rewind(start)
        else:
            start = state.curve.step
        self._attempt = job.get("attempt")
        state.new_points = list(self._trainyard.metrics(self._job_id, after_step=start))
        state.curve.extend(state.new_points)

    def _apply_events(self, stream: EventStream) -> None:
        for event in stream.drain():
            if event.kind == "attempt":
                self._attempt = event.data["attempt"]
                self.state.curve.rewind(event.data["start_step"])
            elif event.kind == "metric" and event.data["step"] > self.state.curve.step:
                # Points up to this step were fetched by requests, while the stream was not connected.
                self.state.new_points.append(event.data)
                self.state.curve.extend([event.data])


def _backlog_start(job: Job) -> int:
    progress = job.get("progress") or {}
    step, steps = progress.get("step") or 0, progress.get("steps") or 0
    # Without an interval, a run has about a hundred points.
    interval = ((job.get("spec") or {}).get("reporting") or {}).get("log_interval") or max(1, steps // 100)
    return max(0, step - MAX_BACKLOG * interval)
