"""Poll the database once for all readers of all streams, and share what is new.

Readers that are up to date share the newest events of a job, encoded once; one that is far behind queries for itself.
Memory is bounded: a short tail for each job with readers.
"""

import asyncio
import contextlib
import logging
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

from sqlalchemy import select
from sqlalchemy.orm import Session

from trainyard.contract.status import TERMINAL, JobStatus
from trainyard.service.db.engine import Database
from trainyard.service.db.models import AttemptRow, JobRow
from trainyard.service.descriptors import max_streams
from trainyard.service.errors import NotReady, TooManyStreams
from trainyard.service.jobs import repository as jobs
from trainyard.service.metrics import store
from trainyard.service.streams.sse import Cursor, event

POLL_SECONDS = 0.5
MIN_POLL_SECONDS = 0.25
"""Minimum time between two polls, also after `notify`: each poll wakes all readers."""

MAX_TAIL = 256
"""Newest events of a job kept for its readers."""

MAX_FRAMES = 500
"""Events that one poll reads of one job."""

THREADS = 4

T = TypeVar("T")

log = logging.getLogger("trainyard")


@dataclass(frozen=True)
class SseFrame:
    """A metric, encoded for sending."""

    cursor: Cursor
    step: int
    data: bytes


@dataclass(frozen=True)
class PollResult:
    """A job at one poll. ``status`` None: it was deleted. ``starts``: attempt -> its start step.

    ``acked_lines``: the lines that all its attempts have reported; -1: a full poll, and more frames are to be read.
    """

    status: JobStatus | None
    attempt: int
    acked_lines: int
    starts: Mapping[int, int]
    frames: tuple[SseFrame, ...]

    @property
    def ended(self) -> bool:
        """True if no more events will come and all were read."""
        over = self.status is None or self.status in TERMINAL
        return over and len(self.frames) < MAX_FRAMES


@dataclass
class Channel:
    """What all readers of one job share. ``tail`` has every event after ``floor`` up to ``position``."""

    job_id: str
    latest: PollResult
    position: Cursor
    floor: Cursor
    tail: deque[SseFrame] = field(default_factory=deque)
    readers: int = 0
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    def update(self, result: PollResult) -> None:
        """Store the result of a poll, and wake the readers if it has anything new."""
        before, self.latest = self.latest, result
        for frame in result.frames:
            self.tail.append(frame)
            self.position = frame.cursor
            if len(self.tail) > MAX_TAIL:
                self.floor = self.tail.popleft().cursor
        changed = (result.status, result.attempt, result.ended) != (before.status, before.attempt, before.ended)
        if result.frames or changed:
            self.wake()

    def wake(self) -> None:
        """Wake every reader."""
        changed, self.changed = self.changed, asyncio.Event()
        changed.set()

    async def wait(self, seconds: float) -> None:
        """Wait until something changes, at most ``seconds``."""
        await wait_for(seconds, self.changed)


