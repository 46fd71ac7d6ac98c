"""Named tokens: their format, the rules by which one is valid, and their rows in the database.

A token is ``ty_<id>_<secret>``. The id finds the row; the hash of the whole token is compared in constant time. Only
the hash is stored.
"""

import hmac
import re
import secrets
from dataclasses import dataclass
from datetime import datetime, timedelta

from sqlalchemy import select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from trainyard.contract.scopes import Scope
from trainyard.service.db.models import TokenRow
from trainyard.service.errors import TokenNameTaken, TokenNotFound, TokenRevoked
from trainyard.service.ids import new_id, token_hash
from trainyard.service.schemas import TokenRequest

PREFIX = "ty_"
KEY = re.compile(r"ty_([a-z2-7]{12})_[A-Za-z0-9_-]{43}")
SECRET_BYTES = 32
NO_HASH = "0" * 64


@dataclass(frozen=True)
class ApiKey:
    """A named token of the database. ``previous_until``: expiry of the secret before the last rotation."""

    id: str
    name: str
    scope: Scope
    sha256: str
    previous_sha256: str | None
    previous_until: datetime | None
    expires_at: datetime | None
    revoked_at: datetime | None
    last_used_at: datetime | None


def generate(token_id: str) -> str:
    """Return a new token for the row ``token_id`` (``tok_...``)."""
    return f"{PREFIX}{token_id.removeprefix('tok_')}_{secrets.token_urlsafe(SECRET_BYTES)}"


def parse_id(token: str) -> str | None:
    """Return the id of the token's row, or None if it is not a named token."""
    match = KEY.fullmatch(token)
    return f"tok_{match.group(1)}" if match else None


def rejection_reason(key: ApiKey | None, token: str, now: datetime) -> str | None:
    """Return why the token is rejected, or None if it is valid. Without the right secret the reason is generic."""
    digest = token_hash(token)
    # Both comparisons always run, so that the duration does not tell whether the id exists.
    current = hmac.compare_digest(digest, key.sha256 if key is not None else NO_HASH)
    previous = hmac.compare_digest(digest, (key.previous_sha256 if key is not None else None) or NO_HASH)
    if key is None or not (current or previous):
        return "A valid token is needed: Authorization: Bearer <token>."
    if key.revoked_at is not None:
        return "The token was revoked."
    if previous and (key.previous_until is None or key.previous_until <= now):
        return "The token was replaced by another one."
    if key.expires_at is not None and key.expires_at <= now:
        return "The token has expired."
    return None


ID_LETTERS = 12


def find_api_key(session: Session, token_id: str) -> ApiKey | None:
    """Return the token with this id, or None."""
    row = session.get(TokenRow, token_id)
    if row is None:
        return None
    return ApiKey(
        id=row.id,
        name=row.name,
        scope=Scope(row.scope),
        sha256=row.sha256,
        previous_sha256=row.previous_sha256,
        previous_until=row.previous_until,
        expires_at=row.expires_at,
        revoked_at=row.revoked_at,
        last_used_at=row.last_used_at,
    )


def record_use(session: Session, token_id: str, now: datetime) -> None:
    """Set the time of the token's last use."""
    session.execute(update(TokenRow).where(TokenRow.id == token_id).values(last_used_at=now))


def create(session: Session, request: TokenRequest, created_by: str, now: datetime) -> tuple[TokenRow, str]:
    """Create a token; return its row and the secret. Raises TokenNameTaken: names are never used again."""
    token_id = new_id("tok", ID_LETTERS)
    token = generate(token_id)
    row = TokenRow(
        id=token_id,
        name=request.name,
        scope=request.scope,
        sha256=token_hash(token),
        max_jobs=request.max_jobs,
        max_devices=request.max_devices,
        created_by=created_by,
        created_at=now,
        expires_at=_after(now, request.expires_in),
    )
    try:
        with session.begin_nested():
            session.add(row)
    except IntegrityError:
        raise TokenNameTaken() from None
    session.refresh(row)
    return row, token


def rotate(session: Session, name: str, overlap: int, expires_in: int | None, now: datetime) -> tuple[TokenRow, str]:
    """Give the token a new secret; the previous one stays valid for ``overlap`` seconds.

    Raises TokenNotFound or TokenRevoked.
    """
    row = lock(session, name)
    if row.revoked_at is not None:
        raise TokenRevoked()
    token = generate(row.id)
    row.previous_sha256 = row.sha256 if overlap else None
    row.previous_until = _after(now, overlap) if overlap else None
    row.sha256, row.rotated_at = token_hash(token), now
    if expires_in is not None:
        row.expires_at = _after(now, expires_in)
    return row, token


def revoke(session: Session, name: str, now: datetime) -> TokenRow:
    """Revoke the token. Its row is kept, because events refer to the name. Raises TokenNotFound."""
    row = lock(session, name)
    row.revoked_at = row.revoked_at or now
    return row


def lock(session: Session, name: str) -> TokenRow:
    """Return the token's row, locked until the transaction ends. Raises TokenNotFound."""
    row = session.scalar(select(TokenRow).where(TokenRow.name == name).with_for_update())
    if row is None:
        raise TokenNotFound()
    return row


def _after(now: datetime, seconds: int | None) -> datetime | None:
    return now + timedelta(seconds=seconds) if seconds is not None else None
