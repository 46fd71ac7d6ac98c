"""The messages between rank 0, the agent and the service about an attempt, except the events of the outbox."""

from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from trainyard.contract.status import Desired, Reason


class Message(BaseModel):
    """A frozen message. Unknown keys are ignored, so that agent and service may have different versions."""

    model_config = ConfigDict(frozen=True, extra="ignore")


M = TypeVar("M", bound=Message)


def read_message(kind: type[M], file: Path) -> M | None:
    """Return the message in ``file``, or None if it is missing or not valid."""
    try:
        return kind.model_validate_json(file.read_bytes())
    except (OSError, ValidationError):
        return None


class ErrorCard(Message):
    """A failure for the user: the same object in the API, the terminal and a webhook.

    ``log_tail``: the last lines of the rank's log, or of rank 0 if the rank is unknown. ``peak_memory_bytes``: of the
    rank, or the maximum over the ranks if it is unknown.
    """

    code: str
    message: str
    hint: str | None = None
    rank: int | None = None
    traceback: str | None = None
    log_tail: list[str] = Field(default_factory=list)
    peak_memory_bytes: int | None = None


class NextAction(Message):
    """An action that may help a job that failed: a request of the API, and the same as a ``command``.

    ``body``: null if the request has none.
    """

    action: Literal["resume", "fork", "submit", "logs"]
    words: str
    command: str
    method: Literal["GET", "POST"]
    path: str
    body: dict[str, Any] | None


class FailureCard(ErrorCard):
    """A failure and the actions that may help, the best first; [] if the job has continued since."""

    next: list[NextAction] = Field(default_factory=list)


class Outcome(Message):
    """outcome.json, by rank 0. ``stopped``: it has saved and ended on request.

    ``completed``: all steps are done, or with reason limit: a limit is reached.
    """

    outcome: Literal["completed", "stopped", "failed"]
    step: int
    reason: Reason | None = None
    message: str | None = None
    error: ErrorCard | None = None


class RankExit(Message):
    """How a rank ended: by ``exit_code`` or by ``signal``. Both are null if it is unknown."""

    rank: int
    exit_code: int | None = None
    signal: str | None = None


class ExitReport(Message):
    """exit.json: the agent's report when no process of the attempt is left.

    ``outcome``: that of rank 0, ``crashed`` if the ranks ended without one, or ``killed`` if the agent killed them on
    request. It is never ``completed`` if outcome.json does not say so.
    """

    outcome: Literal["completed", "stopped", "failed", "crashed", "killed"]
    step: int
    reason: Reason | None = Field(description="null only if all steps are done; limit if a limit has ended the run")
    message: str
    error: ErrorCard | None = None
    ranks: list[RankExit] = Field(default_factory=list)
    last_seq: int = Field(ge=0, description="events in the outbox; the service has all of them if acked is equal")
    ended_at: datetime
    train_seconds: float | None = Field(default=None, description="active training time of all attempts until the end")


class Fork(Message):
    """fork.json in a run directory: the job is a fork of ``job_id``, whose checkpoint of ``step`` is in ``origin/``.

    ``keep``: the order of samples continues from the parent's. ``restart``: data and schedule start from the beginning.
    Steps continue to be counted in both.
    """

    job_id: str
    step: int = Field(ge=0)
    data: Literal["keep", "restart"]


class EventBatch(Message):
    """POST /internal/attempts/{id}/events: consecutive lines of the outbox, each a JSON object with its ``seq``.

    A line that the service cannot parse is stored as a warning and not rejected: that would block all later lines.
    """

    events: list[dict[str, Any]] = Field(min_length=1, max_length=5000)


HEARTBEAT_SECONDS = 0.5
"""Maximum time between two requests of an agent."""


class Heartbeat(Message):
    """POST /internal/attempts/{id}/heartbeat: sent when there is no new line."""

    step: int | None = None
    last_seq: int = 0


RUN_SETTINGS = {
    "log_interval": ("reporting", "log_interval"),
    "save_interval": ("checkpoint", "save_interval"),
    "keep_last": ("checkpoint", "keep_last"),
    "max_minutes": ("limits", "max_minutes"),
    "target_loss": ("limits", "target_loss"),
}
"""Setting -> its section and field in a job spec."""


class RunSettings(Message):
    """The settings that may be changed during a run. After a change they are in settings.json of the attempt.

    The limits are not set in messages of a service or an agent that does not know them: then they stay as they are.
    """

    log_interval: Annotated[int, Field(ge=1, le=2**53 - 1)] | None
    save_interval: int = Field(ge=1, le=2**53 - 1)
    keep_last: int = Field(ge=1, le=100_000)
    max_minutes: Annotated[float, Field(gt=0, le=1e7)] | None = None
    target_loss: Annotated[float, Field(gt=0, le=1e3)] | None = None

    @classmethod
    def of(cls, spec: Mapping[str, Any]) -> Self:
        """Return the settings in a job spec (its JSON object)."""
        groups = {"limits": {}, **spec}  # stored specs of 0.1 have no limits
        return cls(**{name: groups[section].get(field) for name, (section, field) in RUN_SETTINGS.items()})


class Ack(Message):
    """The response to all three: the highest ``seq`` that is stored durably, and the desired state of the job.

    ``settings``: those to apply; null from an older service.
    """

    acked: int
    desired: Desired
    settings: RunSettings | None = None
