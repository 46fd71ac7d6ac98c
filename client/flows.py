"""Flows: sequences of requests as generators, without input and output.

A flow is a generator. It yields a step, such as `Send`, and receives the result of the step, or its exception. So all
rules (retries, pages, waiting, downloads) are written once. `connection.Connection` runs flows with a blocking HTTP
client and `async_connection.AsyncConnection` with an asynchronous one.
"""

from collections.abc import AsyncIterator, Callable, Generator, Iterator
from dataclasses import dataclass
from typing import Any, Generic, Literal, TypeVar

import httpx2

T = TypeVar("T")


@dataclass(frozen=True)
class Send:
    """Send a request. The result is the response with its body."""

    request: httpx2.Request


@dataclass(frozen=True)
class Open:
    """Send a request. The result is a `Body` that is read with `Next`. A flow has at most one open body."""

    request: httpx2.Request
    parts: Literal["lines", "bytes"]


@dataclass(frozen=True)
class Body:
    """A response whose body arrives in ``parts``. If the status is 400 or more, the response already has the body."""

    response: httpx2.Response
    parts: Iterator[Any] | AsyncIterator[Any]


@dataclass(frozen=True)
class Next:
    """Read the next part of a body. The result is the part, or None at the end."""

    body: Body


@dataclass(frozen=True)
class Sleep:
    """Wait for ``seconds``."""

    seconds: float


@dataclass(frozen=True)
class Work:
    """Call a function that takes long, such as one that reads a large file. The result is its return value."""

    function: Callable[[], Any]


@dataclass(frozen=True)
class Item(Generic[T]):
    """Give the caller the next value of an iterator."""

    value: T


Step = Send | Open | Next | Sleep | Work
Flow = Generator[Step, Any, T]
"""A flow that returns a value."""

ItemFlow = Generator[Step | Item[T], Any, None]
"""A flow that gives its caller values before it ends."""


def as_item(flow: Flow[T]) -> ItemFlow[T]:
    """Return a flow that gives the result of ``flow`` as its only item."""
    yield Item((yield from flow))
