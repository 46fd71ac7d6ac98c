"""Routes that list, create, change, rotate and revoke named tokens. Admins only."""

import logging
from typing import Annotated

from fastapi import APIRouter, Body
from fastapi import Path as InPath
from sqlalchemy import select

from trainyard.contract.patterns import WITHOUT_NUL
from trainyard.service.api.dependencies import AppState, StateDep
from trainyard.service.api.responses import ServiceRoute
from trainyard.service.api.routers.jobs import OptionalLimit, OptionalText
from trainyard.service.auth import api_keys, quotas
from trainyard.service.auth.permissions import ADMIN
from trainyard.service.auth.principal import RESERVED, PrincipalDep
from trainyard.service.auth.quotas import QuotaUsage
from trainyard.service.clock import utc_now
from trainyard.service.db.models import JobRow, TokenRow
from trainyard.service.errors import TokenNameTaken
from trainyard.service.jobs.listing import page_of_all
from trainyard.service.schemas import NewToken, Page, QuotaRequest, RotationRequest, Token, TokenRequest

Name = Annotated[str, InPath(max_length=64, pattern=WITHOUT_NUL)]

log = logging.getLogger("trainyard")

router = APIRouter(prefix="/tokens", tags=["tokens"], dependencies=[ADMIN], route_class=ServiceRoute)


@router.get("")
def list_tokens(state: StateDep, limit: OptionalLimit = None, after: OptionalText = None) -> Page[Token]:
    """List all named tokens, oldest first, including revoked ones. Secrets are never shown."""
    with state.database.read() as session:
        rows = session.scalars(select(TokenRow).order_by(TokenRow.created_at, TokenRow.id)).all()
        usage = quotas.usage(session)
    data, has_more = page_of_all(rows, limit, after)
    return Page(data=[_to_response(row, usage.get(row.name, QuotaUsage())) for row in data], has_more=has_more)


@router.post("", status_code=201)
def create_token(state: StateDep, caller: PrincipalDep, body: TokenRequest) -> NewToken:
    """Create a token. Only this response has its secret."""
    if body.name.lower() in RESERVED:
        raise TokenNameTaken()
    with state.database.write() as session:
        row, token = api_keys.create(session, body, caller.name, utc_now())
    return _to_secret_response(state, row, token, "created")


@router.patch("/{name}")
def update_token(state: StateDep, name: Name, body: QuotaRequest) -> Token:
    """Change the quotas `max_jobs` and `max_devices`. Queued and running jobs are not affected."""
    with state.database.write() as session:
        row = api_keys.lock(session, name)
        for field in body.model_fields_set:
            setattr(row, field, getattr(body, field))
    log.info("the quotas of a token were changed", extra={"token_name": row.name})
    return _to_response(row, _usage(state, row))


@router.post("/{name}/rotate")
def rotate_token(
    state: StateDep, name: Name, body: RotationRequest = Body(default_factory=RotationRequest)
) -> NewToken:
    """Create a new secret for the token. The previous one stays valid for `overlap` seconds (default 0)."""
    with state.database.write() as session:
        row, token = api_keys.rotate(session, name, body.overlap, body.expires_in, utc_now())
    return _to_secret_response(state, row, token, "rotated")


@router.delete("/{name}", status_code=204)
def revoke_token(state: StateDep, name: Name) -> None:
    """Revoke the token, effective now. Its jobs continue; its name cannot be used again."""
    with state.database.write() as session:
        row = api_keys.revoke(session, name, utc_now())
    state.authenticator.clear_cache()
    log.info("a token was revoked", extra={"token_name": row.name})


def _to_secret_response(state: AppState, row: TokenRow, token: str, what: str) -> NewToken:
    state.authenticator.clear_cache()
    log.info("a token was %s", what, extra={"token_name": row.name})
    return NewToken(**_to_response(row, _usage(state, row)).model_dump(), token=token)


def _usage(state: AppState, row: TokenRow) -> QuotaUsage:
    with state.database.read() as session:
        return quotas.usage(session, JobRow.queued_by == row.name).get(row.name, QuotaUsage())


def _to_response(row: TokenRow, usage: QuotaUsage) -> Token:
    return Token.model_validate({**vars(row), **usage._asdict()})
