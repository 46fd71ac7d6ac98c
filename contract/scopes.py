"""The scopes and the names of tokens."""

from enum import StrEnum

NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}"


class Scope(StrEnum):
    """Permissions of a token. Each scope includes those before it."""

    READ = "read"
    SUBMIT = "submit"
    """Submit jobs, fork any job, and act on the token's own jobs."""

    OPERATE = "operate"
    """Act on all jobs, and manage webhooks."""

    ADMIN = "admin"

    def covers(self, needed: "Scope") -> bool:
        """Return whether this scope includes ``needed``."""
        order = list(Scope)
        return order.index(self) >= order.index(needed)
