"""The webhook routes of the service, as `Client.webhooks`."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast
from urllib.parse import quote

from trainyard.client.connection import Connection
from trainyard.client.pages import Pages
from trainyard.client.types import Delivery, Webhook

if TYPE_CHECKING:
    from trainyard.client.async_connection import AsyncConnection

CHECK_SECONDS = 90.0
"""For the service to check a URL. It loads Apprise for the first one of its kinds, which takes long on a busy host."""


class WebhookRequests:
    """What the webhooks of both clients share."""

    def __init__(self, connection: "Connection | AsyncConnection") -> None:
        self._connection = connection

    def _webhook(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> Webhook:
        timeout = None if body is None else CHECK_SECONDS
        return cast(Webhook, self._connection.request(method, path, body=body, timeout=timeout))

    def _pages(self, path: str, params: Mapping[str, Any] | None = None, limit: int | None = None) -> Pages[Any]:
        return cast(Pages[Any], self._connection.each(self._connection.list_pages(path, params, limit)))


class Webhooks(WebhookRequests):
    """One method for each route. Every method raises `ServiceUnreachable` and `ApiError`, as those of `Client`."""

    def create(self, /, url: str, **fields: Any) -> Webhook:
        """Create a webhook that sends events to ``url``. The result has its ``secret``.

        A URL of Apprise's kinds, such as ``slack://...``, gets a short text. It is not shown again, and has no secret.

        ``fields``: ``events``, ``rules``, ``labels``, ``job_id``, ``description``.

        Raises:
            InvalidSpec: ``errors`` lists all problems of the fields.
        """
        return self._webhook("POST", "/webhooks", {"url": url, **fields})

    def list(self) -> Pages[Webhook]:
        """Iterate over the webhooks, newest first."""
        return self._pages("/webhooks")

    def get(self, webhook_id: str) -> Webhook:
        """Return the webhook with this id."""
        return self._webhook("GET", _path(webhook_id))

    def change(self, /, webhook_id: str, **fields: Any) -> Webhook:
        """Change fields of a webhook. ``enabled=True`` enables one that was disabled and resets its failures.

        Raises:
            InvalidSpec: ``errors`` lists all problems of the fields.
        """
        return self._webhook("PATCH", _path(webhook_id), fields)

    def delete(self, webhook_id: str) -> None:
        """Delete a webhook, with its deliveries."""
        return cast(None, self._connection.request("DELETE", _path(webhook_id)))

    def rotate(self, webhook_id: str) -> Webhook:
        """Replace the ``secret``. For 24 hours the old one signs as well."""
        return self._webhook("POST", _path(webhook_id, "rotate"))

    def test(self, webhook_id: str) -> Delivery:
        """Send the event `webhook.test` once. The delivery has the result a moment later."""
        return cast(Delivery, self._connection.request("POST", _path(webhook_id, "test")))

    def deliveries(self, webhook_id: str, *, state: str | None = None, limit: int | None = None) -> Pages[Delivery]:
        """Iterate over the deliveries, sent and pending, newest first; at most ``limit``."""
        return self._pages(_path(webhook_id, "deliveries"), {"state": state}, limit)

    def delivery(self, webhook_id: str, delivery_id: str) -> Delivery:
        """Return one delivery, with its payload."""
        return cast(Delivery, self._connection.request("GET", _path(webhook_id, "deliveries", delivery_id)))

    def redeliver(self, webhook_id: str, delivery_id: str) -> Delivery:
        """Send the event again, with the same event id."""
        path = _path(webhook_id, "deliveries", delivery_id, "redeliver")
        return cast(Delivery, self._connection.request("POST", path))


def _path(webhook_id: str, *below: str) -> str:
    return "/".join(["/webhooks", *(quote(part, safe="") for part in (webhook_id, *below))])
