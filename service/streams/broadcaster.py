"""One look at the database a beat, for all readers of all streams together.

Readers at the front of a curve share its newest events, made into bytes once; who is behind reads for himself. What is
held is bounded: a short tail for each job that is watched.
"""

import asyncio
import contextlib
import logging
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TypeVar

from sqlalchemy import select
from sqlalchemy.orm import Session

from trainyard.contract.status import TERMINAL, JobStatus
from trainyard.service.db.engine import Database
from trainyard.service.db.models import AttemptRow, JobRow
from trainyard.service.errors import NotReady, TooManyStreams
from trainyard.service.jobs import repository as jobs
from trainyard.service.metrics import store
from trainyard.service.streams.sse import Cursor, event

POLL_SECONDS = 0.5
MIN_POLL_SECONDS = 0.25
"""Between two looks, where this process itself stores what readers wait for and says so. Each wakes all of them."""

MAX_TAIL = 256
"""Newest events of a job that are kept for its readers."""

MAX_FRAMES = 500
"""Events that one look reads of one job."""

MAX_READERS = 1000
THREADS = 4

T = TypeVar("T")

log = logging.getLogger("trainyard")


@dataclass(frozen=True)
class SseFrame:
    """A metric, ready to be sent."""

    cursor: Cursor
    step: int
    data: bytes


@dataclass(frozen=True)
class PollResult:
    """What one look found of a job. ``status`` None: the job is gone. ``words`` counts what its attempts have said."""

    status: JobStatus | None
    attempt: int
    acked_lines: int
    starts: Mapping[int, int]
    frames: tuple[SseFrame, ...]

    @property
    def ended(self) -> bool:
        """Whether no more will come, and nothing is left to be read."""
        rests = self.status is None or self.status in TERMINAL
        return rests and len(self.frames) < MAX_FRAMES


@dataclass
class Channel:
    """What all readers of one job share. ``tail`` holds every event behind ``floor``, up to ``position``."""

    job_id: str
    latest: PollResult
    position: Cursor
    floor: Cursor
    tail: deque[SseFrame] = field(default_factory=deque)
    readers: int = 0
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    def update(self, news: PollResult) -> None:
        """Take in what is new, and wake the readers where anything is."""
        same = (news.status, news.attempt, news.ended) == (self.latest.status, self.latest.attempt, self.latest.ended)
        self.latest = news
        for frame in news.frames:
            self.tail.append(frame)
            self.position = frame.cursor
            if len(self.tail) > MAX_TAIL:
                self.floor = self.tail.popleft().cursor
        if news.frames or not same:
            self.wake()

    def wake(self) -> None:
        """Wake every reader."""
        changed, self.changed = self.changed, asyncio.Event()
        changed.set()

    async def wait(self, seconds: float) -> None:
        """Until something changes, or ``seconds`` are over."""
        await wait_for(seconds, self.changed)


class MetricBroadcaster:
    """Channels by job, and the task that looks for all of them. All but `stop` belong to the event loop's thread."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._channels: dict[str, Channel] = {}
        # Threads of our own: readers of streams never take those that answer requests.
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="streams")
        self._task: asyncio.Task[None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._notified = asyncio.Event()
        self.stopping = False

    @property
    def readers(self) -> int:
        """Streams that are open."""
        return sum(channel.readers for channel in self._channels.values())

    async def run(self, work: Callable[[], T]) -> T:
        """Do ``work``, which blocks, in a thread."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)

    async def open(self, job_id: str) -> Channel:
        """The job's channel, with one reader more. Raises JobNotFound and TooManyStreams."""
        if self.stopping:
            raise NotReady("The service is ending.")
        if self.readers >= MAX_READERS:
            raise TooManyStreams(headers={"Retry-After": "10"})
        channel = self._channels.get(job_id)
        if channel is None:
            news, position = await self.run(lambda: self._first_poll(job_id))
            # Another reader may have been faster while we looked.
            channel = self._channels.setdefault(job_id, Channel(job_id, news, position, position))
        channel.readers += 1
        self._loop = asyncio.get_running_loop()
        if self._task is None or self._task.done():
            self._notified = asyncio.Event()
            self._task = self._loop.create_task(self._poll_loop())
        return channel

    def close(self, channel: Channel) -> None:
        """One reader less; the last one takes the channel along."""
        channel.readers -= 1
        if channel.readers <= 0 and self._channels.get(channel.job_id) is channel:
            del self._channels[channel.job_id]

    def notify(self, job_id: str) -> None:
        """Something that the job's readers wait for was stored by this process. From any thread."""
        loop = self._loop
        if job_id in self._channels and loop is not None and not loop.is_closed():
            loop.call_soon_threadsafe(self._notified.set)

    def stop(self) -> None:
        """End all streams soon; their readers will come back to our successor. From any thread, more than once."""
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
                found = await self.run(lambda known=known: self._poll(known))  # type: ignore[misc] # bound at once
            except Exception as error:
                # The database is away: readers wait, and are told that we are still here.
                log.warning("streams could not look: %s", type(error).__name__)
                found = {}
            for job_id, news in found.items():
                if job_id in self._channels:
                    self._channels[job_id].update(news)
            full = any(len(news.frames) == MAX_FRAMES for news in found.values())
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
        words = dict.fromkeys(ids, 0)
        for job_id, number, start, acked in session.execute(select(*attempts).where(AttemptRow.job_id.in_(ids))):
            starts[job_id][number] = start or 0
            words[job_id] += acked
        found = {}
        for job_id in ids:
            position, before = known[job_id]
            frames = self._read_frames(session, job_id, position) if words[job_id] != before else ()
            state = states.get(job_id)
            status, attempt = (JobStatus(state.status), state.attempt) if state is not None else (None, 0)
            # A full look left some behind: what was said is then not all known.
            said = words[job_id] if len(frames) < MAX_FRAMES else -1
            found[job_id] = PollResult(status, attempt, said, starts[job_id], frames)
        return found

    def _read_frames(self, session: Session, job_id: str, behind: Cursor) -> tuple[SseFrame, ...]:
        return tuple(to_frame(row) for row in store.rows_after(session, job_id, behind, MAX_FRAMES))

    async def frames_after(self, job_id: str, behind: Cursor, past: Cursor, after_step: int) -> tuple[SseFrame, ...]:
        """For a reader that is too far behind for the tail. Up to ``past`` only what is behind ``after_step``."""

        def read() -> tuple[SseFrame, ...]:
            with self._database.read() as session:
                rows = store.rows_after(session, job_id, behind, MAX_FRAMES, past, after_step)
                return tuple(map(to_frame, rows))

        return await self.run(read)


async def wait_for(seconds: float, awaited: asyncio.Event) -> None:
    """Wait for ``awaited``, but not longer."""
    # `asyncio.wait_for` would make a task of each wait, and there is one for each reader.
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await awaited.wait()


def to_frame(row: dict[str, object]) -> SseFrame:
    """A stored point as an event."""
    seq, attempt, step = row.pop("seq"), row["attempt"], row["step"]
    assert isinstance(seq, int)
    assert isinstance(attempt, int)
    assert isinstance(step, int)
    return SseFrame((attempt, seq), step, event("metric", row, (attempt, seq)))
