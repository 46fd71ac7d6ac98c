"""What a client says of a webhook, read strictly: every mistake at once, with its pointer, and no value echoed."""

import json
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from contract.parsing import Problem, plain, pointer_to, printable
from contract.status import JobStatus
from service.errors import RequestInvalid, with_problems
from service.jobs.event_outbox import ALL
from service.webhooks.addresses import Network, mistake
from service.webhooks.rules import KINDS, AnyRule

STATUS_EVENTS = tuple(f"job.{status}" for status in JobStatus)
EVENTS = ("job.created", *STATUS_EVENTS, "job.checkpoint", "job.warning")
TEST = "webhook.test"


def _no_nul(value: str) -> str:
    if "\0" in value:
        raise ValueError("must not hold a NUL character")
    return value


def _known_event(value: str) -> str:
    if value != ALL and value not in EVENTS:
        raise ValueError('must be "*" or one of ' + ", ".join(EVENTS))
    return value


Text = Annotated[str, AfterValidator(_no_nul)]
EventName = Annotated[str, Field(max_length=40), AfterValidator(_known_event)]
LabelKey = Annotated[Text, Field(min_length=1, max_length=100)]
LabelValue = Annotated[Text, Field(max_length=300)]


class NewWebhook(BaseModel):
    """Where to send, and what: ``events`` of jobs with all these ``labels``, of one job or of all; and ``rules``."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    url: Annotated[str, Field(max_length=2000, description="http or https; an address that is not public is refused")]
    description: Annotated[Text, Field(max_length=300)] = ""
    events: Annotated[list[EventName], Field(max_length=len(EVENTS) + 1)] = list(STATUS_EVENTS)
    labels: Annotated[dict[LabelKey, LabelValue], Field(max_length=20)] = {}
    job_id: Annotated[Text, Field(max_length=40)] | None = None
    rules: Annotated[list[AnyRule], Field(max_length=20)] = []
    enabled: bool = True


FIXED = "job_id"
"""Which job it is about is what a webhook is; all else may change."""


def described_changes(ref_template: str) -> dict[str, Any]:
    """What the OpenAPI document says of the body of a change."""
    properties = NewWebhook.model_json_schema(ref_template=ref_template)["properties"]
    for leaf in properties.values():
        leaf.pop("default", None)
    properties.pop(FIXED)
    return {"type": "object", "additionalProperties": False, "properties": properties}


def read(body: object, networks: Sequence[Network]) -> NewWebhook:
    """A new webhook. Raises RequestInvalid."""
    if not isinstance(body, dict):
        raise with_problems(RequestInvalid, [Problem("", "must be a JSON object")])
    if not _is_text(body):
        raise with_problems(RequestInvalid, [Problem("", "holds a lone surrogate, which is no text")])
    try:
        asked = NewWebhook.model_validate(body)
    except ValidationError as error:
        raise with_problems(RequestInvalid, [_problem(found) for found in _errors(error)]) from None
    why = mistake(asked.url, networks)
    if why is not None:
        raise with_problems(RequestInvalid, [Problem("/url", why)])
    return asked


def changed(before: Mapping[str, Any], body: object, networks: Sequence[Network]) -> NewWebhook:
    """The webhook with what the body says in its place. Raises RequestInvalid."""
    if isinstance(body, dict) and FIXED in body:
        raise with_problems(RequestInvalid, [Problem(f"/{FIXED}", "cannot be changed: make another webhook")])
    if body is not None and not isinstance(body, dict):
        raise with_problems(RequestInvalid, [Problem("", "must be a JSON object")])
    return read({**before, **(body or {})}, networks)


def _is_text(body: Mapping[str, Any]) -> bool:
    """Whether it can be written as UTF-8; pydantic would put other characters in the place of those that cannot."""
    try:
        json.dumps(body, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


def _errors(error: ValidationError) -> list[Any]:
    return error.errors(include_input=False, include_url=False, include_context=False)


def _problem(found: Any) -> Problem:
    place, message = [str(part) for part in found["loc"]], plain(found["msg"])
    if place[:1] == ["rules"] and len(place) > 2:
        del place[2]  # the kind of the rule, by which pydantic tells them apart
    if found["type"].startswith("union_tag"):
        place, message = [*place, "kind"], "must be one of " + ", ".join(KINDS)
    if found["type"] == "extra_forbidden":
        message = "is not a field here"
    return Problem(pointer_to(*(printable(part) for part in place if part != "[key]")), message)
