"""JSON request bodies, read strictly. One response lists every mistake with its pointer, and never the value."""

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any

from fastapi import Depends, Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ConfigDict, model_validator

from trainyard.contract.parsing import Problem, nearest, plain, pointer_to, printable
from trainyard.service.errors import (
    EncodedBody,
    InvalidJson,
    RequestInvalid,
    ServiceError,
    WrongMediaType,
    with_problems,
)

MAX_DEPTH = 64
"""Levels of arrays and objects in a body."""

GZIP_MAGIC = b"\x1f\x8b"

TOO_DEEP = f"The body is nested more than {MAX_DEPTH} levels deep."


class StrictBody(BaseModel):
    """Base of request bodies. Unknown names and values of another type are mistakes."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class OptionalBody(StrictBody):
    """Base of request bodies that may be missing or null, which means the empty object."""

    @model_validator(mode="before")
    @classmethod
    def _null_is_empty(cls, value: Any) -> Any:
        return {} if value is None else value

    def given(self) -> dict[str, Any]:
        """Return the fields that the client has set."""
        return {name: getattr(self, name) for name in type(self).model_fields if name in self.model_fields_set}


def without_defaults(schema: dict[str, Any]) -> None:
    """Remove the defaults from a JSON schema: in a PATCH a missing field means no change."""
    for leaf in schema["properties"].values():
        leaf.pop("default", None)


async def read_json(request: Request) -> Any:
    """Return the body as a JSON value, or None if it is empty. NaN is let through: its field rejects it with a pointer.

    Raises EncodedBody, WrongMediaType or InvalidJson.
    """
    body = await request.body()
    if request.headers.get("content-encoding", "identity").strip().lower() != "identity" or body.startswith(GZIP_MAGIC):
        raise EncodedBody()
    if not body.strip():
        return None
    media_type = request.headers.get("content-type", "application/json").partition(";")[0].strip().lower()
    if media_type != "application/json" and not media_type.endswith("+json"):
        raise WrongMediaType()
    try:
        return _check_depth(json.loads(body.decode("utf-8-sig"), object_pairs_hook=_reject_duplicate_keys))
    except RecursionError:
        raise InvalidJson(TOO_DEEP) from None
    except UnicodeDecodeError:
        raise InvalidJson("The body is not UTF-8.") from None
    except json.JSONDecodeError as error:
        raise InvalidJson(f"The body is not JSON: line {error.lineno}, column {error.colno}.") from None
    except ValueError:
        raise InvalidJson("The body has a number that is far too long.") from None


JsonBody = Annotated[Any, Depends(read_json)]
"""A body that the endpoint validates itself.

Used for job specs, whose error pointers have the names that the client used, and for agents' reports: FastAPI reads
the body of a model before it solves any dependency, but the token must be checked before a report of 64 MiB is read.
"""


async def _no_fields(body: JsonBody) -> None:
    if body is not None and not isinstance(body, dict):
        raise with_problems(RequestInvalid, [Problem("", "must be a JSON object")])
    if body:
        raise with_problems(RequestInvalid, [Problem(pointer_to(name), unknown_field(())) for name in body])


NO_FIELDS = Depends(_no_fields)
"""Dependency of an action without parameters: the body must be missing or an empty object."""

UNREADABLE = "trainyard.unreadable"
"""Key in the ASGI scope: why the body is not JSON."""


class StrictRequest(Request):
    """A request whose JSON body is read by `read_json`.

    FastAPI reads the body before it solves any dependency, and turns an exception here into a bare 400. Therefore an
    invalid body becomes bytes, which no model accepts, and the reason goes into the scope. Dependencies are solved
    first, so that a caller without the scope gets 403 and not 422.
    """

    async def json(self) -> Any:
        try:
            return await read_json(self)
        except ServiceError as error:
            self.scope[UNREADABLE] = error
            return b""


def _choices(names: Sequence[str]) -> str:
    return f"those here are {', '.join(names)}" if names else "there are none here"


def unknown_field(fields: tuple[str, ...]) -> str:
    """Return the message for a name that is not in ``fields``."""
    return f"is not a field; {_choices(fields)}"


UNKNOWN_PARAMETER = "unknown_parameter"


def unknown_parameters(names: Iterable[str], known: Sequence[str]) -> list[dict[str, Any]]:
    """Return the errors of unknown query parameters, as FastAPI's RequestValidationError holds them."""
    hints = {name: nearest(name, tuple(known)) for name in names}
    return [
        {
            "type": UNKNOWN_PARAMETER,
            "loc": ("query", name),
            "msg": f"is not a parameter; did you mean {near}?"
            if near is not None
            else f"is not a parameter; {_choices(known)}",
        }
        for name, near in hints.items()
    ]


def invalid_request(request: Request, error: RequestValidationError) -> ServiceError:
    """Convert FastAPI's validation error, with all its mistakes."""
    unreadable: ServiceError | None = request.scope.get(UNREADABLE)
    if unreadable is not None:
        return unreadable
    if isinstance(error.body, bytes):
        return WrongMediaType()
    field = getattr(request.scope["route"], "body_field", None)
    fields = tuple(field.field_info.annotation.model_fields) if field is not None else ()
    unknown_first = sorted(error.errors(), key=lambda detail: detail["type"] != "extra_forbidden")
    return with_problems(RequestInvalid, [_problem(detail, error.body, fields) for detail in unknown_first])


def _problem(detail: Mapping[str, Any], body: object, fields: tuple[str, ...]) -> Problem:
    place, message = list(detail["loc"]), plain(detail["msg"])
    if place[:1] == ["body"]:
        place = _place_in(body, place[1:])
    if detail["type"] == "extra_forbidden":
        message = unknown_field(fields) if len(place) == 1 else "is not a field here"
    if detail["type"].startswith("union_tag"):
        place.append(detail["ctx"]["discriminator"].strip("'"))
        message = f"must be one of {detail['ctx'].get('expected_tags', '').replace(chr(39), '')}"
    return Problem(pointer_to(*(printable(str(part)) for part in place)), message)


def _place_in(body: object, place: list[Any]) -> list[Any]:
    """Return the place without parts that pydantic adds and the body does not have: a union's tag, "[key]"."""
    path = []
    for part in place:
        if (isinstance(body, dict) and part in body) or (isinstance(body, list) and isinstance(part, int)):
            body = body[part]
            path.append(part)
        elif part == place[-1] and part != "[key]":
            path.append(part)
    return path


def _check_depth(value: Any) -> Any:
    # Level by level, not by recursion: later code may then walk the value recursively.
    level = [value]
    for _ in range(MAX_DEPTH + 1):
        nested = [item.values() if isinstance(item, dict) else item for item in level if isinstance(item, dict | list)]
        if not nested:
            return value
        level = [item for items in nested for item in items]
    raise InvalidJson(TOO_DEEP)


def _reject_duplicate_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        raise InvalidJson("The body has an object with the same key twice.")
    return value
