"""The log of the service, as text or JSON lines with fields, without secrets.

``log.info("launching", extra={"job_id": ..., "attempt": ...})`` adds fields to one line; `log_context` adds them to all
lines of a block. Secrets are removed from every line, also from those of libraries.
"""

import contextlib
import json
import logging
import re
import sys
from collections.abc import Iterable, Iterator
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Any, Literal, TextIO

Format = Literal["json", "text"]
Level = Literal["debug", "error", "info", "warning"]

REDACTED = "***"
MIN_SECRET_LENGTH = 6
"""A shorter secret would match ordinary text."""

CREDENTIALS = re.compile(r"(?i)(?:(\bbearer\s+|\bwhsec_)[^\s@\"',]+|(://[^\s/:@]*:)[^\s\"',]+(?=@))")
"""What follows the word Bearer, the password in a URL, and the secret of a webhook."""

NOISY_LOGGERS = ("alembic", "httpx2", "httpcore2", "mcp")
"""Libraries that log every step, HTTP clients even with the full URL. Limited to warnings."""

STANDARD_ATTRIBUTES = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName", "color_message"}
"""Attributes that every record has: not what a line is about."""

UNQUOTED = re.compile(r"[\w.:/{}+*-]+")

_context: ContextVar[dict[str, Any] | None] = ContextVar("about", default=None)


@contextlib.contextmanager
def log_context(**fields: Any) -> Iterator[dict[str, Any]]:
    """Add ``fields`` to every line logged in the block, also in threads that run with a copy of its context."""
    context = {**(_context.get() or {}), **fields}
    token = _context.set(context)
    try:
        yield context
    finally:
        _context.reset(token)


def bind(**fields: Any) -> None:
    """Add ``fields`` to the enclosing `log_context` block. Takes effect in all its threads."""
    context = _context.get()
    if context is not None:
        context.update(fields)


def configure_logging(format_: str, level: str, secrets: Iterable[str] = (), stream: TextIO | None = None) -> None:
    """Write all log lines of the process, also of libraries, to ``stream`` (default: stderr) in one format."""
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(formatter(format_, secrets))
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    logging.captureWarnings(True)
    for name in NOISY_LOGGERS:
        logging.getLogger(name).setLevel(logging.WARNING)


def formatter(format_: str, secrets: Iterable[str] = ()) -> logging.Formatter:
    """Return the formatter of a format. It replaces ``secrets`` by asterisks."""
    return (JsonFormatter if format_ == "json" else TextFormatter)(RedactingFilter(secrets))


class RedactingFilter:
    """Replaces known secrets, and text that looks like a credential."""

    def __init__(self, secrets: Iterable[str]) -> None:
        known = sorted({secret for secret in secrets if len(secret) >= MIN_SECRET_LENGTH}, key=len, reverse=True)
        self._known = re.compile("|".join(map(re.escape, known))) if known else None

    def __call__(self, text: str) -> str:
        if self._known is not None:
            text = self._known.sub(REDACTED, text)
        return CREDENTIALS.sub(lambda found: f"{found[1] or found[2]}{REDACTED}", text)


class _LineFormatter(logging.Formatter):
    def __init__(self, redact: RedactingFilter) -> None:
        super().__init__()
        self._redact = redact

    def _fields(self, record: logging.LogRecord) -> dict[str, Any]:
        own = {
            key: value for key, value in vars(record).items() if key not in STANDARD_ATTRIBUTES and value is not None
        }
        return {key: self._clean(value) for key, value in {**(_context.get() or {}), **own}.items()}

    def _clean(self, value: Any) -> Any:
        return value if isinstance(value, bool | int | float) else self._redact(str(value))

    def _message(self, record: logging.LogRecord) -> str:
        return self._redact(record.getMessage())

    def _traceback(self, record: logging.LogRecord) -> str:
        return self._redact(self.formatException(record.exc_info)) if record.exc_info else ""


class JsonFormatter(_LineFormatter):
    """One JSON object per line: ``at, level, logger, message``, the fields, and ``traceback`` if there is one."""

    def format(self, record: logging.LogRecord) -> str:
        head = {"at": _at(record), "level": record.levelname.lower(), "logger": record.name}
        fields = {**head, "message": self._message(record), **self._fields(record)}
        traceback = self._traceback(record)
        return json.dumps({**fields, "traceback": traceback} if traceback else fields)


class TextFormatter(_LineFormatter):
    """Time, level, logger, message, then ``key=value``. Line breaks are removed, but not from tracebacks."""

    def format(self, record: logging.LogRecord) -> str:
        fields = [f"{key}={_quote(value)}" for key, value in self._fields(record).items()]
        message = " ".join(self._message(record).splitlines())
        line = " ".join([_at(record), record.levelname, record.name, message, *fields])
        traceback = self._traceback(record)
        return f"{line}\n{traceback}" if traceback else line


def _quote(value: Any) -> str:
    text = str(value)
    return text if UNQUOTED.fullmatch(text) else json.dumps(text)


def _at(record: logging.LogRecord) -> str:
    return datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
