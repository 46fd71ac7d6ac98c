"""GET /jobs/{id}/metrics/stream and /logs/stream: server-sent events that a reader can take up again."""

from typing import Annotated, Any

from fastapi import APIRouter, Header, Query
from fastapi.responses import Response

from trainyard.contract.parsing import Problem
from trainyard.contract.rundir import RunDir
from trainyard.service.api.dependencies import ServicesNeeded
from trainyard.service.api.responses import ServiceRoute
from trainyard.service.api.routers.logs import AGENT, require_good
from trainyard.service.auth.permissions import READ
from trainyard.service.errors import RequestInvalid, with_problems
from trainyard.service.streams import subscribers
from trainyard.service.streams.sse import EventStream, Place, place_of

LARGEST = 2**53 - 1
DEFAULT_TAIL = 200
LastEventId = Annotated[str | None, Header(max_length=100)]
DESCRIBED: dict[int | str, dict[str, Any]] = {200: {"content": {"text/event-stream": {"schema": {"type": "string"}}}}}

router = APIRouter(prefix="/jobs/{job_id}", tags=["streams"], dependencies=[READ], route_class=ServiceRoute)


@router.get("/metrics/stream", response_class=Response, responses=DESCRIBED)
async def metric_stream(
    services: ServicesNeeded,
    job_id: str,
    last_event_id: LastEventId = None,
    after_step: Annotated[int, Query(ge=0, le=LARGEST)] = 0,
) -> EventStream:
    """`metric` events: the curve so far behind `after_step`, or behind `Last-Event-ID`, then each point as it comes.

    `attempt` says that another attempt goes on from `start_step`: points behind that are void. `end` comes when the job
    has succeeded, failed or was cancelled. A comment comes every 15 s. Who does not read is dropped.
    """
    since = _place(last_event_id)
    channel = await services.pulse.open(job_id)
    pieces = subscribers.metrics(services.pulse, channel, since, after_step)
    return EventStream(pieces, lambda: services.pulse.close(channel))


@router.get("/logs/stream", response_class=Response, responses=DESCRIBED)
async def log_stream(
    services: ServicesNeeded,
    job_id: str,
    last_event_id: LastEventId = None,
    attempt: Annotated[int | None, Query(ge=1, le=LARGEST)] = None,
    rank: Annotated[str, Query(max_length=20)] = "0",
    tail: Annotated[int | None, Query(ge=1, le=100_000)] = None,
    offset: Annotated[int | None, Query(ge=0, le=LARGEST)] = None,
) -> EventStream:
    """`log` events `{attempt, offset, data, next_offset}`: from `offset` or the last `tail` lines, and what comes.

    Without `attempt` a new attempt's log follows the one before. `end` comes when nothing more can.
    """
    require_good(rank, tail, offset)
    since = _place(last_event_id)
    channel = await services.pulse.open(job_id)
    place = subscribers.LogPlace(
        attempt=since[0] if since else attempt or channel.news.attempt,
        rank=None if rank == AGENT else int(rank),
        offset=since[1] if since else offset,
        tail=tail or DEFAULT_TAIL,
        fixed=attempt is not None,
    )
    run = RunDir(services.settings.runs / channel.job_id)
    pieces = subscribers.logs(services.pulse, channel, run, place)
    return EventStream(pieces, lambda: services.pulse.close(channel))


def _place(last_event_id: str | None) -> Place | None:
    if not last_event_id:
        return None
    place = place_of(last_event_id)
    if place is None:
        raise with_problems(RequestInvalid, [Problem("/header/Last-Event-ID", "must be the id of an event")])
    return place
