"""`trainyard watch`: look at a run about once a second until it is at rest, whatever happens to the service."""

import shlex
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from types import SimpleNamespace

from trainyard.client.api import Client
from trainyard.client.cli.console import Console
from trainyard.client.cli.hints import ending
from trainyard.client.cli.watch.checkpoints import CheckpointPoller
from trainyard.client.cli.watch.state import WatchState
from trainyard.client.cli.watch.views import View, view_for
from trainyard.client.connection import RetryPolicy
from trainyard.client.errors import ApiError, ServiceUnreachable
from trainyard.client.exit_codes import Exit, exit_of_job, is_idle
from trainyard.client.sse import EventStream, StreamEvent
from trainyard.client.types import Job

INTERVAL = 1.0
BACKLOG = 2000
"""Log intervals of the curve that are fetched at the start; a sparkline needs no more."""

LOST_SECONDS = 900.0
"""A service that did not answer for so long will not be back soon: off a terminal nobody is there to see it."""

IMPATIENT = RetryPolicy(seconds=0.0)
"""The loop itself is the patience, and the picture goes on while the service is away."""


@dataclass(frozen=True)
class Clock:
    """Time, so that tests need none."""

    monotonic: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep

    def now(self) -> datetime:
        """The time of day."""
        return datetime.now(UTC)


def watch(args: SimpleNamespace, console: Console) -> int:
    """`trainyard watch`."""
    with Client(args.url, args.token) as trainyard:
        job_id = trainyard.find(args.job)["id"]
    return follow_job(job_id, args, console, handle=args.job)


def follow_job(job_id: str, args: SimpleNamespace, console: Console, handle: str) -> int:
    """Follow over a connection that does not wait for itself."""
    with Client(args.url, args.token, timeout=5.0, patience=IMPATIENT) as trainyard:
        return follow(Watcher(trainyard, job_id, handle, streams=True), args, console, Clock())


def follow(watcher: "Watcher", args: SimpleNamespace, console: Console, clock: Clock) -> int:
    """Show the run until its end; the exit code says how it ended."""
    handle = watcher.scene.handle
    view = view_for(console, args.json)
    try:
        scene, code = poll_until_idle(watcher, view, clock, args.timeout, retry_policy(console))
    except KeyboardInterrupt:
        view.close()
        console.error(f"Detached. Job continues. Re-attach: trainyard watch {shlex.quote(handle)}")
        return Exit.DETACHED
    finally:
        view.close()
        watcher.close()
    if code == Exit.TIMED_OUT:
        how = "Job continues." if scene.lost is None else f"The service is lost: {scene.lost}."
        console.error(f"{args.timeout:g} s passed. {how} Re-attach: trainyard watch {shlex.quote(handle)}")
    elif code == Exit.NO_SERVICE:
        console.error(f"The service is lost: {scene.lost}. Re-attach: trainyard watch {shlex.quote(handle)}")
    else:
        for line in ending(scene.job, handle):
            console.error(line)
    return code


def retry_policy(console: Console) -> float | None:
    """How long a service that is lost is waited for: on a terminal as long as somebody looks at it."""
    return None if console.draws else LOST_SECONDS


def poll_until_idle(
    watcher: "Watcher", view: View, clock: Clock, timeout: float | None, patience: float | None
) -> tuple[WatchState, Exit]:
    """The loop: look, show, decide, sleep. ``timeout`` seconds bound it, and ``patience`` without an answer."""
    answered = clock.monotonic()
    deadline = None if timeout is None else clock.monotonic() + timeout
    while True:
        scene = watcher.poll(clock.now())
        view.show(scene, clock.now())
        code = exit_of_job(scene.job) if scene.job and scene.lost is None else None
        if code is not None:
            return scene, code
        if deadline is not None and clock.monotonic() >= deadline:
            return scene, Exit.TIMED_OUT
        answered = answered if scene.lost is not None else clock.monotonic()
        if patience is not None and clock.monotonic() - answered >= patience:
            return scene, Exit.NO_SERVICE
        clock.sleep(INTERVAL if deadline is None else min(INTERVAL, max(0.0, deadline - clock.monotonic())))


class Watcher:
    """Asks the service and keeps the scene. An answer that does not come leaves the scene as it was.

    With ``streams`` the points come by a stream; while it does not stand they are asked for.
    """

    def __init__(self, trainyard: Client, job_id: str, handle: str, streams: bool = False) -> None:
        self._trainyard = trainyard
        self._job_id = job_id
        self._streams = streams
        self._feed: EventStream | None = None
        self._attempt: int | None = None
        self._saves = CheckpointPoller(trainyard, job_id)
        self.scene = WatchState(handle=handle, url=trainyard.url)

    def close(self) -> None:
        """Nothing more is wanted."""
        if self._feed is not None:
            self._feed.close()

    def poll(self, now: datetime) -> WatchState:
        """One look. Raises Refused where the service says no: the job is gone, or the token is."""
        scene = self.scene
        scene.fresh = []
        try:
            self._update(self._trainyard.job(self._job_id))
            scene.seen_at, scene.lost = now, None
        except ServiceUnreachable as error:
            scene.lost = error.cause
        except ApiError as error:
            if error.status < 500:
                raise
            scene.lost = error.detail
        return scene

    def _update(self, job: Job) -> None:
        scene = self.scene
        first = not scene.job
        scene.kept = self._saves.poll(job.get("checkpoint"))
        # What a job at rest said last may still be under way in the stream.
        if self._feed is None or not self._feed.healthy or is_idle(job):
            self._ask(job, first)
        else:
            self._take(self._feed)
        scene.job = job
        if first and self._streams:
            step = scene.curve.step
            self._feed = EventStream(lambda behind: self._stream(step, behind)).start()

    def _stream(self, after_step: int, behind: str | None) -> Iterator[StreamEvent]:
        return self._trainyard.metric_stream(self._job_id, after_step=after_step, last_event_id=behind)

    def _ask(self, job: Job, first: bool) -> None:
        scene = self.scene
        if first:
            start = _start_of_backlog(job)
        else:
            start = self._after_restart(job) if job.get("attempt") != self._attempt else scene.curve.step
        self._attempt = job.get("attempt")
        scene.fresh = list(self._trainyard.metrics(self._job_id, after_step=start))
        scene.curve.extend(scene.fresh)

    def _take(self, feed: EventStream) -> None:
        for event in feed.take():
            if event.kind == "attempt":
                self._attempt = event.data["attempt"]
                self.scene.curve.rewind(event.data["start_step"])
            elif event.kind == "metric" and event.data["step"] > self.scene.curve.step:
                # Not beyond it: it was asked for already, while the stream did not stand.
                self.scene.fresh.append(event.data)
                self.scene.curve.extend([event.data])

    def _after_restart(self, job: Job) -> int:
        """A new attempt goes on from the newest checkpoint: points behind it will come again."""
        saved = job.get("checkpoint")
        start = min(self.scene.curve.step, saved["step"] if saved else 0)
        self.scene.curve.rewind(start)
        return start


def _start_of_backlog(job: Job) -> int:
    step = (job.get("progress") or {}).get("step") or 0
    interval = ((job.get("spec") or {}).get("reporting") or {}).get("log_interval") or 1
    return max(0, step - BACKLOG * interval)
