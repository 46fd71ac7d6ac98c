"""Sends a piece of an open file."""

from typing import BinaryIO

import anyio.to_thread
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from service.checkpoints.files import Slice

CHUNK = 1 << 20


class Download(Response):
    """``file`` is read as fast as it is taken, and closed whatever happens."""

    media_type = "application/octet-stream"

    def __init__(self, file: BinaryIO, piece: Slice, name: str, etag: str | None) -> None:
        super().__init__(status_code=206 if piece.partial else 200)
        self._file = file
        self._piece = piece
        self.headers["content-length"] = str(piece.length)
        self.headers["accept-ranges"] = "bytes"
        self.headers["content-disposition"] = f'attachment; filename="{name}"'
        if piece.partial:
            self.headers["content-range"] = f"bytes {piece.first}-{piece.last}/{piece.size}"
        if etag is not None:
            self.headers["etag"] = etag

    async def __call__(self, _scope: Scope, _receive: Receive, send: Send) -> None:
        """Send it."""
        try:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            self._file.seek(self._piece.first)
            left = self._piece.length
            while left > 0:
                data = await anyio.to_thread.run_sync(self._file.read, min(CHUNK, left))
                if not data:
                    raise OSError("a file of a checkpoint became shorter while it was sent")
                left -= len(data)
                await send({"type": "http.response.body", "body": data, "more_body": left > 0})
            if self._piece.length <= 0:
                await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            self._file.close()
