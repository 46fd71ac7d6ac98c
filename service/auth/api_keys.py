"""What a named token looks like, and when it is good. Pure.

``ty_<id>_<secret>``: the id finds the row, and what is compared is the hash of the whole, in constant time.
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
    """A named token as it stands in the database. ``previous_until``: how long the one before a rotation is good."""

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
    """A new token for the row ``tok_...``."""
    return f"{PREFIX}{token_id.removeprefix('tok_')}_{secrets.token_urlsafe(SECRET_BYTES)}"


def parse_id(token: str) -> str | None:
    """The id of the row that a token names; None where it is no named token."""
    match = KEY.fullmatch(token)
    return f"tok_{match.group(1)}" if match else None


def rejection_reason(grant: ApiKey | None, token: str, now: datetime) -> str | None:
    """Why the token is not good now, or None where it is. Only who has the right secret hears what is wrong with it."""
    mine = token_hash(token)
    current = hmac.compare_digest(mine, grant.sha256 if grant is not None else NO_HASH)
    before = hmac.compare_digest(mine, (grant.previous_sha256 if grant is not None else None) or NO_HASH)
    if grant is None or not (current or before):
        return "A valid token is needed: Authorization: Bearer <token>."
    if grant.revoked_at is not None:
        return "The token was revoked."
    if before and (grant.previous_until is None or grant.previous_until <= now):
        return "The token was replaced by another one."
    if grant.expires_at is not None and grant.expires_at <= now:
        return "The token has expired."
    return None
