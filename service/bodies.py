"""JSON bodies: read strictly, and every mistake in one answer, with its pointer and without the value."""

import json
from collections.abc import Mapping
from typing import Annotated, Any

from fastapi import Depends, Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ConfigDict, model_validator

from trainyard.contract.parsing import (
    Problem,
    plain,
    pointer_to,
    printable,
)
from trainyard.service.errors import (
    InvalidJson,
    RequestInvalid,
    ServiceError,
    WrongMediaType,
    with_problems,
)

MAX_DEPTH = 64
"""Levels of arrays and objects in a body."""

TOO_DEEP = f"The body is nested more than {MAX_DEPTH} levels deep."


class StrictBody(BaseModel):
    """The body of a request. Unknown names and values of another type are mistakes."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class OptionalBody(StrictBody):
    """A body that may be left out, or be null: then it is the empty object."""

    @model_validator(mode="before")
    @classmethod
    def _null_is_empty(cls, value: Any) -> Any:
        return {} if value is None else value

    def given(self) -> dict[str, Any]:
        """Return the fields that the client gave."""
        return {name: getattr(self, name) for name in type(self).model_fields if name in self.model_fields_set}


def without_defaults(schema: dict[str, Any]) -> None:
    """Take the defaults out of a JSON schema: a field of a change that is not given stays as it is."""
    for leaf in schema["properties"].values():
        leaf.pop("default", None)


async def read_json(request: Request) -> Any:
    """Return the body as a JSON value, None if it is empty. NaN stays, for the field that gets it to reject.

    Raises WrongMediaType or BodyNotJson.
    """
    body = await request.body()
    if not body.strip():
        return None
    media_type = request.headers.get("content-type", "application/json").partition(";")[0].strip().lower()
    if media_type != "application/json" and not media_type.endswith("+json"):
        raise WrongMediaType()
    try:
        return _shallow(json.loads(body.decode(), object_pairs_hook=_without_doubles))
    except RecursionError:
        raise InvalidJson(TOO_DEEP) from None
    except UnicodeDecodeError:
        raise InvalidJson("The body is not UTF-8.") from None
    except json.JSONDecodeError as error:
        raise InvalidJson(f"The body is not JSON: line {error.lineno}, column {error.colno}.") from None
    except ValueError:
        raise InvalidJson("The body holds a number that is far too long.") from None


JsonBody = Annotated[Any, Depends(read_json)]
"""A body that the endpoint checks itself: a job spec, whose pointers are in the client's own names.

Also an agent's report: FastAPI reads the body of a model before it solves any dependency, and a report of 64 MiB must
not be read before its token is checked.
"""


async def _no_fields(body: JsonBody) -> None:
    if body is not None and not isinstance(body, dict):
        raise with_problems(RequestInvalid, [Problem("", "must be a JSON object")])
    if body:
        raise with_problems(RequestInvalid, [Problem(pointer_to(name), unknown_field(())) for name in body])


NO_FIELDS = Depends(_no_fields)
"""For an action that takes nothing: no body, or an empty object."""


UNREADABLE = "trainyard.unreadable"
"""Key in the ASGI scope: why the body is not JSON."""


class StrictRequest(Request):
    """A request whose JSON FastAPI gets by `read_json`.

    FastAPI reads the body before it solves any dependency, and turns an exception here into a bare 400. Bytes are valid
    for no model, so that it solves the dependencies first: a caller without the scope gets 403, whatever the body is.
    """

    async def json(self) -> Any:
        """Return the body; if it is not JSON, bytes, and the reason in the scope."""
        try:
            return await read_json(self)
        except ServiceError as error:
            self.scope[UNREADABLE] = error
            return b""


def unknown_field(fields: tuple[str, ...]) -> str:
    """Return the message for a name that is none of ``fields``."""
    return f"is not a field; those here are {', '.join(fields)}" if fields else "is not a field; there are none here"


def invalid_request(request: Request, error: RequestValidationError) -> ServiceError:
    """Return what FastAPI has found as one of our errors, with all mistakes."""
    unreadable: ServiceError | None = request.scope.get(UNREADABLE)
    if unreadable is not None:
        return unreadable
    if isinstance(error.body, bytes):
        return WrongMediaType()
    field = getattr(request.scope["route"], "body_field", None)
    fields = tuple(field.field_info.annotation.model_fields) if field is not None else ()
    unknown_first = sorted(error.errors(), key=lambda found: found["type"] != "extra_forbidden")
    return with_problems(RequestInvalid, [_problem(found, error.body, fields) for found in unknown_first])


def _problem(found: Mapping[str, Any], body: object, fields: tuple[str, ...]) -> Problem:
    place, message = list(found["loc"]), plain(found["msg"])
    if place[:1] == ["body"]:
        place = _within(body, place[1:])
    if found["type"] == "extra_forbidden":
        message = unknown_field(fields) if len(place) == 1 else "is not a field here"
    if found["type"].startswith("union_tag"):
        place.append(found["ctx"]["discriminator"].strip("'"))
        message = f"must be one of {found['ctx'].get('expected_tags', '').replace(chr(39), '')}"
    return Problem(pointer_to(*(printable(str(part)) for part in place)), message)


def _within(body: object, place: list[Any]) -> list[Any]:
    """Return the place without what pydantic adds and the body does not have: a union's tag, "[key]"."""
    kept = []
    for part in place:
        if (isinstance(body, dict) and part in body) or (isinstance(body, list) and isinstance(part, int)):
            body = body[part]
            kept.append(part)
        elif part == place[-1] and part != "[key]":
            kept.append(part)
    return kept


def _shallow(value: Any) -> Any:
    """Return the value, which is safe to walk by recursion. Raises BodyNotJson."""
    level = [value]
    for _ in range(MAX_DEPTH + 1):
        inner = [
            found.values() if isinstance(found, dict) else found for found in level if isinstance(found, dict | list)
        ]
        if not inner:
            return value
        level = [found for part in inner for found in part]
    raise InvalidJson(TOO_DEEP)


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        raise InvalidJson("The body has an object with the same key twice.")
    return value
