"""The caller of a request. `service.api.middleware` authenticates it before the request reaches a route."""

from dataclasses import dataclass
from typing import Annotated

from fastapi import Depends, Request

from trainyard.contract.scopes import Scope


@dataclass(frozen=True)
class Principal:
    """An authenticated caller. ``name`` appears in events; ``token`` is the id of a named token, which has quotas."""

    name: str
    scope: Scope
    token: str | None = None


LOCAL = Principal("local", Scope.ADMIN)
"""Every caller of a service without static tokens, which listens on this machine only."""

ADMIN = Principal("admin", Scope.ADMIN)
"""A caller with a static token, of the settings or of the token file."""

ANONYMOUS = Principal("nobody", Scope.READ)
"""The caller of an address that needs no user token."""

RESERVED = frozenset({LOCAL.name, ADMIN.name, ANONYMOUS.name, "agent", "scheduler", "service", "user", "worker"})
"""Names with another meaning in events, which no token may have."""


async def principal_of(request: Request) -> Principal:
    """Return the caller of the request."""
    caller: Principal = request.scope["caller"]
    return caller


PrincipalDep = Annotated[Principal, Depends(principal_of)]
