"""Behind nginx, with the configuration that the guide shows."""

import contextlib
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest

from tests.fakes.launcher import FakeAttempt
from tests.guides.code_blocks import DOCS, blocks
from tests.service.harness import ServiceHarness
from tests.service.live_server import DEADLINE, Reader, served

pytestmark = pytest.mark.skipif(shutil.which("nginx") is None, reason="nginx is missing")

AROUND = """
daemon off; pid nginx.pid; error_log stderr;
events {{}}
http {{
  access_log off; client_body_temp_path body; proxy_temp_path proxy;
  fastcgi_temp_path fastcgi; uwsgi_temp_path uwsgi; scgi_temp_path scgi;
{server}
}}
"""


def configuration(upstream: int, port: int) -> str:
    """The guide's block, on free ports and without its certificate."""
    (block,) = [block for block in blocks(DOCS / "guides" / "proxy.md") if block.language == "nginx"]
    server = re.sub(r"^\s*ssl_.*\n", "", block.text, flags=re.MULTILINE)
    for written, ours in (("443 ssl", f"127.0.0.1:{port}"), ("http://127.0.0.1:8000", f"http://127.0.0.1:{upstream}")):
        assert written in server
        server = server.replace(written, ours)
    return AROUND.format(server=server)


@pytest.fixture
def proxy(rig: ServiceHarness, tmp_path: Path) -> Iterator[tuple[str, int]]:
    """(host, port) of nginx, before a service."""
    with served(rig) as (_, upstream):
        nginx, port = start(upstream, tmp_path)
        with nginx:
            yield "127.0.0.1", port
            nginx.terminate()


def start(upstream: int, folder: Path) -> tuple["subprocess.Popen[bytes]", int]:
    """nginx and its port, once it listens there. Another program may take a port that was free: then, another port."""
    command = ["nginx", "-p", str(folder), "-c", str(folder / "nginx.conf"), "-e", "stderr"]
    while True:
        with socket.create_server(("127.0.0.1", 0)) as probe:
            port = probe.getsockname()[1]
        (folder / "nginx.conf").write_text(configuration(upstream, port))
        nginx = subprocess.Popen(command, stderr=subprocess.PIPE)
        if listens(port, nginx):
            return nginx, port
        said = nginx.communicate()[1]
        assert b"Address already in use" in said, said


def listens(port: int, nginx: "subprocess.Popen[bytes]") -> bool:
    """Whether nginx answers at the port; False if it has ended."""
    deadline = time.monotonic() + DEADLINE
    while nginx.poll() is None:
        assert time.monotonic() < deadline, "nginx does not listen"
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=DEADLINE):
            return nginx.poll() is None
        time.sleep(0.02)
    return False


def test_a_stream_s_points_come_through_one_by_one(rig: ServiceHarness, proxy: tuple[str, int]) -> None:
    job_id, attempt = rig.running()
    with contextlib.closing(Reader(proxy, f"/jobs/{job_id}/metrics/stream")) as stream:
        read_as_it_comes(rig, attempt, stream)


def read_as_it_comes(rig: ServiceHarness, attempt: FakeAttempt, stream: Reader) -> None:
    assert (stream.status, stream.headers["content-type"].split(";")[0]) == (200, "text/event-stream")
    for step in (1, 2, 3):
        # The next point is made only once the one before has arrived: a proxy that gathers would never send it.
        attempt.metric(step)
        rig.ship(attempt)
        while (event := stream.take(1)[0])["event"] != "metric":
            pass
        assert event["data"]["step"] == step


def test_a_browser_s_request_comes_through_and_a_foreign_one_does_not(
    rig: ServiceHarness, proxy: tuple[str, int]
) -> None:
    host, port = proxy
    with httpx2.Client(base_url=f"http://{host}:{port}", headers={"X-Request-ID": "from-the-proxy"}) as client:
        own = client.post("/jobs", json=rig.spec(), headers={"Origin": f"https://{host}"})
        assert (own.status_code, own.headers["x-request-id"]) == (201, "from-the-proxy")
        foreign = client.post("/jobs", json=rig.spec(), headers={"Origin": "https://elsewhere.example"})
        assert (foreign.status_code, foreign.json()["code"]) == (403, "foreign_origin")
        unknown = client.get("/jobs", headers={"Host": "elsewhere.example"})
        assert (unknown.status_code, unknown.json()["code"]) == (403, "foreign_host")
