"""JSON responses, and the route class of every router."""

import asyncio
import functools
import inspect
from collections.abc import Callable, Coroutine, Mapping
from typing import Any

from fastapi import Request
from fastapi.dependencies.utils import request_params_to_args
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from pydantic import BaseModel
from starlette.responses import Response
from starlette.routing import Match
from starlette.types import Scope as AsgiScope

from trainyard.contract.scopes import Scope
from trainyard.service.api.shared_reads import SHARED, SharedReads, Sharing
from trainyard.service.auth.permissions import scope_of
from trainyard.service.bodies import StrictRequest, unknown_parameters


def operation_id(route: APIRoute) -> str:
    """Return the id of a route's operation: the function's name in camel case, such as ``submitJob``."""
    first, *others = route.name.split("_")
    return first + "".join(word.capitalize() for word in others)


def json_response(model: BaseModel, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """Return the model as a JSON response."""
    body = type(model).__pydantic_serializer__.to_json(model)
    return Response(body, status, headers, media_type="application/json")


class ServiceRoute(APIRoute):
    """A route that must declare its scope, reads query and JSON body strictly, and runs `def` endpoints in its own way.

    FastAPI would run such an endpoint in anyio's threads, validate the returned model again in a second one, and
    serialize it in the event loop that all requests share. Here one thread of the loop's default executor does all of
    it, which costs half as much (docs/decisions/0013-threads-of-requests.md).

    Raises RuntimeError if no scope is declared, see `service.auth.permissions`.
    """

    def __init__(self, path: str, endpoint: Callable[..., Any], **options: Any) -> None:
        if not inspect.iscoroutinefunction(endpoint):
            endpoint = _threaded(endpoint, options.get("status_code") or 200)
        # A body without a Content-Type is taken as JSON.
        fixed = {"strict_content_type": False, "generate_unique_id_function": operation_id}
        super().__init__(path, endpoint, **{**options, **fixed})
        self._begin, self._end = path.partition("{")[0], path.rpartition("}")[2]
        if scope_of(self) != Scope.READ and self.sharing is not None:
            raise RuntimeError(f"{path}: only responses for every reader can be shared")

    def matches(self, scope: AsgiScope) -> tuple[Match, AsgiScope]:
        # Most of the routes are ruled out by two comparisons, at a tenth of the cost of the regular expression.
        path: str = scope.get("path", "")
        if not scope.get("root_path") and not (path.startswith(self._begin) and path.endswith(self._end)):
            return Match.NONE, {}
        return super().matches(scope)

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle, has_body = super().get_route_handler(), self.body_field is not None
        sharing = self.sharing
        parameters = self.dependant.query_params
        known = frozenset(parameter.alias for parameter in parameters)

        async def handle_strictly(request: Request) -> Response:
            # FastAPI ignores unknown parameters: `?statu=queued` would list every job.
            if request.scope["query_string"] and not known.issuperset(request.query_params):
                _, errors = request_params_to_args(parameters, request.query_params)
                unknown = [name for name in request.query_params if name not in known]
                raise RequestValidationError([*unknown_parameters(unknown, sorted(known)), *errors])
            return await handle(StrictRequest(request.scope, request.receive) if has_body else request)

        async def handle_shared(request: Request) -> Response:
            # A kept response skips the dependencies, so the scope is checked here.
            if not request.scope["caller"].scope.covers(Scope.READ):
                return await handle_strictly(request)
            assert sharing is not None
            reads: SharedReads = request.app.state.app_state.shared_reads
            return await reads.respond(request, sharing, handle_strictly)

        return handle_shared if sharing is not None else handle_strictly

    @property
    def sharing(self) -> Sharing | None:
        """How all readers share its response, see `service.api.shared_reads`; None if they do not."""
        return getattr(self.endpoint, SHARED, None)


def _threaded(endpoint: Callable[..., Any], status: int) -> Callable[..., Any]:
    def respond(*args: Any, **kwargs: Any) -> Any:
        result = endpoint(*args, **kwargs)
        return json_response(result, status) if isinstance(result, BaseModel) else result

    @functools.wraps(endpoint)
    async def run(*args: Any, **kwargs: Any) -> Any:
        return await asyncio.to_thread(respond, *args, **kwargs)

    return run
