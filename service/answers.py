"""Answers that are written down where they are made: once, in the endpoint's own thread.

FastAPI would hold a shape of ours against its own model again, in a second thread, and write it down in the event loop,
which all requests share.
"""

import functools
from collections.abc import Callable, Mapping
from typing import ParamSpec

from pydantic import BaseModel
from starlette.responses import Response

P = ParamSpec("P")


def sent(shape: BaseModel, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """The shape as JSON."""
    body = type(shape).__pydantic_serializer__.to_json(shape)
    return Response(body, status, headers, media_type="application/json")


def written(status: int = 200) -> Callable[[Callable[P, BaseModel]], Callable[P, Response]]:
    """For a `def` endpoint that returns a shape. Its annotation is what the OpenAPI document says, as without this."""

    def around(endpoint: Callable[P, BaseModel]) -> Callable[P, Response]:
        @functools.wraps(endpoint)
        def answer(*args: P.args, **kwargs: P.kwargs) -> Response:
            return sent(endpoint(*args, **kwargs), status)

        return answer

    return around
