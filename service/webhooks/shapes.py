"""Webhooks and their deliveries as the API shows them."""

from datetime import datetime
from typing import Any, Literal

from trainyard.service.shapes import Shape


class Webhook(Shape):
    """Who hears what. Its secret is never shown again. ``failing_since``: no try has succeeded since then.

    ``old_secret_until``: so long the secret before the newest one signs as well.
    """

    object: Literal["webhook"] = "webhook"
    id: str
    url: str
    description: str
    events: list[str]
    labels: dict[str, str]
    job_id: str | None
    rules: list[dict[str, Any]]
    enabled: bool
    disabled_reason: str | None
    failures: int
    failing_since: datetime | None
    retry_at: datetime | None
    succeeded_at: datetime | None
    old_secret_until: datetime | None
    created_at: datetime
    updated_at: datetime


class WebhookWithSecret(Webhook):
    """The one answer that has the secret."""

    secret: str


class Try(Shape):
    """One attempt at a delivery. ``status`` is null where there was no answer; ``error`` says why it failed."""

    at: datetime
    status: int | None
    seconds: float
    error: str | None
    response: str | None


class Delivery(Shape):
    """One event on its way to one receiver. ``state``: pending, delivered or failed; ``tries``: the last ones."""

    object: Literal["delivery"] = "delivery"
    id: str
    webhook_id: str
    event_id: str
    type: str
    job_id: str | None
    state: Literal["pending", "delivered", "failed"]
    attempts: int
    tries: list[Try]
    next_attempt_at: datetime | None
    redelivers: str | None
    created_at: datetime
    ended_at: datetime | None


class DeliveryWithPayload(Delivery):
    """A delivery with what the receiver gets."""

    payload: dict[str, Any]
