"""Random ids, the patterns of the ids of jobs and corpora, and the hash of tokens."""

import re
import secrets
from hashlib import sha256

JOB_ID = re.compile(r"job_[a-z2-7]{1,30}")
CORPUS_ID = re.compile(r"corpus_[a-z2-7]{1,30}")
LETTERS = "abcdefghijkmnpqrstuvwxyz234567"


def new_id(prefix: str, letters: int = 10) -> str:
    """Return a random id such as ``job_7f3kq9mzba``, which is safe in a path, an argument and a URL."""
    return f"{prefix}_" + "".join(secrets.choice(LETTERS) for _ in range(letters))


def token_hash(token: str) -> str:
    """Return the hex digest that is stored and compared in place of a token."""
    return sha256(token.encode(errors="replace")).hexdigest()
