"""When to retry a delivery, when to give it up, and when to disable a webhook. Pure."""

from collections import Counter
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from datetime import datetime, timedelta

from trainyard.service.webhooks.http_client import DeliveryResult

MIN_SECONDS = 5.0
MAX_SECONDS = 3600.0
GIVE_UP_AFTER = timedelta(hours=24)
"""A delivery is retried for this long after its event."""

DISABLE_AFTER = timedelta(days=3)
"""A webhook whose receiver accepted nothing for this long is disabled until a user enables it."""

MAX_FAILURES = 3
"""After this many failures in a row a receiver counts as down: one delivery at a time, and a pause for all of them."""

MAX_CONCURRENT = 4
"""Deliveries to one webhook at the same time, each of another lane."""

MAX_SENDING = 128
"""Deliveries that are sent at the same time: the first one to each receiver."""

MAX_SHARED = 16
"""Further deliveries to a receiver start only while fewer than this are being sent."""

MAX_SLOW = 64
"""Deliveries to slow receivers at the same time. The other places are free for quick ones."""

MAX_NOTICES = 8
"""Notices at the same time: each is a process of its own."""

MAX_SLOW_NOTICES = 6
"""Notices to slow receivers at the same time."""

SLOW_SECONDS = 1.0

GONE = 410
"""The HTTP status by which a receiver unsubscribes."""


@dataclass(frozen=True)
class RetryDecision:
    """What follows from a failure. ``retry_at`` None: give up. ``disable``: why to disable the webhook."""

    retry_at: datetime | None
    disable: str | None = None


def backoff(failures: int, chance: float) -> float:
    """Return the seconds to wait after the ``failures``-th failure in a row. ``chance`` in [0, 1) is the jitter."""
    # The exponent is bounded, because 2.0 ** 1024 overflows.
    seconds = min(MIN_SECONDS * 2.0 ** min(failures - 1, 30), MAX_SECONDS)
    return seconds * (1.0 - 0.5 * chance)


def after_failure(
    result: DeliveryResult, attempts: int, created_at: datetime, failing_since: datetime, now: datetime, chance: float
) -> RetryDecision:
    """Decide what follows from a failed attempt; ``attempts`` includes it."""
    if result.status == GONE:
        return RetryDecision(None, "the receiver answered 410 Gone")
    disable = None
    if now - failing_since >= DISABLE_AFTER:
        disable = f"the receiver has accepted nothing for {DISABLE_AFTER.days} days"
    if disable is not None or now - created_at >= GIVE_UP_AFTER:
        return RetryDecision(None, disable)
    seconds = backoff(attempts, chance)
    if result.retry_after is not None:
        seconds = max(seconds, min(result.retry_after, MAX_SECONDS))
    return RetryDecision(now + timedelta(seconds=seconds))


@dataclass(frozen=True)
class NextDelivery:
    """The first pending delivery of a lane. ``failures``: its webhook's failures in a row."""

    number: int
    webhook_id: str
    failures: int
    is_notice: bool = False


def pick(
    queue: Sequence[NextDelivery],
    busy: Mapping[int, str],
    slow: Set[str] = frozenset(),
    notices: Set[str] = frozenset(),
) -> list[NextDelivery]:
    """Return the deliveries to send now, so that no receiver waits for another one.

    The first delivery to each receiver comes before the second one to any. ``busy``: delivery -> webhook of those being
    sent. ``slow``: webhooks whose last delivery took longer than SLOW_SECONDS. ``notices``: webhooks that send notices.
    """
    picked: list[NextDelivery] = []
    load = Counter(busy.values())
    groups = ((slow, MAX_SLOW), (notices, MAX_NOTICES), (slow & notices, MAX_SLOW_NOTICES))
    sending = [sum(webhook_id in group for webhook_id in busy.values()) for group, _ in groups]
    waiting = [delivery for delivery in queue if delivery.number not in busy]
    for share in range(1, MAX_CONCURRENT + 1):
        left = []
        for delivery in waiting:
            webhook_id = delivery.webhook_id
            most = MAX_SENDING if share == 1 else MAX_SHARED
            limit = share if delivery.failures < MAX_FAILURES else 1
            group_full = any(webhook_id in group and n >= cap for (group, cap), n in zip(groups, sending, strict=True))
            if load[webhook_id] >= limit or group_full or len(busy) + len(picked) >= most:
                left.append(delivery)
                continue
            load[webhook_id] += 1
            sending = [n + (webhook_id in group) for (group, _), n in zip(groups, sending, strict=True)]
            picked.append(delivery)
        waiting = left
    return picked
