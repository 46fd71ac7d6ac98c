"""The routes of named tokens, for admins."""

import logging
from typing import Annotated

from fastapi import APIRouter, Body
from fastapi import Path as InPath
from sqlalchemy import select

from trainyard.service.api.dependencies import AppState, StateDep
from trainyard.service.api.responses import ServiceRoute
from trainyard.service.auth import quotas, store
from trainyard.service.auth.permissions import ADMIN
from trainyard.service.auth.principal import RESERVED, PrincipalDep
from trainyard.service.auth.quotas import Usage
from trainyard.service.clock import utc_now
from trainyard.service.db.models import JobRow, TokenRow
from trainyard.service.errors import TokenNameTaken
from trainyard.service.schemas import (
    NewToken,
    Page,
    QuotaRequest,
    RotationRequest,
    Token,
    TokenRequest,
)

Name = Annotated[str, InPath(max_length=64, pattern=r"^[^\x00]*$")]

log = logging.getLogger("trainyard")

router = APIRouter(prefix="/tokens", tags=["access"], dependencies=[ADMIN], route_class=ServiceRoute)


@router.get("")
def list_tokens(services: StateDep) -> Page[Token]:
    """All named tokens, oldest first, those that were revoked among them; never their secrets."""
    with services.database.read() as session:
        rows = session.scalars(select(TokenRow).order_by(TokenRow.created_at, TokenRow.id)).all()
        used = quotas.usage(session)
    return Page(data=[_shown(row, used.get(row.name, Usage())) for row in rows], has_more=False)


@router.post("", status_code=201)
def create_token(services: StateDep, caller: PrincipalDep, asked: TokenRequest) -> NewToken:
    """Make a token. The answer has its secret, which is shown this once."""
    if asked.name.lower() in RESERVED:
        raise TokenNameTaken()
    with services.database.write() as session:
        row, token = store.create(session, asked, caller.name, utc_now())
    return _secret(services, row, token, "created")


@router.patch("/{name}")
def change_token(services: StateDep, name: Name, asked: QuotaRequest) -> Token:
    """Change quotas: `max_jobs`, `max_devices`. What is queued or runs already stays."""
    with services.database.write() as session:
        row = store.lock(session, name)
        for field in asked.model_fields_set:
            setattr(row, field, getattr(asked, field))
    log.info("a token got other quotas", extra={"token_name": row.name})
    return _shown(row, _usage(services, row))


@router.post("/{name}/rotate")
def rotate_token(
    services: StateDep,
    name: Name,
    asked: RotationRequest = Body(default_factory=RotationRequest),
) -> NewToken:
    """Another secret for the token; the one it had stays good for `overlap` seconds, 0 where that is left out."""
    with services.database.write() as session:
        row, token = store.rotate(session, name, asked.overlap, asked.expires_in, utc_now())
    return _secret(services, row, token, "rotated")


@router.delete("/{name}", status_code=204)
def revoke_token(services: StateDep, name: Name) -> None:
    """Let nobody in by it any more, from now on. Its jobs go on; its name stays taken."""
    with services.database.write() as session:
        row = store.revoke(session, name, utc_now())
    services.authenticator.clear_cache()
    log.info("a token was revoked", extra={"token_name": row.name})


def _secret(services: AppState, row: TokenRow, token: str, what: str) -> NewToken:
    services.authenticator.clear_cache()
    log.info("a token was %s", what, extra={"token_name": row.name})
    return NewToken(**_shown(row, _usage(services, row)).model_dump(), token=token)


def _usage(services: AppState, row: TokenRow) -> Usage:
    with services.database.read() as session:
        return quotas.usage(session, JobRow.queued_by == row.name).get(row.name, Usage())


def _shown(row: TokenRow, used: Usage) -> Token:
    return Token.model_validate({**vars(row), **used._asdict()})
