"""Answers that are written down where they are made: once, in the thread that worked for them.

FastAPI would hold a shape of ours against its own model again, in a second thread, and write it down in the event loop,
which all requests share.
"""

import asyncio
import contextvars
import functools
from collections.abc import Callable, Coroutine, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, ParamSpec, TypeVar

from pydantic import BaseModel
from starlette.responses import Response

P = ParamSpec("P")
T = TypeVar("T")

MOST_AT_ONCE = 32

_threads = ThreadPoolExecutor(MOST_AT_ONCE, thread_name_prefix="answers")
"""The standard library's: to pass work to one of them and back takes half of what it takes in the framework's own."""


def sent(shape: BaseModel, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """The shape as JSON."""
    body = type(shape).__pydantic_serializer__.to_json(shape)
    return Response(body, status, headers, media_type="application/json")


def written(status: int = 200) -> Callable[[Callable[P, BaseModel]], Callable[P, Coroutine[Any, Any, Response]]]:
    """For a `def` endpoint that returns a shape. Its annotation is what the OpenAPI document says, as without this."""

    def around(endpoint: Callable[P, BaseModel]) -> Callable[P, Coroutine[Any, Any, Response]]:
        def answer(*args: P.args, **kwargs: P.kwargs) -> Response:
            return sent(endpoint(*args, **kwargs), status)

        return functools.wraps(endpoint)(threaded(answer))

    return around


def threaded(work: Callable[P, T]) -> Callable[P, Coroutine[Any, Any, T]]:
    """Done in a thread, which knows what is logged about the request."""

    @functools.wraps(work)
    async def done(*args: P.args, **kwargs: P.kwargs) -> T:
        within = contextvars.copy_context()
        asked = functools.partial(within.run, work, *args, **kwargs)
        return await asyncio.get_running_loop().run_in_executor(_threads, asked)

    return done
