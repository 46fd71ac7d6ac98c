"""The format of named tokens, and the rules by which one is valid.

A token is ``ty_<id>_<secret>``: the id finds the row, and the hash of the whole token is compared in constant time.
"""

import hmac
import re
import secrets
from dataclasses import dataclass
from datetime import datetime

from trainyard.contract.scopes import Scope
from trainyard.service.ids import token_hash

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
