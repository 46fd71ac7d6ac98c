"""What a token may do, and what it may be called."""

from enum import StrEnum

NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}"


class Scope(StrEnum):
    """Each one may do what those before it may."""

    READ = "read"
    SUBMIT = "submit"
    ADMIN = "admin"

    def covers(self, needed: "Scope") -> bool:
        """Whether this one is enough where ``needed`` is."""
        order = list(Scope)
        return order.index(self) >= order.index(needed)
