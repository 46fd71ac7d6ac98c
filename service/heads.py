"""HEAD is answered as GET is, without the body: monitors and `curl -I` ask so whether somebody is there."""

from starlette.types import ASGIApp, Message, Receive, Scope, Send

ENDLESS = "/stream"


class Heads:
    """In front of the routes, which know GET alone. A stream has no end that could be waited for: 405 there."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http" or scope["method"] != "HEAD" or scope["path"].endswith(ENDLESS):
            await self._app(scope, receive, send)
            return
        asked = {**scope, "method": "GET"}
        try:
            await self._app(asked, receive, _bodiless(send))
        finally:
            # Who counts requests by route looks for it where the request came in.
            scope["route"] = asked.get("route")


def _bodiless(send: Send) -> Send:
    async def sent(message: Message) -> None:
        await send({**message, "body": b""} if message["type"] == "http.response.body" else message)

    return sent
