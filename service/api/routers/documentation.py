"""The route that returns the OpenAPI document. The dashboard shows it at /docs."""

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse

from trainyard.service.api.responses import ServiceRoute
from trainyard.service.auth.permissions import READ

router = APIRouter(include_in_schema=False, dependencies=[READ], route_class=ServiceRoute)


@router.get("/openapi.json")
def openapi_document(request: Request) -> JSONResponse:
    """Return the OpenAPI document."""
    return JSONResponse(request.app.openapi())
