"""What rank 0, the agent and the service tell each other about an attempt, apart from the outbox lines."""

from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from trainyard.contract.status import Desired, Reason


class Message(BaseModel):
    """Frozen; unknown keys are ignored, so that agent and service may differ by a release."""

    model_config = ConfigDict(frozen=True, extra="ignore")


M = TypeVar("M", bound=Message)


def read_message(kind: type[M], file: Path) -> M | None:
    """The message in ``file``, or None where there is none that can be read: then nothing is known."""
    try:
        return kind.model_validate_json(file.read_bytes())
    except (OSError, ValidationError):
        return None


class ErrorCard(Message):
    """A failure as the user sees it: the same object in the API, the terminal and a webhook.

    ``log_tail``: the last lines that its rank printed, rank 0 where it has none. ``peak_memory_bytes``: the most that
    the rank, or where it is not known which, any rank has used.
    """

    code: str
    message: str
    hint: str | None = None
    rank: int | None = None
    traceback: str | None = None
    log_tail: list[str] = Field(default_factory=list)
    peak_memory_bytes: int | None = None


class NextAction(Message):
    """Something that helps a job that failed. The call of the API, and the same as a ``command``.

    ``action``: resume, fork, submit or logs. ``body``: null of a call that takes none.
    """

    action: Literal["resume", "fork", "submit", "logs"]
    words: str
    command: str
    method: Literal["GET", "POST"]
    path: str
    body: dict[str, Any] | None


class FailureCard(ErrorCard):
    """A failure with what to do about it, the likeliest first; [] once it was done."""

    next: list[NextAction] = Field(default_factory=list)


class Outcome(Message):
    """outcome.json: rank 0's own word. ``completed``: all steps done. ``stopped``: saved because it was asked to."""

    outcome: Literal["completed", "stopped", "failed"]
    step: int
    reason: Reason | None = None
    message: str | None = None
    error: ErrorCard | None = None


class RankExit(Message):
    """How one rank ended; exactly one of the two is set where it is known."""

    rank: int
    exit_code: int | None = None
    signal: str | None = None


class ExitReport(Message):
    """exit.json: the agent's report once nothing of the attempt lives.

    ``outcome`` is rank 0's, or ``crashed`` where the ranks ended without one, or ``killed`` where the agent ended them
    because it was told to. It is never ``completed`` without outcome.json saying so.
    """

    outcome: Literal["completed", "stopped", "failed", "crashed", "killed"]
    step: int
    reason: Reason | None = Field(description="null only where completed: then nobody is at fault")
    message: str
    error: ErrorCard | None = None
    ranks: list[RankExit] = Field(default_factory=list)
    last_seq: int = Field(ge=0, description="lines in the outbox; the service has all of them once acked equals this")
    ended_at: datetime


class Fork(Message):
    """fork.json in a run directory: the job began as a fork of another one, whose files of ``step`` are in ``origin/``.

    ``keep``: the data order goes on where the parent's was. ``restart``: it begins anew, and the schedule with it; the
    steps go on being counted.
    """

    job_id: str
    step: int = Field(ge=0)
    data: Literal["keep", "restart"]


class EventBatch(Message):
    """POST /internal/attempts/{id}/events: consecutive outbox lines, as they stand in the file.

    A line is a JSON object with its ``seq``. One that the service cannot read is kept as a warning, never refused:
    refusing it would stop all those behind it.
    """

    events: list[dict[str, Any]] = Field(min_length=1, max_length=5000)


HEARTBEAT_SECONDS = 0.5
"""How long an agent is silent at most while it can be heard."""


class Heartbeat(Message):
    """POST /internal/attempts/{id}/heartbeat: sent when there is no new line."""

    step: int | None = None
    last_seq: int = 0


RUN_SETTINGS = {
    "log_interval": ("reporting", "log_interval"),
    "save_interval": ("checkpoint", "save_interval"),
    "keep_last": ("checkpoint", "keep_last"),
}
"""Setting -> its section and field in a job spec."""


class RunSettings(Message):
    """What may be changed while a run goes on; settings.json in an attempt's directory, once it was."""

    log_interval: int = Field(ge=1, le=2**53 - 1)
    save_interval: int = Field(ge=1, le=2**53 - 1)
    keep_last: int = Field(ge=1, le=100_000)

    @classmethod
    def of(cls, spec: Mapping[str, Any]) -> Self:
        """Return the settings in a job spec (its JSON object)."""
        return cls(**{name: spec[section][field] for name, (section, field) in RUN_SETTINGS.items()})


class Ack(Message):
    """The answer to all three: the highest seq that is stored for good, and what the user wants of the job.

    ``settings``: those that are to hold; null from a service that does not say.
    """

    acked: int
    desired: Desired
    settings: RunSettings | None = None
