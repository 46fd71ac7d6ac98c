"""The route at which agents call tools, by the Model Context Protocol."""

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from importlib import import_module
from typing import Any

import httpx2
from fastapi import APIRouter, Request, Response
from starlette.types import Receive, Send
from starlette.types import Scope as AsgiScope

from trainyard.contract.scopes import Scope
from trainyard.mcp_tools.tool import ToolError
from trainyard.service.api.dependencies import StateDep
from trainyard.service.api.responses import ServiceRoute
from trainyard.service.auth.permissions import READ
from trainyard.service.auth.principal import PrincipalDep
from trainyard.service.streams.broadcaster import MetricBroadcaster

FORWARDED = ("authorization", "host")
"""Headers of the agent's request that the tools' requests have too."""

router = APIRouter(tags=["service"], route_class=ServiceRoute)


# Not in the OpenAPI document: it is JSON-RPC, described by a protocol of its own, and its clients do not read OpenAPI.
@router.post("/mcp", dependencies=[READ], include_in_schema=False)
async def call_mcp(request: Request, state: StateDep, caller: PrincipalDep) -> Response:
    """Answer one message of the Model Context Protocol (streamable HTTP, without sessions)."""
    # The SDK takes about a second to import: not at the start of the service, and not in the event loop.
    server = await asyncio.to_thread(import_module, "trainyard.mcp_tools.server")
    api = InProcessApi(request, caller.scope, state.broadcaster)
    return _AsgiResponse(lambda scope, receive, send: server.serve_http(api, scope, receive, send))


class InProcessApi:
    """The service's own REST API, called without a network: with the same token, checks, limits and log lines."""

    def __init__(self, request: Request, scope: Scope, broadcaster: MetricBroadcaster) -> None:
        self._scope = scope
        self._broadcaster = broadcaster
        self._headers = {name: request.headers[name] for name in FORWARDED if name in request.headers}
        # One id for the agent's request and for those of its tools, so that the log shows them together.
        self._headers["x-request-id"] = request.scope["request_id"]
        peer = request.client
        address = ("127.0.0.1", 0) if peer is None else (peer.host, peer.port)
        self._transport = httpx2.ASGITransport(app=request.app, client=address)

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
        response = await self._send(method, path, params=params or {}, json=body, headers=headers)
        return response.json()

    async def text(self, path: str) -> str:
        """See `RestApi.text`."""
        return (await self._send("GET", path)).text

    async def scope(self) -> Scope:
        """Return the scope of the token."""
        return self._scope

    async def _send(self, method: str, path: str, **content: Any) -> httpx2.Response:
        # A tool that polls must not delay the end of the service.
        if self._broadcaster.stopping:
            raise ToolError("service_stopping", "The service is ending. Call again when it has started.")
        content["params"] = {name: value for name, value in content.get("params", {}).items() if value is not None}
        content["headers"] = {**self._headers, **content.get("headers", {})}
        async with httpx2.AsyncClient(transport=self._transport, base_url="http://service", trust_env=False) as client:
            try:
                request = client.build_request(method, path, **content)
            except ValueError:
                raise ToolError("invalid_json", "The arguments have a value that JSON cannot express.") from None
            response = await client.send(request)
        if response.status_code >= 400:
            raise ToolError.of_response(response.status_code, response.json())
        return response


class _AsgiResponse(Response):
    """A response that an ASGI application sends."""

    def __init__(self, app: Callable[[AsgiScope, Receive, Send], Awaitable[None]]) -> None:
        super().__init__()
        self._app = app

    async def __call__(self, scope: AsgiScope, receive: Receive, send: Send) -> None:
        await self._app(scope, receive, send)
