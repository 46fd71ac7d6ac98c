"""The service's log: a line for each thing that happens, as text or JSON, with what it is about in fields of its own.

``log.info("launching", extra={"job_id": ..., "attempt": ...})`` gives a line its fields; `about` gives them to all
lines that are written meanwhile. Secrets are blacked out in whatever is written, by whomever.
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
"""What is shorter stands in every other line by chance."""

CREDENTIALS = re.compile(r"(?i)(\bbearer\s+|://[^\s/:@]*:|\bwhsec_)[^\s@\"',]+")
"""What follows the word Bearer, the password of a URL, and the secret of a webhook."""

NOISY_LOGGERS = ("alembic", "httpx2", "httpcore2")
"""Libraries that say at each step what they do; clients of others even whole addresses."""

OURS = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName", "color_message"}
"""Attributes that every record has: not what a line is about."""

BARE = re.compile(r"[\w.:/{}+*-]+")

_context: ContextVar[dict[str, Any] | None] = ContextVar("about", default=None)


@contextlib.contextmanager
def log_context(**fields: Any) -> Iterator[dict[str, Any]]:
    """Every line until the end of the block has ``fields``, also those of threads that work for it."""
    found = {**(_context.get() or {}), **fields}
    token = _context.set(found)
    try:
        yield found
    finally:
        _context.reset(token)


def bind(**fields: Any) -> None:
    """Add to what the block around us is about; known from then on, also outside of this thread."""
    found = _context.get()
    if found is not None:
        found.update(fields)


def configure_logging(format_: str, level: str, secrets: Iterable[str] = (), stream: TextIO | None = None) -> None:
    """Everything that is logged in this process, by libraries too, goes to ``stream`` (stderr) in one format."""
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(formatter(format_, secrets))
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    logging.captureWarnings(True)
    for name in NOISY_LOGGERS:
        logging.getLogger(name).setLevel(logging.WARNING)


def formatter(format_: str, secrets: Iterable[str] = ()) -> logging.Formatter:
    """Return the formatter of a Format, which hides ``secrets``."""
    return (JsonFormatter if format_ == "json" else TextFormatter)(RedactingFilter(secrets))


class RedactingFilter:
    """Blacks out the secrets that are known, and what looks like one."""

    def __init__(self, secrets: Iterable[str]) -> None:
        known = sorted({secret for secret in secrets if len(secret) >= MIN_SECRET_LENGTH}, key=len, reverse=True)
        self._known = re.compile("|".join(map(re.escape, known))) if known else None

    def __call__(self, text: str) -> str:
        """``text`` without them."""
        if self._known is not None:
            text = self._known.sub(REDACTED, text)
        return CREDENTIALS.sub(rf"\g<1>{REDACTED}", text)


class _LineFormatter(logging.Formatter):
    def __init__(self, censor: RedactingFilter) -> None:
        super().__init__()
        self._censor = censor

    def _fields(self, record: logging.LogRecord) -> dict[str, Any]:
        own = {key: value for key, value in vars(record).items() if key not in OURS and value is not None}
        return {key: self._clean(value) for key, value in {**(_context.get() or {}), **own}.items()}

    def _clean(self, value: Any) -> Any:
        return value if isinstance(value, bool | int | float) else self._censor(str(value))

    def _message(self, record: logging.LogRecord) -> str:
        return self._censor(record.getMessage())

    def _trouble(self, record: logging.LogRecord) -> str:
        return self._censor(self.formatException(record.exc_info)) if record.exc_info else ""


class JsonFormatter(_LineFormatter):
    """One object a line: ``at, level, logger, message``, what it is about, and ``traceback`` where there is one."""

    def format(self, record: logging.LogRecord) -> str:
        """As JSON."""
        head = {"at": _at(record), "level": record.levelname.lower(), "logger": record.name}
        trouble = self._trouble(record)
        found = {**head, "message": self._message(record), **self._fields(record)}
        return json.dumps({**found, "traceback": trouble} if trouble else found)


class TextFormatter(_LineFormatter):
    """For people: time, level, logger, message, then ``key=value``. A line stays one, but for tracebacks."""

    def format(self, record: logging.LogRecord) -> str:
        """As text."""
        fields = [f"{key}={_bare(value)}" for key, value in self._fields(record).items()]
        said = " ".join(self._message(record).splitlines())
        line = " ".join([_at(record), record.levelname, record.name, said, *fields])
        trouble = self._trouble(record)
        return f"{line}\n{trouble}" if trouble else line


def _bare(value: Any) -> str:
    text = str(value)
    return text if BARE.fullmatch(text) else json.dumps(text)


def _at(record: logging.LogRecord) -> str:
    return datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
