"""Send the deliveries, in a thread of the server that is the leader.

A delivery is claimed before it is sent, and its result is stored after, each in a transaction that fails if another
server has become the leader. A claimed delivery without a result is sent again: at least once, with the same event id.
"""

import json
import logging
import random
import secrets
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy.exc import InterfaceError, OperationalError
from sqlalchemy.orm import Session

from trainyard.contract.failpoints import hit
from trainyard.service.clock import utc_now
from trainyard.service.db.engine import Database
from trainyard.service.db.models import DeliveryRow, WebhookRow
from trainyard.service.errors import DatabaseUnavailable, OutcomeUnknown
from trainyard.service.jobs.event_outbox import DELIVERED, FAILED, PENDING
from trainyard.service.leadership import LeaderLease, LeadershipLost, fenced
from trainyard.service.notice_urls import is_notice_url
from trainyard.service.webhooks import delivery_queue, signing, store
from trainyard.service.webhooks.delivery_queue import ExpiredClaims
from trainyard.service.webhooks.http_client import DeliveryResult, WebhookClient
from trainyard.service.webhooks.notice_client import NoticeClient
from trainyard.service.webhooks.notices import notice
from trainyard.service.webhooks.requests import TEST
from trainyard.service.webhooks.retry_policy import MAX_FAILURES, SLOW_SECONDS, after_failure, backoff, pick
from trainyard.service.webhooks.rule_engine import RuleEngine

ROUND_SECONDS = 1.0
GRACE_SECONDS = 5.0
"""Another sender's claims expire this long after the deadline of its requests."""

MAX_TRIES = 20
SWEEP_SECONDS = 3600.0
STOP_SECONDS = 3.0

log = logging.getLogger("trainyard")


@dataclass(frozen=True)
class ClaimedDelivery:
    """A delivery to send, read in the transaction that claimed it. ``secrets``: those that sign."""

    number: int
    webhook_id: str
    event_id: str
    url: str
    secrets: tuple[str, ...]
    body: bytes


