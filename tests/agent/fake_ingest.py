"""A service that only listens to agents: it can be taken away and brought back."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from trainyard.contract.status import Desired


class FakeIngest:
    """Stores what agents report, keyed by seq."""

    def __init__(self) -> None:
        self.lines: dict[int, dict[str, Any]] = {}
        self.reports: list[dict[str, Any]] = []
        self.desired = Desired.RUN
        self.settings: Any = None
        self.tokens: set[str] = set()
        self.down = False
        self.duplicates = 0
        service = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                if service.down:
                    self.send_error(503)
                    return
                service.tokens.add(self.headers["Authorization"])
                answer = json.dumps(service.take(self.path.rsplit("/", 1)[1], body)).encode()
                self.send_response(200)
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
