"""What one reader of a stream gets, piece by piece. An empty piece says that nothing came for a while."""

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
    pulse: MetricBroadcaster, channel: Channel, since: Cursor | None, after_step: int
) -> AsyncGenerator[bytes, None]:
    """Every point behind ``since``, then each as it comes, then the end where the job has one.

    Where another attempt goes on, an event says from which step: what was sent of earlier ones behind it is void.
    ``after_step`` leaves out points of the past.
    """
    past = channel.position
    place = since or START
    attempt = place[0]
    while not pulse.stopping:
        if place >= channel.position:
            if channel.latest.ended:
                yield _end_event(channel)
                return
            await channel.wait(POLL_SECONDS)
            yield b""
            continue
        reached = channel.position
        frames = await _frames_after(pulse, channel, place, past, after_step)
        # None: all that was said behind us up to there does not count any more.
        place = frames[-1].cursor if frames else reached
        for start in range(0, len(frames), FRAMES_PER_CHUNK):
            piece = frames[start : start + FRAMES_PER_CHUNK]
            yield b"".join(_with_attempt_events(channel, piece, attempt))
            attempt = piece[-1].cursor[0]


async def _frames_after(
    pulse: MetricBroadcaster, channel: Channel, place: Cursor, past: Cursor, after_step: int
) -> Sequence[SseFrame]:
    """What comes behind ``place``: from the shared tail where that reaches back so far."""
    if place < channel.floor:
        return await pulse.frames_after(channel.job_id, place, past, after_step)
    behind = (frame for frame in channel.tail if frame.cursor > place)
    return [frame for frame in behind if frame.step > after_step or frame.cursor > past]


def _with_attempt_events(channel: Channel, frames: Sequence[SseFrame], attempt: int) -> list[bytes]:
    pieces = []
    for frame in frames:
        number = frame.cursor[0]
        if attempt not in (0, number):
            start = channel.latest.starts.get(number, 0)
            pieces.append(event("attempt", {"attempt": number, "start_step": start}))
        attempt = number
        pieces.append(frame.data)
    return pieces


def _end_event(channel: Channel) -> bytes:
    return event("end", {"status": channel.latest.status})


@dataclass(frozen=True)
class LogCursor:
    """Where in which log. ``fixed``: only this attempt, else a new one's log follows. ``rank`` None: the agent's."""

    attempt: int
    rank: int | None
    offset: int | None
    tail: int
    fixed: bool


async def logs(
    pulse: MetricBroadcaster, channel: Channel, run: RunDir, place: LogCursor
) -> AsyncGenerator[bytes, None]:
    """The log from ``place`` on, as it is written, then the end where nothing more can come."""
    while not pulse.stopping:
        # Before the file: what was written before the end is read after it.
        newest, ended = channel.latest.attempt, channel.latest.ended
        begin, text, following = await _read_log(pulse, run, place, last=ended)
        place = replace(place, offset=following)
        if text:
            said = {"attempt": place.attempt, "offset": begin, "data": text, "next_offset": following}
            yield event("log", said, (place.attempt, following or 0))
        elif not place.fixed and newest > place.attempt:
            place = replace(place, attempt=newest, offset=0)
        elif ended or newest > place.attempt:
            yield _end_event(channel)
            return
        else:
            await channel.wait(POLL_SECONDS)
            yield b""


async def _read_log(
    pulse: MetricBroadcaster, run: RunDir, place: LogCursor, last: bool
) -> tuple[int | None, str, int | None]:
    """(where it begins, the text, where to go on); no text where there is none, or no file yet."""
    if place.attempt < 1:
        return place.offset, "", place.offset
    file = log_file(run.attempt(place.attempt), place.rank)

    def read() -> tuple[int | None, str, int | None]:
        try:
            begin = place.offset if place.offset is not None else start_of_tail(file, place.tail, LOG_CHUNK)
            return begin, *read_growing(file, begin, LOG_CHUNK, last)
        except LogNotFound:
            return place.offset, "", place.offset

    return await pulse.run(read)
