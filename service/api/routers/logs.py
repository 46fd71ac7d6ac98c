"""Routes that read a log by bytes or by line numbers, and search in it."""

import re
from pathlib import Path
from typing import Annotated

from fastapi import APIRouter, Query

from trainyard.contract.parsing import Problem
from trainyard.contract.patterns import ONE_LINE
from trainyard.contract.rundir import RunDir
from trainyard.service.api.dependencies import AppState, StateDep
from trainyard.service.api.responses import ServiceRoute
from trainyard.service.auth.permissions import READ
from trainyard.service.errors import LogNotFound, RequestInvalid, with_problems
from trainyard.service.jobs import queries
from trainyard.service.logs import reader
from trainyard.service.schemas import LogChunk, LogLines, LogMatch, LogMatches

AGENT = "agent"
RANK = re.compile(r"[0-9]{1,6}")
MAX_BYTES = 2**53 - 1

Attempt = Annotated[int | None, Query(ge=1, le=MAX_BYTES)]
Rank = Annotated[str, Query(max_length=20)]
Place = Annotated[int, Query(ge=0, le=MAX_BYTES)]

router = APIRouter(prefix="/jobs/{job_id}/logs", tags=["logs"], dependencies=[READ], route_class=ServiceRoute)


@router.get("")
def read_log(
    state: StateDep,
    job_id: str,
    attempt: Attempt = None,
    rank: Rank = "0",
    tail: Annotated[int | None, Query(ge=1, le=100_000)] = None,
    offset: Annotated[int | None, Query(ge=0, le=MAX_BYTES)] = None,
    limit: Annotated[int, Query(ge=4, le=reader.MAX_CHUNK)] = 64 << 10,
) -> LogChunk:
    """Return a part of a rank's log, or with `rank=agent` of the agent's: the last `tail` lines, or from `offset` on.

    `limit` is in bytes. To continue, pass `next_offset` as `offset`: nothing is skipped or repeated.
    """
    validate_rank(rank, tail, offset)
    file = _file(state, job_id, attempt, rank)
    data, next_offset = (
        reader.read_from(file, offset, limit) if offset is not None else reader.read_tail(file, tail or 200, limit)
    )
    return LogChunk(data=data, next_offset=next_offset)


@router.get("/lines")
def read_log_lines(
    state: StateDep,
    job_id: str,
    attempt: Attempt = None,
    rank: Rank = "0",
    first: Annotated[int, Query(ge=1, le=MAX_BYTES)] = 1,
    count: Annotated[int, Query(ge=0, le=2000)] = 500,
) -> LogLines:
    """Return `count` lines from line `first` on (counted from 1), and the number of lines.

    A line over 4,096 bytes is truncated.
    """
    validate_rank(rank)
    lines, index = state.line_indexes.read(_file(state, job_id, attempt, rank), first, count)
    return LogLines(first_line=first, lines=lines, total_lines=index.total, bytes=index.size)


@router.get("/search")
def search_log(
    state: StateDep,
    job_id: str,
    q: Annotated[str, Query(min_length=1, max_length=200, pattern=ONE_LINE)],
    attempt: Attempt = None,
    rank: Rank = "0",
    after_line: Place = 0,
    limit: Annotated[int, Query(ge=1, le=1000)] = 200,
) -> LogMatches:
    """Return the lines that contain `q`, ignoring the case of ASCII letters.

    If `has_more`, continue with `after_line=searched_lines`. A request searches at most 256 MiB, and the first MiB of
    each line.
    """
    validate_rank(rank)
    found, searched, complete = state.line_indexes.search(_file(state, job_id, attempt, rank), q, after_line, limit)
    matches = [LogMatch(line=one.line, offset=one.offset, text=one.text) for one in found]
    return LogMatches(data=matches, has_more=not complete, searched_lines=searched)


def validate_rank(rank: str, tail: int | None = None, offset: int | None = None) -> None:
    """Raise RequestInvalid if ``rank`` is malformed, or both ``tail`` and ``offset`` are given."""
    if rank != AGENT and not RANK.fullmatch(rank):
        raise with_problems(RequestInvalid, [Problem("/query/rank", 'must be a rank\'s number, or "agent"')])
    if tail is not None and offset is not None:
        raise with_problems(RequestInvalid, [Problem("/query/offset", "cannot be given with tail")])


def _file(state: AppState, job_id: str, attempt: int | None, rank: str) -> Path:
    with state.database.connection() as connection:
        newest = queries.newest_attempt(connection, job_id)
    number = attempt or newest
    if newest == 0:
        raise LogNotFound("The job has no log yet: it has not started.")
    if not 1 <= number <= newest:
        raise LogNotFound(f"The job has no attempt of this number: its newest is {newest}.")
    directory = RunDir(state.settings.runs / job_id).attempt(number)
    return reader.log_file(directory, None if rank == AGENT else int(rank))
