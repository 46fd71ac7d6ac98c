"""Named tokens in the database. Only the hash of a token is stored."""

from datetime import datetime, timedelta

from sqlalchemy import select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from trainyard.contract.scopes import Scope
from trainyard.service.auth import api_keys
from trainyard.service.auth.api_keys import ApiKey
from trainyard.service.db.models import TokenRow
from trainyard.service.errors import TokenNameTaken, TokenNotFound, TokenRevoked
from trainyard.service.ids import new_id, token_hash
from trainyard.service.schemas import TokenRequest

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
    token = api_keys.generate(token_id)
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
    token = api_keys.generate(row.id)
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