class MetricBroadcaster:
    """The channels of all jobs with readers, and the task that polls for them.

    Call all but `notify` and `stop` in the event loop's thread.
    """

    def __init__(self, database: Database) -> None:
        self._database = database
        self._channels: dict[str, Channel] = {}
        self._opening = 0
        # A pool of its own: streams must not use up the threads that serve requests.
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="streams")
        self._task: asyncio.Task[None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._notified = asyncio.Event()
        self.stopping = False

    @property
    def readers(self) -> int:
        """The number of open streams."""
        return sum(channel.readers for channel in self._channels.values())

    async def run(self, work: Callable[[], T]) -> T:
        """Run ``work``, which blocks, in a thread."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)

    async def open(self, job_id: str) -> Channel:
        """Add a reader to the job's channel and return it. Raises JobNotFound, TooManyStreams or NotReady."""
        if self.stopping:
            raise NotReady("The service is ending.")
        if self.readers + self._opening >= max_streams():
            raise TooManyStreams(headers={"Retry-After": "10"})
        channel = self._channels.get(job_id)
        if channel is None:
            self._opening += 1
            try:
                result, position = await self.run(lambda: self._first_poll(job_id))
            finally:
                self._opening -= 1
            # Another reader may have opened the channel during the await.
            channel = self._channels.setdefault(job_id, Channel(job_id, result, position, position))
        channel.readers += 1
        self._loop = asyncio.get_running_loop()
        if self._task is None or self._task.done():
            self._notified = asyncio.Event()
            self._task = self._loop.create_task(self._poll_loop())
        return channel

    def close(self, channel: Channel) -> None:
        """Remove a reader from the channel; delete the channel after its last one."""
        channel.readers -= 1
        if channel.readers <= 0 and self._channels.get(channel.job_id) is channel:
            del self._channels[channel.job_id]

    def notify(self, job_id: str) -> None:
        """Poll soon, because this process has stored something for the job's readers. Thread-safe."""
        loop = self._loop
        if job_id in self._channels and loop is not None and not loop.is_closed():
            loop.call_soon_threadsafe(self._notified.set)

    def stop(self) -> None:
        """End all streams soon; their readers reconnect to the next process. Thread-safe and idempotent."""
        self.stopping = True
        loop = self._loop
        if loop is not None and not loop.is_closed():
            loop.call_soon_threadsafe(self._wake_all)
        self._threads.shutdown(wait=False)

    def _wake_all(self) -> None:
        for channel in self._channels.values():
            channel.wake()

    async def _poll_loop(self) -> None:
        while self._channels and not self.stopping:
            known = {job_id: (c.position, c.latest.acked_lines) for job_id, c in self._channels.items()}
            try:
                results = await self.run(lambda known=known: self._poll(known))  # type: ignore[misc] # bound at once
            except Exception as error:
                # The database is unavailable: readers wait, and get keep-alive comments.
                log.warning("streams could not read the database: %s", type(error).__name__)
                results = {}
            for job_id, result in results.items():
                if job_id in self._channels:
                    self._channels[job_id].update(result)
            full = any(len(result.frames) == MAX_FRAMES for result in results.values())
            await asyncio.sleep(0 if full else MIN_POLL_SECONDS)
            await wait_for(0 if full else POLL_SECONDS - MIN_POLL_SECONDS, self._notified)
            self._notified.clear()

    def _first_poll(self, job_id: str) -> tuple[PollResult, Cursor]:
        with self._database.read() as session:
            jobs.find(session, job_id)
            newest = store.newest_cursor(session, job_id)
            return self._read_jobs(session, [job_id], {job_id: (newest, -1)})[job_id], newest

    def _poll(self, known: Mapping[str, tuple[Cursor, int]]) -> dict[str, PollResult]:
        with self._database.read() as session:
            return self._read_jobs(session, list(known), known)

    def _read_jobs(
        self, session: Session, ids: list[str], known: Mapping[str, tuple[Cursor, int]]
    ) -> dict[str, PollResult]:
        columns = (JobRow.id, JobRow.status, JobRow.attempt)
        states = {row.id: row for row in session.execute(select(*columns).where(JobRow.id.in_(ids)))}
        attempts = (AttemptRow.job_id, AttemptRow.number, AttemptRow.start_step, AttemptRow.acked_seq)
        starts: dict[str, dict[int, int]] = {job_id: {} for job_id in ids}
        acked_lines = dict.fromkeys(ids, 0)
        for job_id, number, start, acked in session.execute(select(*attempts).where(AttemptRow.job_id.in_(ids))):
            starts[job_id][number] = start or 0
            acked_lines[job_id] += acked
        results = {}
        for job_id in ids:
            position, before = known[job_id]
            frames: tuple[SseFrame, ...] = ()
            if acked_lines[job_id] != before:
                frames = tuple(map(to_frame, store.rows_after(session, job_id, position, MAX_FRAMES)))
            state = states.get(job_id)
            status, attempt = (JobStatus(state.status), state.attempt) if state is not None else (None, 0)
            # After a full poll more frames may be left: -1 makes the next poll read on.
            acked = acked_lines[job_id] if len(frames) < MAX_FRAMES else -1
            results[job_id] = PollResult(status, attempt, acked, starts[job_id], frames)
        return results

    async def frames_after(self, job_id: str, cursor: Cursor, past: Cursor, after_step: int) -> tuple[SseFrame, ...]:
        """Read frames that are no longer in the tail; up to ``past`` only those after ``after_step``."""

        def read() -> tuple[SseFrame, ...]:
            with self._database.read() as session:
                rows = store.rows_after(session, job_id, cursor, MAX_FRAMES, past, after_step)
                return tuple(map(to_frame, rows))

        return await self.run(read)


async def wait_for(seconds: float, awaited: asyncio.Event) -> None:
    """Wait for ``awaited``, at most ``seconds``."""
    # `asyncio.wait_for` would create a task for each wait of each reader.
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await awaited.wait()


def to_frame(row: dict[str, Any]) -> SseFrame:
    """Return a stored point as a frame. Removes ``seq`` from ``row``."""
    cursor = row["attempt"], row.pop("seq")
    return SseFrame(cursor, row["step"], event("metric", row, cursor))
