"""A response that sends an open file, or a range of it."""

import os
from collections.abc import Iterator
from typing import BinaryIO

from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from trainyard.service.storage.checkpoint_files import ByteRange, parse_range

CHUNK = 1 << 20

WITHOUT_BODY = "trainyard.without_body"
"""Key in the ASGI scope of a HEAD request. It is handled as GET, but only the headers are sent."""


class FileRangeResponse(StreamingResponse):
    """Streams ``file``, or the range of a Range ``header``, and closes it, also if the client disconnects.

    Starlette's FileResponse opens the path again, which may be another file by then, and responds to some ranges with
    a 400 in plain text (docs/decisions/0014).
    """

    media_type = "application/octet-stream"

    def __init__(self, file: BinaryIO, header: str | None, name: str, etag: str | None = None) -> None:
        self._file = file
        try:
            range_ = parse_range(header, os.fstat(file.fileno()).st_size)
        except BaseException:
            file.close()
            raise
        super().__init__(_chunks(file, range_), status_code=206 if range_.partial else 200)
        self.headers["content-length"] = str(range_.length)
        self.headers["accept-ranges"] = "bytes"
        self.headers["content-disposition"] = f'attachment; filename="{name}"'
        if range_.partial:
            self.headers["content-range"] = f"bytes {range_.first}-{range_.last}/{range_.size}"
        if etag is not None:
            self.headers["etag"] = etag

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            if scope.get(WITHOUT_BODY):
                # Reading the file would delay the next request on the connection, by minutes if it is large.
                await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
                await send({"type": "http.response.body", "body": b""})
            else:
                await super().__call__(scope, receive, send)
        finally:
            self._file.close()


def _chunks(file: BinaryIO, range_: ByteRange) -> Iterator[bytes]:
    file.seek(range_.first)
    remaining = range_.length
    while remaining > 0:
        data = file.read(min(CHUNK, remaining))
        if not data:
            raise RuntimeError("a file of a checkpoint became shorter while it was sent")
        remaining -= len(data)
        yield data
