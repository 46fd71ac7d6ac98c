"""The response that sends a range of an open file."""

from collections.abc import Iterator
from typing import BinaryIO

from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from trainyard.service.storage.checkpoint_files import ByteRange

CHUNK = 1 << 20


class FileRangeResponse(StreamingResponse):
    """Reads ``file`` as fast as the client takes it, stops if the client leaves, and closes it in every case.

    Starlette's FileResponse opens a path, which another file may have by then, and answers some ranges with 400 in
    plain text (docs/decisions/0014).
    """

    media_type = "application/octet-stream"

    def __init__(self, file: BinaryIO, piece: ByteRange, name: str, etag: str | None) -> None:
        self._file = file
        super().__init__(_chunks(file, piece), status_code=206 if piece.partial else 200)
        self.headers["content-length"] = str(piece.length)
        self.headers["accept-ranges"] = "bytes"
        self.headers["content-disposition"] = f'attachment; filename="{name}"'
        if piece.partial:
            self.headers["content-range"] = f"bytes {piece.first}-{piece.last}/{piece.size}"
        if etag is not None:
            self.headers["etag"] = etag

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._file.close()


def _chunks(file: BinaryIO, piece: ByteRange) -> Iterator[bytes]:
    file.seek(piece.first)
    left = piece.length
    while left > 0:
        data = file.read(min(CHUNK, left))
        if not data:
            raise RuntimeError("a file of a checkpoint became shorter while it was sent")
        left -= len(data)
        yield data
