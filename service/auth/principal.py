"""Who asks: known from the token before the request reaches a route."""

from dataclasses import dataclass
from typing import Annotated

from fastapi import Depends, Request

from trainyard.contract.scopes import Scope


@dataclass(frozen=True)
class Caller:
    """Somebody who was let in. ``name`` stands in events; ``token`` is the id of a named token, which has quotas."""

    name: str
    scope: Scope
    token: str | None = None


LOCAL = Caller("local", Scope.ADMIN)
"""Whoever asks a service that wants no token: it listens on this machine alone."""

ADMIN = Caller("admin", Scope.ADMIN)
"""Who has a token of the settings or of the token file."""

NOBODY = Caller("nobody", Scope.READ)
"""At addresses that ask for no token of a user's."""

RESERVED = frozenset({LOCAL.name, ADMIN.name, NOBODY.name, "agent", "scheduler", "service", "user", "worker"})
"""Names that mean something else in events."""


async def caller_of(request: Request) -> Caller:
    """Who asks, as the gate found out."""
    caller: Caller = request.scope["caller"]
    return caller


CallerNeeded = Annotated[Caller, Depends(caller_of)]
"""A route's knowledge of who asks."""
