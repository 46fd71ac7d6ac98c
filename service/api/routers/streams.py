"""Routes that stream metrics and logs as server-sent events. A client can reconnect without losing any."""

from typing import Annotated, Any

from fastapi import APIRouter, Header, Query
from fastapi.responses import Response

from trainyard.contract.parsing import Problem
from trainyard.contract.rundir import RunDir
from trainyard.service.api.dependencies import StateDep
from trainyard.service.api.responses import ServiceRoute
from trainyard.service.api.routers.logs import AGENT, validate_rank
from trainyard.service.auth.permissions import READ
from trainyard.service.errors import RequestInvalid, with_problems
from trainyard.service.streams import subscribers
from trainyard.service.streams.sse import Cursor, SseResponse, parse_last_event_id

MAX_OFFSET = 2**53 - 1
DEFAULT_TAIL = 200
LastEventId = Annotated[str | None, Header(max_length=100)]
EVENT_STREAM: dict[int | str, dict[str, Any]] = {
    200: {"content": {"text/event-stream": {"schema": {"type": "string"}}}}
}

router = APIRouter(prefix="/jobs/{job_id}", dependencies=[READ], route_class=ServiceRoute)


@router.get("/metrics/stream", tags=["metrics"], response_class=Response, responses=EVENT_STREAM)
async def stream_metrics(
    state: StateDep,
    job_id: str,
    last_event_id: LastEventId = None,
    after_step: Annotated[int, Query(ge=0, le=MAX_OFFSET)] = 0,
) -> SseResponse:
    """Stream `metric` events: the points after `after_step` or `Last-Event-ID` so far, then each new point.

    An `attempt` event means that another attempt continues from `start_step`: discard the points after it. `end` comes
    when the job has succeeded, failed or was cancelled. A comment is sent every 15 s. A client that does not read is
    disconnected.
    """
    since = _parse_cursor(last_event_id)
    channel = await state.broadcaster.open(job_id)
    frames = subscribers.metrics(state.broadcaster, channel, since, after_step)
    return SseResponse(frames, lambda: state.broadcaster.close(channel))


@router.get("/logs/stream", tags=["logs"], response_class=Response, responses=EVENT_STREAM)
async def stream_log(
    state: StateDep,
    job_id: str,
    last_event_id: LastEventId = None,
    attempt: Annotated[int | None, Query(ge=1, le=MAX_OFFSET)] = None,
    rank: Annotated[str, Query(max_length=20)] = "0",
    tail: Annotated[int | None, Query(ge=1, le=100_000)] = None,
    offset: Annotated[int | None, Query(ge=0, le=MAX_OFFSET)] = None,
) -> SseResponse:
    """Stream `log` events `{attempt, offset, data, next_offset}`: from `offset` or the last `tail` lines on.

    Without `attempt`, the log of a new attempt follows the previous one. `end` comes when no more data can follow.
    """
    validate_rank(rank, tail, offset)
    since = _parse_cursor(last_event_id)
    channel = await state.broadcaster.open(job_id)
    cursor = subscribers.LogCursor(
        attempt=since[0] if since else attempt or channel.latest.attempt,
        rank=None if rank == AGENT else int(rank),
        offset=since[1] if since else offset,
        tail=tail or DEFAULT_TAIL,
        fixed=attempt is not None,
    )
    run = RunDir(state.settings.runs / channel.job_id)
    frames = subscribers.logs(state.broadcaster, channel, run, cursor)
    return SseResponse(frames, lambda: state.broadcaster.close(channel))


def _parse_cursor(last_event_id: str | None) -> Cursor | None:
    if not last_event_id:
        return None
    cursor = parse_last_event_id(last_event_id)
    if cursor is None:
        raise with_problems(RequestInvalid, [Problem("/header/Last-Event-ID", "must be the id of an event")])
    return cursor
