"""Messages between the service and the side process that generates text.

The service sends a `GenerationTask` for each request, or ``{"cancel": id}``. The process answers with lines that have
an ``event``:

``ready``      the checkpoint is loaded
``failed``     it cannot be loaded: ``message``. The process ends
``beat``       sent each second while it computes
``accepted``   the task has its place: ``prompt_tokens``, and ``chat_template`` (whether messages were put into one)
``rejected``   the task cannot be done: ``pointer``, ``message``
``text``       a part of a choice: ``choice``, ``text``, and ``logprobs`` if they were asked for
``finished``   the end of a choice: ``choice``, ``reason`` (stop or length), ``tokens`` (number of new tokens)
``error``      the task ended early: ``message``

All lines but the first three have the ``id`` of the task.
"""

from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints

MAX_NEW_TOKENS = 1 << 20
MAX_CHOICES = 16
MAX_LOGPROBS = 20
MAX_STOPS = 8
MAX_PROMPTS = 128


def is_text(value: str) -> bool:
    """Return whether the string can be encoded: JSON can hold one half of a surrogate pair, which is no character."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _require_text(value: str) -> str:
    if not is_text(value):
        raise ValueError("must be text: it has one half of a surrogate pair")
    return value


Text = Annotated[str, AfterValidator(_require_text)]
StopText = Annotated[Text, StringConstraints(min_length=1, max_length=200)]
Stops = Annotated[list[StopText], Field(max_length=MAX_STOPS)]
NewTokens = Annotated[int, Field(ge=0, le=MAX_NEW_TOKENS)]
Temperature = Annotated[float, Field(ge=0, le=10, allow_inf_nan=False)]
TopP = Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)]
TopK = Annotated[int, Field(ge=0, le=1 << 24)]
Seed = Annotated[int, Field(ge=0, lt=1 << 63)]


class ChatMessage(BaseModel):
    """One turn of a conversation."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    role: Literal["system", "user", "assistant"]
    content: Text


class GenerationTask(BaseModel):
    """Continue each prompt ``n`` times. Choice ``i * n + j`` is the j-th continuation of prompt i.

    A prompt is text, or token ids. ``messages`` is a conversation in place of prompts; the next turn is written.
    ``temperature`` 0: always the most likely token. ``top_k`` 0: all tokens. ``seed``: choice i draws with
    ``seed + i``, and its text does not depend on other tasks; None: a new seed each time. ``logprobs``: how many
    most likely tokens to report at each position, besides the chosen one. ``echo``: return the prompt before its
    continuation.
    """

    model_config = ConfigDict(frozen=True)

    id: str
    prompts: list[str | list[int]] = []
    messages: list[ChatMessage] | None = None
    max_new_tokens: int = 128
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    stop: list[str] = []
    n: int = 1
    logprobs: int | None = None
    echo: bool = False


class TokenLogprob(BaseModel):
    """Log-probability of a token, and of the most likely ones at its position, by their texts.

    ``logprob`` is null for the first token of a text, which nothing comes before. ``offset``: characters before it.
    """

    token: str
    logprob: float | None
    top: dict[str, float] | None
    offset: int
