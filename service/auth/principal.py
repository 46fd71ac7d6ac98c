"""Who asks: known from the token before the request reaches a route."""

from dataclasses import dataclass
from typing import Annotated

from fastapi import Depends, Request

from trainyard.contract.scopes import Scope


@dataclass(frozen=True)
class Principal:
    """Somebody who was let in. ``name`` stands in events; ``token`` is the id of a named token, which has quotas."""

    name: str
    scope: Scope
    token: str | None = None


LOCAL = Principal("local", Scope.ADMIN)
"""Whoever asks a service that wants no token: it listens on this machine alone."""

ADMIN = Principal("admin", Scope.ADMIN)
"""Who has a token of the settings or of the token file."""

ANONYMOUS = Principal("nobody", Scope.READ)
"""At addresses that ask for no token of a user's."""

RESERVED = frozenset({LOCAL.name, ADMIN.name, ANONYMOUS.name, "agent", "scheduler", "service", "user", "worker"})
"""Names that mean something else in events."""


async def principal_of(request: Request) -> Principal:
    """Who asks, as the gate found out."""
    caller: Principal = request.scope["caller"]
    return caller


PrincipalDep = Annotated[Principal, Depends(principal_of)]
"""A route's knowledge of who asks."""
