"""The OpenAPI document: what FastAPI finds in the routes, and what it cannot see there.

Bodies are read by our own parsers, every error is a problem, and one address answers with three kinds of rows.
"""

from http import HTTPStatus
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from trainyard.contract.parsing import ALIASES
from trainyard.contract.spec import JobSpec
from trainyard.contract.spec_reference import NOTES, TITLES
from trainyard.contract.units import UNITS
from trainyard.service.errors import PROBLEM
from trainyard.service.schemas import ProblemDetails

REF = "#/components/schemas/{model}"
WEBHOOKS = ("post", "/webhooks")
QUOTAS = (("post", "/jobs"), ("post", "/jobs/{job_id}/resume"), ("post", "/jobs/{job_id}/fork"))
ALWAYS = (401, 403, 408, 413, 414, 422, 431, 503)
"""What the gate around every route may answer, and a request with mistakes."""


def openapi(app: FastAPI) -> dict[str, Any]:
    """The document, made once."""
    if app.openapi_schema is None:
        document = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
        schemas = document.setdefault("components", {}).setdefault("schemas", {})
        for model in (JobSpec, ProblemDetails):
            schema = model.model_json_schema(ref_template=REF)
            schemas.update(schema.pop("$defs", {}))
            schemas[model.__name__] = schema
        _add_form_hints(schemas)
        # Kept as it came from the database, where it went as a whole spec.
        schemas["Job"]["properties"]["spec"] = {"$ref": REF.format(model=JobSpec.__name__)}
        document["components"]["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
        document["security"] = [{}, {"token": []}]
        for path, operations in document["paths"].items():
            for method, operation in operations.items():
                _complete((method, path), operation)
        for name in ("HTTPValidationError", "ValidationError"):
            schemas.pop(name, None)
        app.openapi_schema = document
    return app.openapi_schema


def _add_form_hints(schemas: dict[str, Any]) -> None:
    """The spec's schemas with what a form needs beside them: a word on each setting, its unit, its other names."""
    whole = schemas[JobSpec.__name__]
    groups = {name: _of(schemas, described) for name, described in whole["properties"].items() if "$ref" in described}
    groups["timeouts"] = _of(schemas, groups["resources"]["properties"]["timeouts"])
    for name, group in (("", whole), *groups.items()):
        group["description"] = TITLES[name][1] if name in TITLES else group.get("description", "")
        for leaf, described in group["properties"].items():
            _annotate_leaf(leaf, described)


def _annotate_leaf(leaf: str, described: dict[str, Any]) -> None:
    if "$ref" in described:
        return
    if leaf in NOTES:
        described.setdefault("description", NOTES[leaf])
    if leaf in UNITS:
        described["x-unit"] = UNITS[leaf]
    names = [alias for alias, (_, own) in ALIASES.items() if own == leaf]
    if names:
        described["x-aliases"] = names


def _of(schemas: dict[str, Any], described: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = schemas[described["$ref"].rpartition("/")[2]]
    return found


def _complete(place: tuple[str, str], operation: dict[str, Any]) -> None:
    responses = operation["responses"]
    responses.update({str(status): _problem(status) for status in _refusals(place)})
    responses["default"] = _problem(None)


def _refusals(place: tuple[str, str]) -> list[int]:
    method, path = place
    more = [404] if "{" in path else []
    more += [409] if method != "get" and "{" in path else []
    more += [409] if place in (("post", "/tokens"), WEBHOOKS) else []
    more += [415] if method in ("post", "patch") else []
    return sorted([*ALWAYS, *more, *([429] if path.endswith("/stream") or place in QUOTAS else [])])


def _problem(status: int | None) -> dict[str, Any]:
    described = HTTPStatus(status).phrase if status is not None else "Anything else that went wrong"
    schema = {"$ref": REF.format(model=ProblemDetails.__name__)}
    return {"description": described, "content": {PROBLEM: {"schema": schema}}}
