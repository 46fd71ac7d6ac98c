"""Routes that manage webhooks and show their deliveries."""

import json
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Body, Path, Query, Response

from trainyard.service.api.dependencies import StateDep
from trainyard.service.api.responses import ServiceRoute, json_response
from trainyard.service.api.routers.jobs import Limit, OptionalText
from trainyard.service.auth.permissions import OPERATE
from trainyard.service.auth.principal import PrincipalDep
from trainyard.service.bodies import NO_FIELDS
from trainyard.service.clock import utc_now
from trainyard.service.db.models import DeliveryRow, WebhookRow
from trainyard.service.notice_urls import is_notice_url
from trainyard.service.schemas import Delivery, DeliveryAttempt, DeliveryWithPayload, Page, Webhook, WebhookWithSecret
from trainyard.service.webhooks import requests, store
from trainyard.service.webhooks.requests import PatchWebhookBody, WebhookCreate

MAX_NUMBER = (1 << 63) - 1
LOCATION: dict[str, Any] = {"headers": {"Location": {"description": "Address of it.", "schema": {"type": "string"}}}}

Number = Annotated[int, Path(ge=0, le=MAX_NUMBER)]
After = Annotated[int | None, Query(ge=0, le=MAX_NUMBER)]

router = APIRouter(prefix="/webhooks", tags=["webhooks"], dependencies=[OPERATE], route_class=ServiceRoute)


@router.post("", status_code=201, response_model=WebhookWithSecret, responses={201: LOCATION})
def create_webhook(state: StateDep, caller: PrincipalDep, body: WebhookCreate) -> Response:
    """Create a webhook that sends events to `url`. Only this response has the secret."""
    requests.require_allowed(body.url, state.settings.webhook_networks, state.sender.notices, caller)
    requests.require_unmasked(body)
    with state.database.write() as session:
        row = store.create(session, body, utc_now())
    return json_response(_with_secret(row), 201, {"Location": f"/webhooks/{row.id}"})


@router.get("")
def list_webhooks(state: StateDep, limit: Limit = 20, after: OptionalText = None) -> Page[Webhook]:
    """List the webhooks, newest first."""
    with state.database.read() as session:
        rows, has_more = store.page(session, limit, after)
    return Page(data=[Webhook.model_validate(row) for row in rows], has_more=has_more)


@router.get("/{webhook_id}")
def get_webhook(state: StateDep, webhook_id: str) -> Webhook:
    """Return one webhook."""
    with state.database.read() as session:
        return Webhook.model_validate(store.find(session, webhook_id))


@router.patch("/{webhook_id}")
def update_webhook(
    state: StateDep,
    caller: PrincipalDep,
    webhook_id: str,
    changes: PatchWebhookBody = Body(default_factory=PatchWebhookBody),
) -> Webhook:
    """Change `url`, `description`, `events`, `labels`, `rules`, `enabled`. Enabling clears the failure count."""
    if "url" in changes.model_fields_set:
        requests.require_allowed(changes.url, state.settings.webhook_networks, state.sender.notices, caller)
    with state.database.write() as session:
        row = store.find(session, webhook_id, lock=True)
        changed = requests.apply_changes(store.request_of(row), changes)
        store.change(session, row, changed, utc_now())
    state.sender.wake()
    return Webhook.model_validate(row)


@router.delete("/{webhook_id}", status_code=204)
def delete_webhook(state: StateDep, webhook_id: str) -> None:
    """Delete the webhook, its pending deliveries and its delivery log."""
    with state.database.write() as session:
        store.remove(session, webhook_id)


@router.post("/{webhook_id}/rotate", dependencies=[NO_FIELDS])
def rotate_webhook_secret(state: StateDep, webhook_id: str) -> WebhookWithSecret:
    """Create a new secret, which only this response has. Deliveries are signed with both secrets for 24 hours."""
    with state.database.write() as session:
        row = store.find(session, webhook_id, lock=True)
        store.rotate(row, utc_now())
    return _with_secret(row)


@router.post("/{webhook_id}/test", status_code=202, dependencies=[NO_FIELDS])
def test_webhook(state: StateDep, webhook_id: str) -> Delivery:
    """Send one `webhook.test` event, even if the webhook is disabled. The delivery shows the result."""
    with state.database.write() as session:
        row = store.test(session, webhook_id, utc_now())
    state.sender.wake()
    return _to_delivery_response(row)


@router.get("/{webhook_id}/deliveries")
def list_deliveries(
    app_state: StateDep,
    webhook_id: str,
    state: Literal["pending", "delivered", "failed"] | None = None,
    limit: Limit = 20,
    after: After = None,
) -> Page[Delivery]:
    """List the deliveries, newest first."""
    with app_state.database.read() as session:
        rows, has_more = store.deliveries(session, webhook_id, state, limit, after)
    return Page(data=[_to_delivery_response(row) for row in rows], has_more=has_more)


@router.get("/{webhook_id}/deliveries/{delivery_id}")
def get_delivery(state: StateDep, webhook_id: str, delivery_id: Number) -> DeliveryWithPayload:
    """Return one delivery with its payload."""
    with state.database.read() as session:
        row = store.delivery(session, webhook_id, delivery_id)
    return DeliveryWithPayload(**vars(_to_delivery_response(row)), payload=json.loads(row.body))


@router.post("/{webhook_id}/deliveries/{delivery_id}/redeliver", status_code=202, dependencies=[NO_FIELDS])
def redeliver_event(state: StateDep, webhook_id: str, delivery_id: Number) -> Delivery:
    """Send the event again, with the same event id. A pending delivery is sent now."""
    with state.database.write() as session:
        row = store.redeliver(session, webhook_id, delivery_id, utc_now())
    state.sender.wake()
    return _to_delivery_response(row)


def _with_secret(row: WebhookRow) -> WebhookWithSecret:
    # Notices are not signed.
    shown = WebhookWithSecret.model_validate(row)
    return shown.model_copy(update={"secret": None}) if is_notice_url(row.url) else shown


def _to_delivery_response(row: DeliveryRow) -> Delivery:
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
