"""Middleware that serves the dashboard's page and static files in front of the API."""

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from trainyard.service.dashboard.assets import Asset, Assets
from trainyard.service.dashboard.negotiation import accepts_gzip, is_file, is_page, is_page_or_api

CONTENT_SECURITY_POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self' data:",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    )
)
"""No inline script or style, nothing from another origin, no framing. Swagger UI's style needs `data:`."""

IMMUTABLE = "public, max-age=31536000, immutable"
"""The content at a URL with a hash never changes."""

REVALIDATE = "no-cache"


class DashboardMiddleware:
    """Serve the page and the static files; pass every other request on to the API."""

    def __init__(self, app: ASGIApp, assets: Assets) -> None:
        self._app = app
        self._assets = assets

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        method, path, headers = scope["method"], scope["path"], Headers(scope=scope)
        asset = self._assets.find(path) if is_file(method, path) else None
        if is_page(method, path, headers.get("accept", "")):
            await self._page_response(headers, path)(scope, receive, send)
        elif asset is not None:
            await _file_response(asset, headers)(scope, receive, send)
        else:
            await self._app(scope, receive, _add_vary_accept(send) if is_page_or_api(path) else send)

    def _page_response(self, headers: Headers, path: str) -> Response:
        page = self._assets.page(path)
        extra = {
            "Cache-Control": REVALIDATE,
            "ETag": page.etag,
            "Vary": "Accept, Accept-Encoding" if is_page_or_api(path) else "Accept-Encoding",
            "Content-Security-Policy": CONTENT_SECURITY_POLICY,
            "Referrer-Policy": "no-referrer",
            "X-Frame-Options": "DENY",
            "Cross-Origin-Opener-Policy": "same-origin",
        }
        if headers.get("if-none-match") == page.etag:
            return Response(status_code=304, headers=extra)
        return _asset_response(page.html, headers, extra)


def _file_response(asset: Asset, headers: Headers) -> Response:
    extra = {"Cache-Control": IMMUTABLE, "Vary": "Accept-Encoding", "Cross-Origin-Resource-Policy": "same-origin"}
    return _asset_response(asset, headers, extra)


def _asset_response(asset: Asset, headers: Headers, extra: dict[str, str]) -> Response:
    # The server drops the body of a response to HEAD.
    if accepts_gzip(headers.get("accept-encoding", "")):
        return Response(asset.gzipped, media_type=asset.media_type, headers={**extra, "Content-Encoding": "gzip"})
    return Response(asset.plain, media_type=asset.media_type, headers=extra)


def _add_vary_accept(send: Send) -> Send:
    async def send_with_vary(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            if headers.get("vary") != "Accept":  # shared reads have it already
                headers.add_vary_header("Accept")
        await send(message)

    return send_with_vary
