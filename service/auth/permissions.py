"""The scope that each route requires. A route declares it by one of the dependencies below; without one it is an error.

`fastapi.Security` passes the scope to `require`, and `scope_of` reads it back.
"""

from collections.abc import Iterable

from fastapi import Security
from fastapi.params import Security as SecurityParam
from fastapi.routing import APIRoute
from fastapi.security import SecurityScopes
from starlette.routing import BaseRoute

from trainyard.contract.scopes import Scope
from trainyard.service.auth.principal import PrincipalDep
from trainyard.service.errors import Forbidden


async def require(needed: SecurityScopes, caller: PrincipalDep) -> None:
    """Raise Forbidden if the caller's scope does not cover what the route declares."""
    for scope in needed.scopes:
        if scope in UNSCOPED:
            continue
        if not caller.scope.covers(Scope(scope)):
            raise Forbidden(f"This needs the scope {scope}; the token {caller.name} has {caller.scope}.")


READ = Security(require, scopes=[Scope.READ])
SUBMIT = Security(require, scopes=[Scope.SUBMIT])
OPERATE = Security(require, scopes=[Scope.OPERATE])
ADMIN = Security(require, scopes=[Scope.ADMIN])

OPEN = Security(require, scopes=["open"])
"""For every caller, without a token."""

ATTEMPT = Security(require, scopes=["attempt"])
"""For the agent of an attempt; the route checks the attempt's own token itself."""

UNSCOPED = frozenset({"open", "attempt"})


def scope_of(route: APIRoute) -> str:
    """Return the scope that the route declares. Raises RuntimeError if it does not declare exactly one."""
    declared = [
        scope
        for dependency in route.dependencies
        if isinstance(dependency, SecurityParam) and dependency.dependency is require
        for scope in dependency.scopes or ()
    ]
    if len(declared) != 1:
        raise RuntimeError(
            f"{sorted(route.methods or ())} {route.path} must declare one scope, and declares {declared}"
        )
    return declared[0]


def scopes_of(routes: Iterable[BaseRoute]) -> dict[tuple[str, str], str]:
    """Return the scope of each (method, path)."""
    return {
        (method, route.path): scope_of(route)
        for route in routes
        if isinstance(route, APIRoute)
        for method in route.methods or ()
    }


def methods_at(path: str, routes: Iterable[BaseRoute]) -> list[str]:
    """Return the methods that the path accepts, or [] if no route matches it."""
    matching = [route for route in routes if isinstance(route, APIRoute) and route.path_regex.match(path)]
    return sorted(method for route in matching for method in route.methods or ())
