"""Routes that return the documentation: the OpenAPI document, and the pages as Markdown with their index.

The dashboard shows the OpenAPI document at /docs.
"""

from typing import Annotated, Any

from fastapi import APIRouter, Request
from fastapi import Path as InPath
from fastapi.responses import JSONResponse, PlainTextResponse, Response

from trainyard.service.api import documentation
from trainyard.service.api.responses import ServiceRoute
from trainyard.service.auth.permissions import OPEN, READ
from trainyard.service.errors import PageNotFound

MARKDOWN = "text/markdown"
_TEXT = {"schema": {"type": "string"}}
TEXT_RESPONSE: dict[int | str, dict[str, Any]] = {200: {"content": {"text/plain": _TEXT}}}
MARKDOWN_RESPONSE: dict[int | str, dict[str, Any]] = {200: {"content": {MARKDOWN: _TEXT}}}

router = APIRouter(tags=["service"], route_class=ServiceRoute)


@router.get("/openapi.json", dependencies=[READ], include_in_schema=False)
def openapi_document(request: Request) -> JSONResponse:
    """Return the OpenAPI document."""
    return JSONResponse(request.app.openapi())


@router.get("/llms.txt", dependencies=[OPEN], response_class=Response, responses=TEXT_RESPONSE)
def read_index() -> Response:
    """Return the list of the documentation's pages, for language models."""
    return PlainTextResponse(documentation.index())


@router.get("/docs/{page:path}.md", dependencies=[OPEN], response_class=Response, responses=MARKDOWN_RESPONSE)
def read_page(page: Annotated[str, InPath(max_length=200)]) -> Response:
    """Return a page of the documentation as Markdown, for example `guides/quickstart`. `/llms.txt` lists all."""
    found = documentation.pages().get(page)
    if found is None:
        raise PageNotFound()
    return Response(found.text, media_type=MARKDOWN)
