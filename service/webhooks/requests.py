"""The request bodies for webhooks, parsed strictly: every mistake at once, with its pointer, without echoing values."""

import json
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from pydantic import AfterValidator, ConfigDict, Field, model_validator

from trainyard.contract.parsing import Problem
from trainyard.contract.scopes import Scope
from trainyard.contract.status import JobStatus
from trainyard.service.auth.principal import Principal
from trainyard.service.bodies import OptionalBody, StrictBody, without_defaults
from trainyard.service.errors import Forbidden, RequestInvalid, with_problems
from trainyard.service.jobs.event_outbox import ALL
from trainyard.service.notice_urls import HIDDEN, is_notice_url, masked_url
from trainyard.service.ssrf import Network, validation_error
from trainyard.service.webhooks.alert_rules import AnyRule
from trainyard.service.webhooks.notice_client import NoticeClient

STATUS_EVENTS = tuple(f"job.{status}" for status in JobStatus)
EVENTS = ("job.created", *STATUS_EVENTS, "job.checkpoint", "job.warning")
TEST = "webhook.test"


def _no_nul(value: str) -> str:
    if "\0" in value:
        raise ValueError("must not contain a NUL character")
    return value


def _known_event(value: str) -> str:
    if value != ALL and value not in EVENTS:
        raise ValueError('must be "*" or one of ' + ", ".join(EVENTS))
    return value


Text = Annotated[str, AfterValidator(_no_nul)]
URL_TEXT = (
    "http or https: signed JSON. A URL of Apprise's kinds (`slack://`, `mailto://`, ...): a short text; needs the "
    "scope admin, and is shown as `KIND://***`. An address that is not public is rejected."
)
Url = Annotated[str, Field(max_length=2000, description=URL_TEXT)]
EventName = Annotated[str, Field(max_length=40), AfterValidator(_known_event)]
LabelKey = Annotated[Text, Field(min_length=1, max_length=100)]
LabelValue = Annotated[Text, Field(max_length=300)]


class WebhookSettings(StrictBody):
    """What a webhook sends: ``events`` of jobs with all of ``labels``, and alerts of ``rules``."""

    description: Annotated[Text, Field(max_length=300)] = ""
    events: list[EventName] = Field(max_length=len(EVENTS) + 1, default=list(STATUS_EVENTS))
    labels: dict[LabelKey, LabelValue] = Field(max_length=20, default={})
    rules: list[AnyRule] = Field(max_length=20, default=[])
    enabled: bool = True

    @model_validator(mode="before")
    @classmethod
    def _only_text(cls, value: Any) -> Any:
        if not _is_text(value):
            raise ValueError("must not contain a lone surrogate")
        return value


class WebhookCreate(WebhookSettings):
    """A new webhook: where to send, and what. ``job_id``: of this job only."""

    url: Url
    job_id: Annotated[Text, Field(max_length=40)] | None = None


class PatchWebhookBody(WebhookSettings, OptionalBody):
    """Changes to a webhook: only the given fields. Its ``job_id`` cannot change."""

    model_config = ConfigDict(json_schema_extra=without_defaults)

    url: Url = ""


def require_allowed(url: str, networks: Sequence[Network], notices: NoticeClient, caller: Principal) -> None:
    """Raise RequestInvalid if nothing may be sent to the URL, or Forbidden if it needs the scope admin.

    Not to be called in a transaction: another process checks a URL of Apprise's kinds. A masked one is not checked.
    """
    if not is_notice_url(url):
        error = validation_error(url, networks)
    elif url.endswith(f"://{HIDDEN}"):
        error = None
    elif not caller.scope.covers(Scope.ADMIN):
        raise Forbidden(
            f"A URL of this kind needs the scope {Scope.ADMIN}; the token {caller.name} has {caller.scope}."
        )
    else:
        error = notices.validation_error(url) if url.isprintable() else "must not contain control characters"
    if error is not None:
        raise with_problems(RequestInvalid, [Problem("/url", error)])


def apply_changes(before: Mapping[str, Any], changes: PatchWebhookBody) -> WebhookCreate:
    """Return the webhook with the changes applied. Raises RequestInvalid.

    A masked URL, as responses have it, changes nothing.
    """
    given = changes.given()
    if given.get("url") == masked_url(before["url"]):
        del given["url"]
    webhook = WebhookCreate.model_validate({**before, **given})
    require_unmasked(webhook)
    return webhook


def require_unmasked(webhook: WebhookCreate) -> None:
    """Raise RequestInvalid if the URL is one that a response has masked."""
    if is_notice_url(webhook.url) and webhook.url.endswith(f"://{HIDDEN}"):
        raise with_problems(RequestInvalid, [Problem("/url", "is a masked URL; give the whole one")])


def _is_text(body: Any) -> bool:
    # True if it can be encoded as UTF-8. pydantic would silently replace characters that cannot.
    try:
        json.dumps(body, ensure_ascii=False, default=str).encode()
    except UnicodeEncodeError:
        return False
    return True
