"""Ids of our own making, and what can be one of a job."""

import re
import secrets
from hashlib import sha256

JOB_ID = re.compile(r"job_[a-z2-7]{1,30}")
LETTERS = "abcdefghijkmnpqrstuvwxyz234567"


def new_id(prefix: str, letters: int = 10) -> str:
    """An id of our own, e.g. ``job_7f3kq9mzba``: safe in a path, an argument and a URL."""
    return f"{prefix}_" + "".join(secrets.choice(LETTERS) for _ in range(letters))


def token_hash(token: str) -> str:
    """Return the hex digest by which a token is stored and compared, whichever kind it is."""
    return sha256(token.encode(errors="replace")).hexdigest()
