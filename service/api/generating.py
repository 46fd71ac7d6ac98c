"""Shared by the routes that generate text: requests that end when their client disconnects, and streams."""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from pathlib import Path
from typing import Annotated, Any

from fastapi import Request, Response
from pydantic import BeforeValidator

from trainyard.contract.generation import Stops
from trainyard.service.api.dependencies import AppState
from trainyard.service.api.middleware import CLIENT_LEFT
from trainyard.service.db.models import JobRow
from trainyard.service.errors import DeviceReclaimed
from trainyard.service.generation.pool import Generation, LoadedCheckpoint
from trainyard.service.streams.sse import HELLO, SseResponse

StopTexts = Annotated[Stops, BeforeValidator(lambda value: [value] if isinstance(value, str) else value)]
"""Stop strings: a list of them, or one."""

Options = dict[str, Any]
"""Fields of `contract.generation.GenerationTask`."""


def load(state: AppState, job: JobRow, path: Path) -> LoadedCheckpoint:
    """Return what the pool needs to know of a checkpoint of the job. Raises CheckpointNotFound."""
    return LoadedCheckpoint.of(path, job.spec["data"]["tokenizer_path"], state.settings.writable_roots)


async def respond(
    request: Request,
    state: AppState,
    checkpoint: LoadedCheckpoint,
    options: Options,
    collect: Callable[[Generation], Awaitable[Response]],
) -> Response:
    """Return the response that ``collect`` builds. If the client disconnects, the request is cancelled at once."""
    working = asyncio.ensure_future(_collect(state, checkpoint, options, collect))
    leaving = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        return await working if working.done() else Response(status_code=CLIENT_LEFT)
    finally:
        for task in (working, leaving):
            task.cancel()


async def _collect(
    state: AppState,
    checkpoint: LoadedCheckpoint,
    options: Options,
    collect: Callable[[Generation], Awaitable[Response]],
) -> Response:
    while True:
        generation = await state.generation.open(checkpoint, **options)
        try:
            return await collect(generation)
        except DeviceReclaimed:
            continue  # Nothing was sent to the client yet: start again, on the CPU.
        finally:
            generation.close()


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def stream(
    state: AppState,
    checkpoint: LoadedCheckpoint,
    options: Options,
    frames: Callable[[Generation], AsyncGenerator[bytes, None]],
    hello: bytes = HELLO,
) -> Response:
    """Return a stream of ``frames``. Errors before the first one are raised, and become an ordinary response."""
    generation = await state.generation.open(checkpoint, **options)
    return SseResponse(frames(generation), generation.close, hello)
