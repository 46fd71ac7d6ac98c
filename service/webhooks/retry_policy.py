"""When a delivery is tried again, when it is given up, and when a receiver is left alone. Pure."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from trainyard.service.webhooks.http_client import DeliveryResult

MIN_SECONDS = 5.0
MAX_SECONDS = 3600.0
GIVE_UP_AFTER = timedelta(hours=24)
"""A delivery is tried for so long after its event."""

DISABLE_AFTER = timedelta(days=3)
"""A receiver that took nothing for so long hears nothing more until somebody looks."""

MAX_FAILURES = 3
"""After so many failed tries in a row a receiver is taken to be away: one try at a time, with pauses for all of it."""

MAX_CONCURRENT = 4
"""Deliveries that one receiver is sent at once, of different jobs."""

GONE = 410
"""A receiver's way to say: never again."""


@dataclass(frozen=True)
class RetryDecision:
    """What follows from a try. ``retry_at`` None: the delivery is over. ``disable``: why the webhook is to be off."""

    retry_at: datetime | None
    disable: str | None = None


def backoff(failures: int, chance: float) -> float:
    """Seconds after the ``failures``-th failed try in a row; ``chance`` in [0, 1) takes off up to half of it."""
    # Bounded before it is raised: 2 to the power of what a receiver is away for is no float any more.
    whole = min(MIN_SECONDS * 2.0 ** min(failures - 1, 30), MAX_SECONDS)
    return whole * (1.0 - 0.5 * chance)


def after_failure(
    answer: DeliveryResult, attempts: int, created_at: datetime, failing_since: datetime, now: datetime, chance: float
) -> RetryDecision:
    """What to do after a try that failed; ``attempts`` counts it."""
    if answer.status == GONE:
        return RetryDecision(None, "the receiver answered 410 Gone")
    disable = None
    if now - failing_since >= DISABLE_AFTER:
        disable = f"the receiver has taken nothing for {DISABLE_AFTER.days} days"
    if disable is not None or now - created_at >= GIVE_UP_AFTER:
        return RetryDecision(None, disable)
    seconds = backoff(attempts, chance)
    if answer.retry_after is not None:
        seconds = max(seconds, min(answer.retry_after, MAX_SECONDS))
    return RetryDecision(now + timedelta(seconds=seconds))


@dataclass(frozen=True)
class NextDelivery:
    """The first open delivery of a lane. ``failures``: its receiver's tries in a row that failed."""

    number: int
    webhook_id: str
    failures: int


def pick(heads: Sequence[NextDelivery], busy: Mapping[int, str], free: int) -> list[NextDelivery]:
    """Which to send now. ``busy``: delivery -> webhook of those on their way; ``free``: how many more may be."""
    picked: list[NextDelivery] = []
    load: dict[str, int] = {}
    for webhook_id in busy.values():
        load[webhook_id] = load.get(webhook_id, 0) + 1
    for head in heads:
        most = MAX_CONCURRENT if head.failures < MAX_FAILURES else 1
        if head.number in busy or load.get(head.webhook_id, 0) >= most:
            continue
        if len(picked) == free:
            break
        load[head.webhook_id] = load.get(head.webhook_id, 0) + 1
        picked.append(head)
    return picked
