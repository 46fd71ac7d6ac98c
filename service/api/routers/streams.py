"""GET /jobs/{id}/metrics/stream and /logs/stream: server-sent events that a reader can take up again."""

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
EVENT_STREAM: dict[int | str, dict[str, Any]] = {200: {"content": {"text/event-stream": {"schema": {"type": "string"}}}}}

router = APIRouter(prefix="/jobs/{job_id}", tags=["streams"], dependencies=[READ], route_class=ServiceRoute)


@router.get("/metrics/stream", response_class=Response, responses=EVENT_STREAM)
async def metric_stream(
    services: StateDep,
    job_id: str,
    last_event_id: LastEventId = None,
    after_step: Annotated[int, Query(ge=0, le=MAX_OFFSET)] = 0,
) -> SseResponse:
    """`metric` events: the curve so far behind `after_step`, or behind `Last-Event-ID`, then each point as it comes.

    `attempt` says that another attempt goes on from `start_step`: points behind that are void. `end` comes when the job
    has succeeded, failed or was cancelled. A comment comes every 15 s. Who does not read is dropped.
    """
    since = _cursor(last_event_id)
    channel = await services.broadcaster.open(job_id)
    pieces = subscribers.metrics(services.broadcaster, channel, since, after_step)
    return SseResponse(pieces, lambda: services.broadcaster.close(channel))


@router.get("/logs/stream", response_class=Response, responses=EVENT_STREAM)
async def log_stream(
    services: StateDep,
    job_id: str,
    last_event_id: LastEventId = None,
    attempt: Annotated[int | None, Query(ge=1, le=MAX_OFFSET)] = None,
    rank: Annotated[str, Query(max_length=20)] = "0",
    tail: Annotated[int | None, Query(ge=1, le=100_000)] = None,
    offset: Annotated[int | None, Query(ge=0, le=MAX_OFFSET)] = None,
) -> SseResponse:
    """`log` events `{attempt, offset, data, next_offset}`: from `offset` or the last `tail` lines, and what comes.

    Without `attempt` a new attempt's log follows the one before. `end` comes when nothing more can.
    """
    validate_rank(rank, tail, offset)
    since = _cursor(last_event_id)
    channel = await services.broadcaster.open(job_id)
    place = subscribers.LogCursor(
        attempt=since[0] if since else attempt or channel.news.attempt,
        rank=None if rank == AGENT else int(rank),
        offset=since[1] if since else offset,
        tail=tail or DEFAULT_TAIL,
        fixed=attempt is not None,
    )
    run = RunDir(services.settings.runs / channel.job_id)
    pieces = subscribers.logs(services.broadcaster, channel, run, place)
    return SseResponse(pieces, lambda: services.broadcaster.close(channel))


def _cursor(last_event_id: str | None) -> Cursor | None:
    if not last_event_id:
        return None
    place = parse_last_event_id(last_event_id)
    if place is None:
        raise with_problems(RequestInvalid, [Problem("/header/Last-Event-ID", "must be the id of an event")])
    return place
