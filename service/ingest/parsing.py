"""Parse reported outbox lines into storable events; lines that cannot be parsed become warnings. Pure."""

import math
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

from pydantic import ValidationError

from trainyard.contract.events import EVENT, Event, WarningEvent
from trainyard.contract.messages import ExitReport

MAX_INTEGER = 2**63 - 1
MAX_TEXT = 100_000


def contiguous(lines: Iterable[dict[str, Any]], acked: int) -> Iterator[dict[str, Any]]:
    """Yield the lines after ``acked``, in order, up to the first gap.

    A line without a valid ``seq`` is a gap.
    """
    by_seq = {line["seq"]: line for line in lines if type(line.get("seq")) is int}
    while acked + 1 in by_seq:
        acked += 1
        yield by_seq[acked]


def parse_event(line: dict[str, Any]) -> Event:
    """Return the line as an event, or a warning if it is invalid or cannot be stored."""
    try:
        event = EVENT.validate_python(_storable(line))
        # Copying each of thousands of points costs as much as validating it.
        return event if event.at.utcoffset() == timedelta(0) else event.model_copy(update={"at": _utc(event.at)})
    except (ValidationError, OverflowError, _Unstorable) as error:
        kind = line.get("kind")
        of_kind = f" of kind {kind[:40]!a}" if isinstance(kind, str) else ""
        message = f"line {line['seq']} of the outbox{of_kind} cannot be read"
        return WarningEvent(
            seq=line["seq"], code="unreadable_line", message=message, data={"why": type(error).__name__}
        )


def _utc(at: datetime) -> datetime:
    # A time without a zone is UTC.
    return at.replace(tzinfo=UTC) if at.tzinfo is None else at.astimezone(UTC)


class _Unstorable(ValueError):
    """A value that no database column accepts."""


def _storable(value: Any, depth: int = 0) -> Any:
    """Return ``value`` without NUL characters, lone surrogates and non-finite numbers.

    Raises _Unstorable for numbers beyond 64 bits and for deep nesting.
    """
    if depth > 20:
        raise _Unstorable()
    if isinstance(value, dict):
        return _without_nonfinite({_storable_text(str(k)): _storable(v, depth + 1) for k, v in value.items()})
    if isinstance(value, list):
        return [_storable(item, depth + 1) for item in value]
    if isinstance(value, str):
        return _storable_text(value)
    if isinstance(value, int) and abs(value) > MAX_INTEGER:
        raise _Unstorable()
    return value


def _without_nonfinite(value: dict[str, Any]) -> dict[str, Any]:
    nonfinite = [k for k, v in value.items() if isinstance(v, float) and not math.isfinite(v)]
    return {**value, **dict.fromkeys(nonfinite), "nonfinite": True} if nonfinite else value


def _storable_text(value: str) -> str:
    if len(value) <= MAX_TEXT and value.isascii() and "\0" not in value:
        return value
    return value[:MAX_TEXT].replace("\0", "\N{REPLACEMENT CHARACTER}").encode(errors="replace").decode()


def plain_report(report: ExitReport) -> ExitReport:
    """Return the exit report with storable texts and a time zone."""
    try:
        clean = ExitReport.model_validate(_storable(report.model_dump(mode="json")))
        return clean.model_copy(update={"ended_at": _utc(report.ended_at), "step": max(0, report.step)})
    except (_Unstorable, OverflowError):
        # Only the outcome, the reason and the message can be stored.
        return ExitReport(
            outcome=report.outcome,
            step=0,
            reason=report.reason,
            message=_storable_text(report.message),
            last_seq=0,
            ended_at=datetime.now(UTC),
        )
