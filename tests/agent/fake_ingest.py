"""A service that only listens to agents: it can be taken away and brought back."""

import json
import os
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from trainyard.contract.attempt_proof import ANSWER_HEADER, RequestProof, key_of
from trainyard.contract.status import Desired

TOKEN = f"secret-of-{os.getpid()}"


class FakeIngest:
    """Stores what agents report, keyed by seq."""

    def __init__(self) -> None:
        self.lines: dict[int, dict[str, Any]] = {}
        self.reports: list[dict[str, Any]] = []
        self.desired = Desired.RUN
        self.settings: Any = None
        self.authorizations: list[str] = []
        # The attempt's token, by which this service proves itself. None: a stranger on the service's port.
        self.token: str | None = TOKEN
        self.down = False
        self.duplicates = 0
        service = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                content = self.rfile.read(int(self.headers["Content-Length"]))
                body = json.loads(content)
                if service.down:
                    self.send_error(503)
                    return
                service.authorizations.append(self.headers["Authorization"])
                proof = RequestProof.parse("/".join(self.path.split("/")[-2:]), self.headers["Authorization"])
                assert proof is not None
                assert proof.covers(content)
                answer = json.dumps(service.take(self.path.rsplit("/", 1)[1], body)).encode()
                self.send_response(200)
                if service.token is not None:
                    key = key_of(service.token)
                    assert proof.token(key) == service.token
                    self.send_header(ANSWER_HEADER, proof.answer(key, answer))
                self.send_header("Content-Length", str(len(answer)))
                self.end_headers()
                self.wfile.write(answer)

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02})
        self.thread.start()

    def take(self, what: str, body: dict[str, Any]) -> dict[str, Any]:
        if what == "events":
            self.duplicates += sum(line["seq"] in self.lines for line in body["events"])
            self.lines.update({line["seq"]: line for line in body["events"]})
        if what == "exit":
            self.reports.append(body)
        acked = 0
        while acked + 1 in self.lines:
            acked += 1
        return {"acked": acked, "desired": self.desired, "settings": self.settings}

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.server_port}"

    def close(self) -> None:
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()
