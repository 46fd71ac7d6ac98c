"""`trainyard watch`: look at a run about once a second until it is at rest, whatever happens to the service."""

import argparse
import shlex
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime

from client.advice import ending
from client.api import Trainyard
from client.connection import Patience
from client.console import Console
from client.errors import Refused, ServiceUnreachable
from client.exits import Exit, exit_of_job
from client.scene import Scene
from client.shapes import Job
from client.views import View, view_for

INTERVAL = 1.0
BACKLOG = 2000
"""Log intervals of the curve that are fetched at the start; a sparkline needs no more."""

IMPATIENT = Patience(seconds=0.0)
"""The loop itself is the patience, and the picture goes on while the service is away."""


@dataclass(frozen=True)
class Clock:
    """Time, so that tests need none."""

    monotonic: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep

    def now(self) -> datetime:
        """The time of day."""
        return datetime.now(UTC)


def watch(args: argparse.Namespace, console: Console) -> int:
    """`trainyard watch`."""
    with Trainyard(args.url, args.token) as trainyard:
        job_id = trainyard.find(args.job)["id"]
    return follow_job(job_id, args, console, handle=args.job)


def follow_job(job_id: str, args: argparse.Namespace, console: Console, handle: str) -> int:
    """Follow over a connection that does not wait for itself."""
    with Trainyard(args.url, args.token, timeout=5.0, patience=IMPATIENT) as trainyard:
        return follow(Watcher(trainyard, job_id, handle), args, console, Clock())


def follow(watcher: "Watcher", args: argparse.Namespace, console: Console, clock: Clock) -> int:
    """Show the run until its end; the exit code says how it ended."""
    handle = watcher.scene.handle
    view = view_for(console, args.json)
    try:
        scene, code = look_until_rest(watcher, view, clock, args.timeout)
    except KeyboardInterrupt:
        view.close()
        console.say(f"Detached. Job continues. Re-attach: trainyard watch {shlex.quote(handle)}")
        return Exit.DETACHED
    finally:
        view.close()
    if code == Exit.TIMED_OUT:
        console.say(f"{args.timeout:g} s passed. Job continues. Re-attach: trainyard watch {shlex.quote(handle)}")
    else:
        for line in ending(scene.job, handle):
            console.say(line)
    return code


def look_until_rest(watcher: "Watcher", view: View, clock: Clock, timeout: float | None) -> tuple[Scene, Exit]:
    """The loop: look, show, decide, sleep. Only ``timeout`` seconds bound it."""
    deadline = None if timeout is None else clock.monotonic() + timeout
    while True:
        scene = watcher.look(clock.now())
        view.show(scene, clock.now())
        code = exit_of_job(scene.job) if scene.job and scene.lost is None else None
        if code is not None:
            return scene, code
        if deadline is not None and clock.monotonic() >= deadline:
            return scene, Exit.TIMED_OUT
        clock.sleep(INTERVAL if deadline is None else min(INTERVAL, max(0.0, deadline - clock.monotonic())))


class Watcher:
    """Asks the service and keeps the scene. An answer that does not come leaves the scene as it was."""

    def __init__(self, trainyard: Trainyard, job_id: str, handle: str) -> None:
        self._trainyard = trainyard
        self._job_id = job_id
        self.scene = Scene(handle=handle, url=trainyard.url)

    def look(self, now: datetime) -> Scene:
        """One look. Raises Refused where the service says no: the job is gone, or the token is."""
        scene = self.scene
        scene.fresh = []
        try:
            self._update(self._trainyard.job(self._job_id))
            scene.seen_at, scene.lost = now, None
        except ServiceUnreachable as error:
            scene.lost = error.cause
        except Refused as error:
            if error.status < 500:
                raise
            scene.lost = error.detail
        return scene

    def _update(self, job: Job) -> None:
        scene = self.scene
        if not scene.job:
            start = _start_of_backlog(job)
        else:
            start = self._after_restart(job) if job.get("attempt") != scene.job.get("attempt") else scene.curve.step
        scene.fresh = list(self._trainyard.metrics(self._job_id, after_step=start))
        scene.curve.extend(scene.fresh)
        scene.job = job

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
