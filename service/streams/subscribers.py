"""The chunks that one reader of a stream gets. An empty chunk means that nothing came for a while."""

from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, replace

from trainyard.contract.rundir import RunDir
from trainyard.service.errors import LogNotFound
from trainyard.service.logs.reader import log_file, read_growing, start_of_tail
from trainyard.service.streams.broadcaster import Channel, MetricBroadcaster, SseFrame
from trainyard.service.streams.sse import Cursor, event

POLL_SECONDS = 0.5
FRAMES_PER_CHUNK = 64
LOG_CHUNK = 64 << 10
START: Cursor = (0, 0)


async def metrics(
    broadcaster: MetricBroadcaster, channel: Channel, since: Cursor | None, after_step: int
) -> AsyncGenerator[bytes, None]:
    """Yield every point after ``since``, then each new one, then an ``end`` event once the job is over.

    Before the first point of another attempt, an ``attempt`` event has its start step: earlier attempts' points after
    that step are void. Of the points that exist now, only those after ``after_step`` are sent.
    """
    past = channel.position
    cursor = since or START
    attempt = cursor[0]
    while not broadcaster.stopping:
        if cursor >= channel.position:
            if channel.latest.ended:
                yield _end_event(channel)
                return
            await channel.wait(POLL_SECONDS)
            yield b""
            continue
        reached = channel.position
        frames = await _frames_after(broadcaster, channel, cursor, past, after_step)
        # No frames: the points in between have been superseded.
        cursor = frames[-1].cursor if frames else reached
        for start in range(0, len(frames), FRAMES_PER_CHUNK):
            chunk = frames[start : start + FRAMES_PER_CHUNK]
            yield b"".join(_with_attempt_events(channel, chunk, attempt))
            attempt = chunk[-1].cursor[0]


async def _frames_after(
    broadcaster: MetricBroadcaster, channel: Channel, cursor: Cursor, past: Cursor, after_step: int
) -> Sequence[SseFrame]:
    # From the shared tail if it reaches back far enough.
    if cursor < channel.floor:
        return await broadcaster.frames_after(channel.job_id, cursor, past, after_step)
    following = (frame for frame in channel.tail if frame.cursor > cursor)
    return [frame for frame in following if frame.step > after_step or frame.cursor > past]


def _with_attempt_events(channel: Channel, frames: Sequence[SseFrame], attempt: int) -> list[bytes]:
    events = []
    for frame in frames:
        number = frame.cursor[0]
        if attempt not in (0, number):
            start = channel.latest.starts.get(number, 0)
            events.append(event("attempt", {"attempt": number, "start_step": start}))
        attempt = number
        events.append(frame.data)
    return events


def _end_event(channel: Channel) -> bytes:
    return event("end", {"status": channel.latest.status})


@dataclass(frozen=True)
class LogCursor:
    """A position in a log. ``rank`` None: the agent's log. ``offset`` None: its last ``tail`` lines.

    ``fixed``: only this attempt; otherwise the logs of later attempts follow.
    """

    attempt: int
    rank: int | None
    offset: int | None
    tail: int
    fixed: bool


async def logs(
    broadcaster: MetricBroadcaster, channel: Channel, run: RunDir, cursor: LogCursor
) -> AsyncGenerator[bytes, None]:
    """Yield the log from ``cursor`` on as it is written, then an ``end`` event once nothing more can come."""
    while not broadcaster.stopping:
        # Read the state before the file, so that everything written before the end is sent.
        newest, ended = channel.latest.attempt, channel.latest.ended
        begin, text, next_offset = await _read_log(broadcaster, run, cursor, last=ended)
        cursor = replace(cursor, offset=next_offset)
        if text:
            data = {"attempt": cursor.attempt, "offset": begin, "data": text, "next_offset": next_offset}
            yield event("log", data, (cursor.attempt, next_offset or 0))
        elif not cursor.fixed and newest > cursor.attempt:
            cursor = replace(cursor, attempt=newest, offset=0)
        elif ended or newest > cursor.attempt:
            yield _end_event(channel)
            return
        else:
            await channel.wait(POLL_SECONDS)
            yield b""


async def _read_log(
    broadcaster: MetricBroadcaster, run: RunDir, cursor: LogCursor, last: bool
) -> tuple[int | None, str, int | None]:
    """Return (offset of the text, the text, next offset); the text is empty if there is none yet."""
    if cursor.attempt < 1:
        return cursor.offset, "", cursor.offset
    file = log_file(run.attempt(cursor.attempt), cursor.rank)

    def read() -> tuple[int | None, str, int | None]:
        try:
            begin = cursor.offset if cursor.offset is not None else start_of_tail(file, cursor.tail, LOG_CHUNK)
            return begin, *read_growing(file, begin, LOG_CHUNK, last)
        except LogNotFound:
            return cursor.offset, "", cursor.offset

    return await broadcaster.run(read)