class Sender:
    """Runs rounds in a thread; each delivery has a thread of its own. Tests call `round`."""

    def __init__(
        self,
        database: Database,
        client: WebhookClient,
        lease: LeaderLease | None = None,
        clock: Callable[[], datetime] = utc_now,
        monotonic: Callable[[], float] = time.monotonic,
        enabled: bool = True,
        notices: NoticeClient | None = None,
    ) -> None:
        self._database = database
        self._client = client
        self.notices = notices or NoticeClient()
        self._lease = lease
        self._clock = clock
        self._monotonic = monotonic
        self._enabled = enabled
        self._rule_engine = RuleEngine(database, lease, clock, monotonic)
        self._name = secrets.token_hex(8)
        self._busy: dict[int, str] = {}
        self._slow: set[str] = set()
        self._notice_webhooks: set[str] = set()
        self._changed = threading.Condition()
        self._epoch: int | None = None
        self._led_since = monotonic()
        self._swept_at = float("-inf")
        self._wake = threading.Event()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="webhooks", daemon=True)

    def start(self) -> None:
        """Start the thread, unless sending is disabled on this server."""
        if self._enabled:
            self._thread.start()

    def stop(self) -> None:
        """Stop. Deliveries being sent have STOP_SECONDS to finish; the next leader sends the others again."""
        self._stopping.set()
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join(STOP_SECONDS)
        self.deliver_until_idle(STOP_SECONDS)
        self.notices.close()

    def wake(self) -> None:
        """Start a round now, because there is something to send."""
        self._wake.set()

    def deliver_until_idle(self, seconds: float) -> bool:
        """Wait until no delivery is being sent; return False if that takes longer than ``seconds``."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._busy, seconds)

    def round(self) -> int:
        """Evaluate the rules, start to send the deliveries that are due, and return how many."""
        if not self._is_leader():
            return 0
        self._rule_engine.poll()
        self._sweep()
        with self._database.read() as session:
            queue = delivery_queue.next_deliveries(session, self._clock(), self._name, self._expired_claims())
        with self._changed:
            for delivery in queue:  # a webhook's URL may have changed
                change = self._notice_webhooks.add if delivery.is_notice else self._notice_webhooks.discard
                change(delivery.webhook_id)
            picked = pick(queue, self._busy, self._slow, self._notice_webhooks)
            self._busy |= {delivery.number: delivery.webhook_id for delivery in picked}
        for delivery in picked:
            threading.Thread(target=self._deliver, args=(delivery.number,), name="webhook", daemon=True).start()
        return len(picked)

    def _is_leader(self) -> bool:
        # A new leader remembers since when: its predecessor may still be sending.
        if self._lease is None:
            return True
        leads = self._lease.fresh()
        if leads and self._lease.epoch != self._epoch:
            self._epoch, self._led_since = self._lease.epoch, self._monotonic()
        return leads

    def _expired_claims(self) -> ExpiredClaims:
        led = self._monotonic() - self._led_since - GRACE_SECONDS
        return ExpiredClaims(webhooks=led > self._client.seconds, notices=led > self.notices.seconds)

    def _sweep(self) -> None:
        if self._monotonic() - self._swept_at > SWEEP_SECONDS:
            self._swept_at = self._monotonic()
            with fenced(self._database, self._lease) as session:
                delivery_queue.sweep(session, self._clock())

    def _run(self) -> None:
        while not self._stopping.is_set():
            try:
                self.round()
            except LeadershipLost:
                log.warning("another service sends the webhooks now")
            except Exception:
                log.exception("a round of the webhooks failed")
            self._wake.wait(ROUND_SECONDS)
            self._wake.clear()

    def _deliver(self, number: int) -> None:
        try:
            claimed = self._claim(number)
            hit("webhooks.claimed")
            # If the process slept here, another server may have claimed the delivery: check the lease last.
            if claimed is not None and self._is_leader():
                self._record(claimed, self._send(claimed))
        except LeadershipLost:
            log.warning("another service sends the webhooks now", extra={"delivery_id": number})
        except Exception:
            log.exception("a delivery failed unexpectedly", extra={"delivery_id": number})
        finally:
            with self._changed:
                del self._busy[number]
                self._changed.notify_all()
            self._wake.set()

    def _claim(self, number: int) -> ClaimedDelivery | None:
        with fenced(self._database, self._lease) as session:
            webhook, delivery = _lock(session, number)
            if webhook is None or delivery is None or delivery.state != PENDING:
                return None
            delivery.claimed_by = self._name
            delivery.attempts += 1
            keys = tuple(store.secrets_of(webhook, self._clock()))
            return ClaimedDelivery(number, webhook.id, delivery.event_id, webhook.url, keys, delivery.body.encode())

    def _send(self, claimed: ClaimedDelivery) -> DeliveryResult:
        if is_notice_url(claimed.url):
            result = self.notices.send(claimed.url, notice(json.loads(claimed.body), self.notices.public_url))
        else:
            signed = signing.headers(claimed.secrets, claimed.event_id, int(self._clock().timestamp()), claimed.body)
            result = self._client.post(claimed.url, signed, claimed.body)
        with self._changed:
            change = self._slow.add if result.seconds > SLOW_SECONDS else self._slow.discard
            change(claimed.webhook_id)
        outcome = result.status if result.status is not None else result.error
        fields = {"webhook_id": claimed.webhook_id, "event_id": claimed.event_id, "seconds": round(result.seconds, 3)}
        log.info("webhook sent: %s", outcome, extra=fields)
        return result

    def _record(self, claimed: ClaimedDelivery, result: DeliveryResult) -> None:
        # While the database is unavailable, retry as long as this server is the leader.
        while True:
            try:
                with fenced(self._database, self._lease) as session:
                    self._apply_result(session, claimed, result)
                return
            except (OperationalError, InterfaceError, DatabaseUnavailable, OutcomeUnknown):
                if not self._is_leader() or self._stopping.wait(ROUND_SECONDS):
                    raise

    def _apply_result(self, session: Session, claimed: ClaimedDelivery, result: DeliveryResult) -> None:
        webhook, delivery = _lock(session, claimed.number)
        if webhook is None or delivery is None or delivery.claimed_by != self._name:
            return
        now = self._clock()
        delivery.claimed_by = None
        delivery.tries = [*delivery.tries, _attempt_entry(result, claimed, now)][-MAX_TRIES:]
        if result.accepted:
            _end(delivery, DELIVERED, now)
            webhook.failures, webhook.failing_since, webhook.retry_at, webhook.succeeded_at = 0, None, None, now
        elif delivery.kind == TEST:
            _end(delivery, FAILED, now)
        else:
            _record_failure(webhook, delivery, result, now)


def _lock(session: Session, number: int) -> tuple[WebhookRow | None, DeliveryRow | None]:
    # The webhook first, in the same order as `store.redeliver`, so that they cannot deadlock.
    delivery = session.get(DeliveryRow, number)
    if delivery is None:
        return None, None
    webhook = session.query(WebhookRow).filter_by(id=delivery.webhook_id).with_for_update(key_share=True).one_or_none()
    session.refresh(delivery, with_for_update=True)
    return webhook, delivery


def _record_failure(webhook: WebhookRow, delivery: DeliveryRow, result: DeliveryResult, now: datetime) -> None:
    webhook.failures += 1
    webhook.failing_since = webhook.failing_since or now
    chance = random.random()  # noqa: S311 - jitter, not security
    decision = after_failure(result, delivery.attempts, delivery.created_at, webhook.failing_since, now, chance)
    if decision.retry_at is None:
        _end(delivery, FAILED, now)
    else:
        delivery.next_at = decision.retry_at
    if webhook.failures >= MAX_FAILURES:
        webhook.retry_at = now + timedelta(seconds=backoff(webhook.failures, chance))
    if decision.disable is not None:
        webhook.enabled, webhook.disabled_reason = False, decision.disable
        log.warning("a webhook was disabled: %s", decision.disable, extra={"webhook_id": webhook.id})


def _end(delivery: DeliveryRow, state: str, now: datetime) -> None:
    delivery.state, delivery.ended_at, delivery.next_at = state, now, None


def _attempt_entry(result: DeliveryResult, claimed: ClaimedDelivery, now: datetime) -> dict[str, Any]:
    snippet = result.snippet
    for secret in claimed.secrets:
        # A receiver may echo its secret, which must not be shown.
        snippet = snippet.replace(secret, "***") if snippet is not None else None
    return {
        "at": now.isoformat().replace("+00:00", "Z"),
        "status": result.status,
        "seconds": round(result.seconds, 6),
        "error": result.error,
        "response": snippet,
    }
