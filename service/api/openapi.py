"""The OpenAPI document: FastAPI's own, plus the job spec, descriptions, examples, errors, security and form hints."""

from http import HTTPStatus
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from trainyard.contract.parsing import ALIASES
from trainyard.contract.spec import JobSpec
from trainyard.contract.spec_reference import NOTES, TITLES
from trainyard.contract.units import UNITS
from trainyard.service.api.descriptions import EXAMPLES, FIELDS, PARAMETERS, TAGS
from trainyard.service.api.responses import ServiceRoute
from trainyard.service.errors import OPENAI_PATH, PROBLEM
from trainyard.service.schemas import OpenAIErrorBody, ProblemDetails

REF = "#/components/schemas/{model}"
CONFLICTS = (("post", "/tokens"), ("post", "/webhooks"))
QUOTAS = (("post", "/jobs"), ("post", "/jobs/{job_id}/resume"), ("post", "/jobs/{job_id}/fork"))
GENERATING = (("post", "/jobs/{job_id}/checkpoints/{step}/generate"), ("post", "/v1/completions"))
ETAG = {"description": "Tag of the response. It changes with the response.", "schema": {"type": "string"}}
ALWAYS = (401, 403, 408, 413, 414, 422, 431, 503)
"""Errors of every route: those of the middleware, and 422 for a request with mistakes."""


def openapi(app: FastAPI) -> dict[str, Any]:
    """Return the document. It is built once and cached in the app."""
    if app.openapi_schema is None:
        tags = [{"name": name, "description": described} for name, described in TAGS.items()]
        document = get_openapi(
            title=app.title, version=app.version, description=app.description, routes=app.routes, tags=tags
        )
        schemas = document.setdefault("components", {}).setdefault("schemas", {})
        for model in (JobSpec, ProblemDetails, OpenAIErrorBody):
            schema = model.model_json_schema(ref_template=REF)
            schemas.update(schema.pop("$defs", {}))
            schemas[model.__name__] = schema
        _add_form_hints(schemas)
        # The response model has it as a plain dict: it is stored as a complete spec and needs no second validation.
        schemas["Job"]["properties"]["spec"] = {"$ref": REF.format(model=JobSpec.__name__)}
        document["components"]["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
        document["security"] = [{}, {"token": []}]
        _describe_fields(schemas)
        shared_paths = {
            route.path for route in app.routes if isinstance(route, ServiceRoute) and route.sharing is not None
        }
        for path, operations in document["paths"].items():
            if path in shared_paths:
                _add_tag(operations["get"])
            for method, operation in operations.items():
                _describe_operation(operation)
                responses = operation["responses"]
                responses.pop(str(HTTPStatus.UNPROCESSABLE_ENTITY.value), None)  # FastAPI's own
                error = _openai_error if path.startswith(OPENAI_PATH) else _problem
                responses.update({str(status): error(status) for status in _error_statuses(method, path)})
                responses["default"] = error(None)
        for name in ("HTTPValidationError", "ValidationError"):
            schemas.pop(name, None)
        app.openapi_schema = document
    return app.openapi_schema


def _describe_fields(schemas: dict[str, Any]) -> None:
    for model, schema in schemas.items():
        name = model.partition("_")[0]
        for field, described in schema.get("properties", {}).items():
            text = FIELDS.get(f"{name}.{field}", FIELDS.get(field))
            if text is not None:
                described.setdefault("description", text)


def _describe_operation(operation: dict[str, Any]) -> None:
    name = operation["operationId"]
    for parameter in operation.get("parameters", ()):
        text = PARAMETERS.get(f"{name}.{parameter['name']}", PARAMETERS.get(parameter["name"]))
        if text is not None:
            parameter.setdefault("description", text)
    if name in EXAMPLES:
        operation["requestBody"]["content"]["application/json"]["example"] = EXAMPLES[name]


def _add_tag(operation: dict[str, Any]) -> None:
    """Add the tag of a response that readers share, and the response to a request that names it."""
    operation["responses"]["200"]["headers"] = {"ETag": ETAG}
    operation["responses"]["304"] = {
        "description": "`If-None-Match` names the tag of the current response.", "headers": {"ETag": ETAG}
    }  # fmt: skip


def _add_form_hints(schemas: dict[str, Any]) -> None:
    """Add to the spec's schemas what a form shows: the description, unit and aliases of each field."""
    spec = schemas[JobSpec.__name__]
    groups = {name: _resolve(schemas, field) for name, field in spec["properties"].items() if "$ref" in field}
    groups["timeouts"] = _resolve(schemas, groups["resources"]["properties"]["timeouts"])
    for name, group in (("", spec), *groups.items()):
        group["description"] = TITLES[name][1] if name in TITLES else group.get("description", "")
        if name in spec["properties"]:
            spec["properties"][name].setdefault("description", group["description"])
        for leaf, field in group["properties"].items():
            _annotate_leaf(leaf, field)


def _annotate_leaf(leaf: str, field: dict[str, Any]) -> None:
    if "$ref" in field:
        return
    if leaf in NOTES:
        field.setdefault("description", NOTES[leaf])
    if leaf in UNITS:
        field["x-unit"] = UNITS[leaf]
    names = [alias for alias, (_, own) in ALIASES.items() if own == leaf]
    if names:
        field["x-aliases"] = names


def _resolve(schemas: dict[str, Any], field: dict[str, Any]) -> dict[str, Any]:
    schema: dict[str, Any] = schemas[field["$ref"].rpartition("/")[2]]
    return schema


def _error_statuses(method: str, path: str) -> list[int]:
    statuses = {*ALWAYS}
    if "{" in path:
        statuses |= {404} if method == "get" else {404, 409}
    if (method, path) in CONFLICTS:
        statuses.add(409)
    if method in ("post", "patch"):
        statuses.add(415)
    if path.endswith("/stream") or (method, path) in QUOTAS:
        statuses.add(429)
    if (method, path) in GENERATING:
        statuses |= {404, 409, 429, 501}
    if path.startswith(OPENAI_PATH):
        # OpenAI has no 422.
        statuses = statuses - {422} | {400}
    return sorted(statuses)


def _problem(status: int | None) -> dict[str, Any]:
    description = HTTPStatus(status).phrase if status is not None else "Any other error"
    schema = {"$ref": REF.format(model=ProblemDetails.__name__)}
    return {"description": description, "content": {PROBLEM: {"schema": schema}}}


def _openai_error(status: int | None) -> dict[str, Any]:
    schema = {"$ref": REF.format(model=OpenAIErrorBody.__name__)}
    return {**_problem(status), "content": {"application/json": {"schema": schema}}}
