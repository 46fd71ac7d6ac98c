"""`trainyard mcp`: the tools of `trainyard.mcp_tools` over stdio, for a service that may be on another host."""

import os
import signal
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import anyio

from trainyard.client.api import DEFAULT_URL
from trainyard.client.async_connection import AsyncConnection
from trainyard.client.cli.console import Console
from trainyard.client.connection import RetryPolicy, normalize_url
from trainyard.client.errors import ApiError, ServiceUnreachable
from trainyard.client.exit_codes import Exit
from trainyard.client.flows import Flow
from trainyard.contract.scopes import Scope
from trainyard.mcp_tools.server import serve_stdio
from trainyard.mcp_tools.tool import ToolError

TIMEOUT_SECONDS = 30.0


class ClientApi:
    """The REST API of a service, called by the client."""

    def __init__(self, connection: AsyncConnection) -> None:
        self._connection = connection

    async def call(
        self,
        method: str,
        path: str,
        *,
        params: Mapping[str, Any] | None = None,
        body: Any = None,
        idempotency_key: str | None = None,
    ) -> Any:
        """See `RestApi.call`."""
        headers = {} if idempotency_key is None else {"Idempotency-Key": idempotency_key}
        with _as_tool_errors():
            return await self._connection.request(method, path, params=params, body=body, headers=headers)

    async def text(self, path: str) -> str:
        """See `RestApi.text`."""
        with _as_tool_errors():
            return await self._connection.run(self._read(path))

    async def scope(self) -> Scope:
        """See `RestApi.scope`."""
        answer = await self.call("GET", "/version")
        # An older service does not return it, and decides at each call.
        return Scope(answer.get("scope", Scope.ADMIN))

    def _read(self, path: str) -> Flow[str]:
        body = yield from self._connection.download(path, {})
        text = b""
        while chunk := (yield from self._connection.chunk(body)):
            text += chunk
        return text.decode()


@contextmanager
def _as_tool_errors() -> Iterator[None]:
    try:
        yield
    except ApiError as error:
        raise ToolError.of_response(error.status, error.problem) from None
    except ServiceUnreachable as error:
        message = f"{error}. Start it with `trainyard serve`, or give its URL in TRAINYARD_URL."
        raise ToolError("service_unreachable", message) from None


def serve(args: SimpleNamespace, console: Console) -> int:
    """Answer the requests on stdin until it ends."""
    url = normalize_url(args.url or os.environ.get("TRAINYARD_URL") or DEFAULT_URL)
    token = os.environ.get("TRAINYARD_TOKEN", "").strip() if args.token is None else args.token
    if sys.stdin.isatty():
        console.error(f"tools for {url}; an AI agent starts this command and talks to it on stdin. Ctrl-C ends it.")
    # A thread waits for the next line. Python could end only after that.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    anyio.run(serve_stdio, ClientApi(AsyncConnection(url, token, TIMEOUT_SECONDS, RetryPolicy())))
    return Exit.SUCCEEDED
