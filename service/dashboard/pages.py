"""Answers with the dashboard's page and files, before the API is asked; marks what the two share."""

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.dashboard.assets import Asset, Assets
from service.dashboard.negotiation import accepts_gzip, is_file, is_page, is_shared

POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self'",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    )
)
"""No inline script, no inline style, nothing from elsewhere; nobody frames us."""

IMMUTABLE = "public, max-age=31536000, immutable"
"""An address with a hash in it always means the same bytes."""

REVALIDATED = "no-cache"


class Pages:
    """In front of the routes."""

    def __init__(self, app: ASGIApp, assets: Assets) -> None:
        self._app = app
        self._assets = assets

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        method, path, headers = scope["method"], scope["path"], Headers(scope=scope)
        asset = self._assets.find(path) if is_file(method, path) else None
        if is_page(method, path, headers.get("accept", "")):
            await self._page(headers, path)(scope, receive, send)
        elif asset is not None:
            await _file(asset, headers)(scope, receive, send)
        else:
            await self._app(scope, receive, _varying(send) if is_shared(path) else send)

    def _page(self, headers: Headers, path: str) -> Response:
        vary = "Accept, Accept-Encoding" if is_shared(path) else "Accept-Encoding"
        own = {
            "Cache-Control": REVALIDATED,
            "ETag": self._assets.shell_tag,
            "Vary": vary,
            "Content-Security-Policy": POLICY,
            "Referrer-Policy": "no-referrer",
            "X-Frame-Options": "DENY",
            "Cross-Origin-Opener-Policy": "same-origin",
        }
        if headers.get("if-none-match") == self._assets.shell_tag:
            return Response(status_code=304, headers=own)
        return _sent(self._assets.shell, headers, own)


def _file(asset: Asset, headers: Headers) -> Response:
    own = {"Cache-Control": IMMUTABLE, "Vary": "Accept-Encoding", "Cross-Origin-Resource-Policy": "same-origin"}
    return _sent(asset, headers, own)


def _sent(asset: Asset, headers: Headers, own: dict[str, str]) -> Response:
    """Packed where the reader takes that. The server itself leaves the body out of an answer to HEAD."""
    if accepts_gzip(headers.get("accept-encoding", "")):
        return Response(asset.packed, media_type=asset.media_type, headers={**own, "Content-Encoding": "gzip"})
    return Response(asset.plain, media_type=asset.media_type, headers=own)


def _varying(send: Send) -> Send:
    async def marked(message: Message) -> None:
        if message["type"] == "http.response.start":
            MutableHeaders(scope=message).add_vary_header("Accept")
        await send(message)

    return marked
