"""Webhooks of the service, as `Trainyard.webhooks`: one method for each route."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, cast
from urllib.parse import quote

from trainyard.client.connection import Connection
from trainyard.client.types import Delivery, Webhook

Pages = Callable[..., Iterator[dict[str, Any]]]


class Webhooks:
    """Who is told of jobs. Every method raises what all calls raise: `ServiceUnreachable` and `Refused`."""

    def __init__(self, connection: Connection, pages: Pages) -> None:
        self._connection = connection
        self._pages = pages

    def create(self, url: str, **fields: Any) -> Webhook:
        """Send events to ``url``: ``events``, ``rules``, ``labels``, ``job_id``, ``description``. It has the secret."""
        return self._call("POST", "/webhooks", {"url": url, **fields})

    def list(self) -> Iterator[Webhook]:
        """All of them, newest first."""
        return cast(Iterator[Webhook], self._pages("/webhooks"))

    def get(self, webhook_id: str) -> Webhook:
        """One of them."""
        return self._call("GET", _path(webhook_id))

    def change(self, webhook_id: str, **fields: Any) -> Webhook:
        """Make it another one; ``enabled`` True begins anew with one that was switched off."""
        return self._call("PATCH", _path(webhook_id), fields)

    def delete(self, webhook_id: str) -> None:
        """Remove it, with what it was still to be sent and its log."""
        self._connection.call("DELETE", _path(webhook_id))

    def rotate(self, webhook_id: str) -> Webhook:
        """A new ``secret``; for 24 hours the old one signs as well."""
        return self._call("POST", _path(webhook_id, "rotate"))

    def test(self, webhook_id: str) -> Delivery:
        """Send `webhook.test` once; what came of it stands in the delivery a moment later."""
        return cast(Delivery, self._connection.call("POST", _path(webhook_id, "test")))

    def deliveries(self, webhook_id: str, *, state: str | None = None, limit: int | None = None) -> Iterator[Delivery]:
        """What was sent and what waits, newest first; at most ``limit``."""
        return cast(Iterator[Delivery], self._pages(_path(webhook_id, "deliveries"), {"state": state}, limit))

    def delivery(self, webhook_id: str, delivery_id: str) -> Delivery:
        """One of them, with its payload."""
        return cast(Delivery, self._connection.call("GET", _path(webhook_id, "deliveries", delivery_id)))

    def redeliver(self, webhook_id: str, delivery_id: str) -> Delivery:
        """Send it once more, under the same event id."""
        path = _path(webhook_id, "deliveries", delivery_id, "redeliver")
        return cast(Delivery, self._connection.call("POST", path))

    def _call(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> Webhook:
        return cast(Webhook, self._connection.call(method, path, body=body))


def _path(webhook_id: str, *below: str) -> str:
    return "/".join(["/webhooks", *(quote(part, safe="") for part in (webhook_id, *below))])
