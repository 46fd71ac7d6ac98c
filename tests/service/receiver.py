"""A real HTTP server that is sent webhooks, and does what the test says."""

import base64
import contextlib
import hashlib
import hmac
import json
import ssl
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

DEADLINE = 120.0
"""Also for the process of the notices, which has a minute to load Apprise."""


@dataclass(frozen=True)
class Got:
    """A request as it came."""

    path: str
    headers: dict[str, str]
    body: bytes

    @property
    def payload(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.body)
        return found

    @property
    def id(self) -> str:
        return self.headers["webhook-id"]

    @property
    def type(self) -> str:
        kind: str = self.payload["type"]
        return kind


def verified(secret: str, got: Got) -> bool:
    """By the words of Standard Webhooks, and by nothing of ours."""
    key = base64.b64decode(secret.removeprefix("whsec_"))
    signed = f"{got.headers['webhook-id']}.{got.headers['webhook-timestamp']}.".encode() + got.body
    wanted = base64.b64encode(hmac.new(key, signed, hashlib.sha256).digest()).decode()
    return any(one == f"v1,{wanted}" for one in got.headers["webhook-signature"].split(" "))


Answer = Callable[["Receiver", BaseHTTPRequestHandler, Got], None]


def status(code: int, text: str = "", **headers: str) -> Answer:
    """Answer with this."""

    def answer(_: "Receiver", handler: BaseHTTPRequestHandler, __: Got) -> None:
        body = text.encode()
        handler.send_response(code)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.end_headers()
        handler.wfile.write(body)

    return answer


class Receiver:
    """What came is in ``got``; ``answer`` is what comes back. ``hold`` keeps answers back until it is set."""

    def __init__(self, host: str = "127.0.0.1", context: ssl.SSLContext | None = None) -> None:
        self.got: list[Got] = []
        self.answer = status(204)
        self.hold = threading.Event()
        self.hold.set()
        self._came = threading.Condition()
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                got = Got(self.path, {name.lower(): value for name, value in self.headers.items()}, body)
                with receiver._came:
                    receiver.got.append(got)
                    receiver._came.notify_all()
                receiver.hold.wait(DEADLINE)
                with contextlib.suppress(OSError):
                    receiver.answer(receiver, self, got)

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer((host, 0), Handler)
        self.server.daemon_threads = True
        if context is not None:
            self.server.socket = context.wrap_socket(self.server.socket, server_side=True)
        self.port = self.server.server_address[1]
        self.url = f"http{'s' if context else ''}://{host}:{self.port}/hook"
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True)
        self.thread.start()

    def wait(self, count: int) -> list[Got]:
        """The requests once there are so many."""
        with self._came:
            assert self._came.wait_for(lambda: len(self.got) >= count, DEADLINE), [got.type for got in self.got]
        return list(self.got)

    def close(self) -> None:
        self.hold.set()
        self.server.shutdown()
        self.server.server_close()


@contextlib.contextmanager
def receiving(host: str = "127.0.0.1", context: ssl.SSLContext | None = None) -> Iterator[Receiver]:
    receiver = Receiver(host, context)
    try:
        yield receiver
    finally:
        receiver.close()
