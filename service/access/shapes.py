"""What is asked of tokens, and what is shown of them."""

from datetime import datetime
from typing import Annotated, Literal

from pydantic import Field

from trainyard.contract.access import NAME
from trainyard.service.bodies import OptionalBody, StrictBody
from trainyard.service.shapes import Shape

MOST = 2**31 - 1
TEN_YEARS = 3650 * 86_400

Lifetime = Annotated[int, Field(ge=1, le=TEN_YEARS, description="seconds from now on; null: it does not expire")]
Quota = Annotated[int, Field(ge=0, le=MOST, description="null: no limit")]


class AskedQuotas(StrictBody):
    """How much a token's jobs that are queued or run may come to."""

    max_jobs: Quota | None = None
    max_devices: Quota | None = None


class AskedToken(AskedQuotas):
    """A token to be made. Its name is never given again."""

    name: Annotated[str, Field(pattern=f"^{NAME}$")]
    scope: Literal["read", "submit", "admin"] = "read"
    expires_in: Lifetime | None = None


class AskedRotation(OptionalBody):
    """Another secret for a token. ``overlap``: seconds for which the one it has stays good beside it."""

    overlap: Annotated[int, Field(ge=0, le=TEN_YEARS)] = 0
    expires_in: Lifetime | None = None


class Token(Shape):
    """A named token. ``jobs`` and ``devices`` count what it has queued or running now."""

    object: Literal["token"] = "token"
    id: str
    name: str
    scope: str
    max_jobs: int | None
    max_devices: int | None
    jobs: int
    devices: int
    created_by: str
    created_at: datetime
    rotated_at: datetime | None
    previous_until: datetime | None
    expires_at: datetime | None
    revoked_at: datetime | None
    last_used_at: datetime | None


class NewToken(Token):
    """The same, with its secret, which is shown this once."""

    token: str
