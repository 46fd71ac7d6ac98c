"""The connection for asyncio. Apart, because the command needs no asyncio and starts faster without it."""

import asyncio
import os
import socket
from collections.abc import AsyncGenerator, Callable, Coroutine, Mapping
from contextlib import AsyncExitStack, aclosing
from typing import Any, TypeVar

import httpx2

from trainyard.client.connection import CONNECT_SECONDS, CONNECTED, Exchange, RetryPolicy, header_token
from trainyard.client.flows import Body, Flow, Item, ItemFlow, Next, Open, Send, Sleep, Step, Work, as_item
from trainyard.client.pages import AsyncPages

T = TypeVar("T")


class AsyncConnection(Exchange):
    """Runs flows with an asynchronous HTTP client. What `Connection` returns is awaited or iterated with async here."""

    _http: httpx2.AsyncClient

    def __init__(
        self,
        url: str,
        token: str | None,
        timeout: float,
        retries: RetryPolicy,
        transport: httpx2.AsyncBaseTransport | None = None,
    ) -> None:
        super().__init__(url, retries)
        token = header_token(token)
        self._http = httpx2.AsyncClient(transport=transport, **self._settings(token, timeout))
        if self._checks_peers(token):
            self._http.event_hooks = {"request": [self._check_new_connections]}

    async def close(self) -> None:
        """Close the open connections."""
        await self._http.aclose()

    async def run(self, flow: Flow[T]) -> T:
        """Run a flow and return its result."""
        async with aclosing(self.iterate(as_item(flow))) as items:
            return await anext(items)

    def request(
        self, method: str, path: str, parse: Callable[[Any], Any] = lambda body: body, **content: Any
    ) -> Coroutine[Any, Any, Any]:
        """Run a `call` and return ``parse`` of its result."""
        return self.run(self._call(method, path, parse, content))

    def each(self, flow: ItemFlow[list[T]]) -> AsyncPages[T]:
        """Run a flow that gives pages, and return their rows."""
        return AsyncPages(self.iterate(flow))

    async def iterate(self, flow: ItemFlow[T]) -> AsyncGenerator[T, None]:
        """Run a flow and yield its items."""
        async with AsyncExitStack() as opened:
            step = flow.send
            result: Any = None
            while True:
                try:
                    wanted = step(result)
                except StopIteration:
                    return
                if isinstance(wanted, Item):
                    step, result = flow.send, None
                    yield wanted.value
                    continue
                try:
                    step, result = flow.send, await self._do(wanted, opened)
                except Exception as error:
                    step, result = flow.throw, error

    async def _do(self, step: Step, opened: AsyncExitStack) -> Any:
        match step:
            case Send(request):
                return await self._http.send(request)
            case Open(request, parts):
                await opened.aclose()
                response = await self._http.send(request, stream=True)
                opened.push_async_callback(response.aclose)
                if response.status_code >= 400:
                    await response.aread()
                return Body(response, response.aiter_lines() if parts == "lines" else response.aiter_bytes())
            case Next(body):
                return await anext(body.parts, None)  # type: ignore[arg-type]  # made by `Open` above
            case Sleep(seconds):
                return await asyncio.sleep(seconds)
            case Work(function):
                return await asyncio.to_thread(function)

    async def _check_new_connections(self, request: httpx2.Request) -> None:
        request.extensions["trace"] = self._on_transport_event

    async def _on_transport_event(self, name: str, details: Mapping[str, Any]) -> None:
        if name != CONNECTED:
            return
        stream = details["return_value"]
        # In a thread, because the check sends a request and waits for the response. Meanwhile nothing reads the stream.
        copy = socket.socket(fileno=os.dup(stream.get_extra_info("socket").fileno()))
        with copy:
            copy.settimeout(CONNECT_SECONDS)
            error = await asyncio.to_thread(self._refusal, copy)
        if error is not None:
            await stream.aclose()
            raise error
