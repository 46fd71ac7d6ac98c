"""Webhooks: who is to hear of jobs, what they were sent, and whether it arrived."""

import json
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Body, Path, Query, Response

from trainyard.service.api.dependencies import StateDep
from trainyard.service.api.responses import ServiceRoute, json_response
from trainyard.service.api.routers.jobs import Limit, OptionalText
from trainyard.service.auth.permissions import SUBMIT
from trainyard.service.bodies import NO_FIELDS
from trainyard.service.clock import utc_now
from trainyard.service.db.models import DeliveryRow, WebhookRow
from trainyard.service.schemas import (
    Delivery,
    DeliveryAttempt,
    DeliveryWithPayload,
    Page,
    Webhook,
    WebhookWithSecret,
)
from trainyard.service.webhooks import requests, store
from trainyard.service.webhooks.requests import PatchWebhookBody, WebhookCreate

MAX_NUMBER = (1 << 63) - 1
LOCATION: dict[str, Any] = {"headers": {"Location": {"description": "Address of it.", "schema": {"type": "string"}}}}

Number = Annotated[int, Path(ge=0, le=MAX_NUMBER)]
After = Annotated[int | None, Query(ge=0, le=MAX_NUMBER)]

router = APIRouter(prefix="/webhooks", tags=["webhooks"], dependencies=[SUBMIT], route_class=ServiceRoute)


@router.post("", status_code=201, response_model=WebhookWithSecret, responses={201: LOCATION})
def create_webhook(services: StateDep, wanted: WebhookCreate) -> Response:
    """Send events to `url`, signed. The answer is the only one that has the secret."""
    requests.require_allowed(wanted, services.settings.webhook_networks)
    with services.database.write() as session:
        row = store.create(session, wanted, utc_now())
    return json_response(_with_secret(row), 201, {"Location": f"/webhooks/{row.id}"})


@router.get("")
def list_webhooks(services: StateDep, limit: Limit = 20, after: OptionalText = None) -> Page[Webhook]:
    """Newest first."""
    with services.database.read() as session:
        rows, has_more = store.page(session, limit, after)
    return Page(data=[_shown(row) for row in rows], has_more=has_more)


@router.get("/{webhook_id}")
def get_webhook(services: StateDep, webhook_id: str) -> Webhook:
    """One webhook."""
    with services.database.read() as session:
        return _shown(store.find(session, webhook_id))


@router.patch("/{webhook_id}")
def patch_webhook(
    services: StateDep,
    webhook_id: str,
    changes: PatchWebhookBody = Body(default_factory=PatchWebhookBody),
) -> Webhook:
    """Change `url`, `description`, `events`, `labels`, `rules`, `enabled`. One that is switched on begins anew."""
    with services.database.write() as session:
        row = store.find(session, webhook_id, lock=True)
        wanted = requests.apply_changes(store.asked_of(row), changes, services.settings.webhook_networks)
        store.change(session, row, wanted, utc_now())
    services.sender.wake()
    return _shown(row)


@router.delete("/{webhook_id}", status_code=204)
def delete_webhook(services: StateDep, webhook_id: str) -> None:
    """Remove it, with what it was still to be sent and its log."""
    with services.database.write() as session:
        store.remove(session, webhook_id)


@router.post("/{webhook_id}/rotate", dependencies=[NO_FIELDS])
def rotate_webhook_secret(services: StateDep, webhook_id: str) -> WebhookWithSecret:
    """A new secret, shown once. For 24 hours both sign."""
    with services.database.write() as session:
        row = store.find(session, webhook_id, lock=True)
        store.rotate(row, utc_now())
    return _with_secret(row)


@router.post("/{webhook_id}/test", status_code=202, dependencies=[NO_FIELDS])
def test_webhook(services: StateDep, webhook_id: str) -> Delivery:
    """Send `webhook.test` once, also where it is switched off. What came of it is in the delivery."""
    with services.database.write() as session:
        row = store.test(session, webhook_id, utc_now())
    services.sender.wake()
    return _delivery(row)


@router.get("/{webhook_id}/deliveries")
def list_deliveries(
    services: StateDep,
    webhook_id: str,
    state: Literal["pending", "delivered", "failed"] | None = None,
    limit: Limit = 20,
    after: After = None,
) -> Page[Delivery]:
    """What was sent and what waits, newest first."""
    with services.database.read() as session:
        rows, has_more = store.deliveries(session, webhook_id, state, limit, after)
    return Page(data=[_delivery(row) for row in rows], has_more=has_more)


@router.get("/{webhook_id}/deliveries/{delivery_id}")
def get_delivery(services: StateDep, webhook_id: str, delivery_id: Number) -> DeliveryWithPayload:
    """One delivery with its payload."""
    with services.database.read() as session:
        row = store.delivery(session, webhook_id, delivery_id)
    return DeliveryWithPayload(**vars(_delivery(row)), payload=json.loads(row.body))


@router.post("/{webhook_id}/deliveries/{delivery_id}/redeliver", status_code=202, dependencies=[NO_FIELDS])
def redeliver(services: StateDep, webhook_id: str, delivery_id: Number) -> Delivery:
    """Send it once more, under the same event id; one that still waits is sent at once."""
    with services.database.write() as session:
        row = store.redeliver(session, webhook_id, delivery_id, utc_now())
    services.sender.wake()
    return _delivery(row)


def _shown(row: WebhookRow) -> Webhook:
    return Webhook.model_validate(row)


def _with_secret(row: WebhookRow) -> WebhookWithSecret:
    return WebhookWithSecret.model_validate(row)


def _delivery(row: DeliveryRow) -> Delivery:
    return Delivery(
        id=str(row.number),
        webhook_id=row.webhook_id,
        event_id=row.event_id,
        type=row.kind,
        job_id=row.job_id,
        state=row.state,
        attempts=row.attempts,
        tries=[DeliveryAttempt.model_validate(one) for one in row.tries],
        next_attempt_at=row.next_at,
        redelivers=str(row.redelivers) if row.redelivers is not None else None,
        created_at=row.created_at,
        ended_at=row.ended_at,
    )
