"""A token goes only to a program of a trusted user: another one may listen on the port of a dead service."""

import asyncio
import contextlib
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tests.unprivileged import NOBODY, drop_root, public_tmp_dir
from trainyard.client import local_peer
from trainyard.client.api import Client
from trainyard.client.async_client import AsyncClient
from trainyard.client.cli import job_names
from trainyard.client.connection import RetryPolicy
from trainyard.client.errors import ServiceUnreachable
from trainyard.client.local_peer import UntrustedListener
from trainyard.contract.service_proof import prove_service

TOKEN = "canary-token-of-a-user"
KEY = bytes(range(32))
STRANGER = """
import encodings.idna, os, sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        print(self.requestline, *map(": ".join, self.headers.items()), flush=True)
        body = b'{"status": "ok"}' if sys.argv[4] == "answers" and self.path == "/health" else b"no JSON."
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass

if os.geteuid() == 0:
    # What is imported later, this user may not be able to read.
    os.setuid(int(sys.argv[1]))
class Server(ThreadingHTTPServer):
    address_family = int(sys.argv[3])
listener = Server((sys.argv[2], 0), Handler)
print(listener.server_address[1], flush=True)
if sys.argv[4] != "waits":
    listener.serve_forever()
sys.stdin.read()
"""
Stranger = Callable[..., tuple[str, "subprocess.Popen[str]"]]


@pytest.fixture
def stranger(monkeypatch: pytest.MonkeyPatch) -> Iterator[Stranger]:
    """A program of another user, and its URL."""
    if os.geteuid() != 0:
        # It cannot have another user: the service's is another one then.
        monkeypatch.setenv("TRAINYARD_SERVICE_USER", "0")
    with contextlib.ExitStack() as stack:

        def start(address: str = "127.0.0.1", does: str = "answers") -> tuple[str, subprocess.Popen[str]]:
            family = socket.AF_INET6 if ":" in address else socket.AF_INET
            words = [str(NOBODY), address, str(int(family)), does]
            process = subprocess.Popen(
                [sys.executable, "-c", STRANGER, *words], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            )
            stack.enter_context(process)
            stack.callback(process.kill)
            assert process.stdout is not None
            host = "127.0.0.1" if address == "::" else address
            return f"http://{f'[{host}]' if ':' in host else host}:{int(process.stdout.readline())}", process

        yield start


@pytest.mark.parametrize("address", ["127.0.0.1", "0.0.0.0", "::", "::1"])
@pytest.mark.parametrize("does", ["answers", "waits"])
def test_a_stranger_gets_no_token(stranger: Stranger, address: str, does: str) -> None:
    url, process = stranger(address, does)
    with Client(url.replace("0.0.0.0", "127.0.0.1"), TOKEN, retries=RetryPolicy(seconds=0)) as client:
        with pytest.raises(ServiceUnreachable, match="so the token was not sent; if that user runs the service, set "):
            client.job("job_a")
        with pytest.raises(ServiceUnreachable, match="TRAINYARD_SERVICE_USER="):
            list(client.metric_stream("job_a"))
    process.kill()
    assert TOKEN not in process.communicate()[0]


def test_completion_sends_no_token_to_a_stranger(stranger: Stranger, monkeypatch: pytest.MonkeyPatch) -> None:
    url, process = stranger()
    monkeypatch.setenv("TRAINYARD_URL", url)
    monkeypatch.setenv("TRAINYARD_TOKEN", TOKEN)
    monkeypatch.setattr(job_names, "SERVICE_SECONDS", 60.0)
    assert list(job_names.jobs()) == []
    process.kill()
    assert TOKEN not in process.communicate()[0]


@pytest.mark.skipif(os.geteuid() != 0, reason="needs a program of another user")
@pytest.mark.parametrize("named", ["nobody", str(NOBODY), "any"])
def test_the_user_of_the_service_can_be_named(stranger: Stranger, named: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRAINYARD_SERVICE_USER", named)
    url, process = stranger()
    with Client(url, TOKEN, retries=RetryPolicy(seconds=0)) as client:
        # What answers is no JSON.
        with pytest.raises(ServiceUnreachable, match="not JSON"):
            client.job("job_a")
    process.kill()
    assert f"Bearer {TOKEN}" in process.communicate()[0]


@pytest.mark.skipif(os.geteuid() != 0, reason="needs a program of another user")
def test_without_a_token_there_is_nothing_to_protect(stranger: Stranger) -> None:
    url, _ = stranger()
    with Client(url, "", retries=RetryPolicy(seconds=0)) as client:
        with pytest.raises(ServiceUnreachable, match="not JSON"):
            client.job("job_a")


@dataclass
class Listener:
    """A program of this user. ``key``: it proves to have this one. ``port``: the one in its proofs, if not its own."""

    url: str
    address: tuple[str, int]
    key: bytes | None = None
    port: int | None = None
    health: bytes = b'{"status": "ok"}'
    status: int = 200
    closes: bool = False
    asked: list[tuple[str, str | None]] = field(default_factory=list)

    @property
    def tokens(self) -> list[str]:
        return [token for _, token in self.asked if token is not None]


@pytest.fixture(params=["127.0.0.1", "::1"])
def listener(request: pytest.FixtureRequest) -> Iterator[Listener]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            found.asked.append((self.path, self.headers.get("Authorization")))
            is_health = self.path.endswith("/health")
            body = found.health if is_health else b'{"version": "0"}'
            self.send_response(found.status if is_health else 200)
            self.send_header("Content-Length", str(len(body)))
            if found.closes:
                self.send_header("Connection", "close")
            if found.key is not None:
                port = found.port or found.address[1]
                proof = prove_service(found.key, self.headers["Trainyard-Nonce"] or "", found.address[0], port)
                self.send_header("Trainyard-Proof", proof)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    class Server(ThreadingHTTPServer):
        address_family = socket.AF_INET6 if ":" in request.param else socket.AF_INET

    with Server((request.param, 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        port = server.server_address[1]
        assert isinstance(port, int)
        host = f"[{request.param}]" if ":" in request.param else request.param
        found = Listener(f"http://{host}:{port}", (request.param, port))
        yield found
        server.shutdown()
        thread.join()


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home with a key, which the client is told."""
    monkeypatch.setenv("TRAINYARD_HOME", str(tmp_path))
    (tmp_path / "service.key").write_text(f"{KEY.hex()}\n")
    return tmp_path


def refusal(listener: Listener) -> str | None:
    """Why the client sends no token, or None if it sends one."""
    with Client(listener.url, TOKEN, retries=RetryPolicy(seconds=0)) as client:
        try:
            client.version()
        except ServiceUnreachable as error:
            assert not listener.tokens
            return str(error)
    assert listener.tokens == [f"Bearer {TOKEN}"]
    return None


def test_the_service_of_the_home_gets_the_token_after_its_proof(listener: Listener, home: Path) -> None:
    listener.key = KEY
    assert refusal(listener) is None
    assert [path for path, _ in listener.asked] == ["/health", "/version"]


def test_the_asynchronous_client_checks_the_same(listener: Listener, home: Path) -> None:
    async def ask() -> None:
        async with AsyncClient(listener.url, TOKEN, retries=RetryPolicy(seconds=0)) as client:
            await client.version()

    listener.key = bytes(32)
    with pytest.raises(ServiceUnreachable, match=r"does not have the key .* token was not sent"):
        asyncio.run(ask())
    assert listener.tokens == []
    listener.key = KEY
    asyncio.run(ask())
    assert listener.tokens == [f"Bearer {TOKEN}"]


@pytest.mark.parametrize("what", ["another key", "no proof", "a proof that was passed on from another port"])
def test_a_program_without_the_key_of_the_home_gets_no_token(listener: Listener, home: Path, what: str) -> None:
    listener.key = {"another key": bytes(32), "no proof": None}.get(what, KEY)
    listener.port = 1 if "another port" in what else None
    message = refusal(listener)
    assert message is not None
    assert f"does not have the key of the service in {home}" in message
    assert "unset it" in message
    assert "release 0.1" in message


def test_the_service_behind_a_proxy_on_this_host_is_checked(
    listener: Listener, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With ``HTTP_PROXY`` each connection to a service on another host ends at the proxy."""
    for name in ("no_proxy", "NO_PROXY", "all_proxy", "ALL_PROXY", "HTTP_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("http_proxy", listener.url)
    url = "http://trainer.example:8000"
    health = (f"{url}/health", None)
    with Client(url, TOKEN, retries=RetryPolicy(seconds=0)) as client:
        assert client.version()["version"] == "0"
    assert listener.asked == [health, (f"{url}/version", f"Bearer {TOKEN}")]

    async def ask() -> None:
        async with AsyncClient(url, TOKEN, retries=RetryPolicy(seconds=0)) as client:
            await client.version()

    asyncio.run(ask())
    assert listener.asked[2:] == listener.asked[:2]
    del listener.asked[:]
    listener.status = 400
    with Client(url, TOKEN, retries=RetryPolicy(seconds=0)) as client:
        with pytest.raises(ServiceUnreachable, match=r"does not lead to a Trainyard service, .*; NO_PROXY"):
            client.version()
    assert listener.asked == [health]


def test_a_connection_to_all_interfaces_goes_through_no_proxy() -> None:
    assert local_peer.ends_at(("127.0.0.1", 8000), "0.0.0.0", 8000)
    assert not local_peer.ends_at(("127.0.0.1", 7890), "127.0.0.1", 8000)
    assert not local_peer.ends_at(("127.0.0.1", 8000), "trainer.invalid", 8000)


def test_another_program_of_this_user_gets_no_token(listener: Listener) -> None:
    for listener.status, listener.health in ((200, b"<html>"), (404, b'{"status": "ok"}'), (200, b'{"status": []}')):
        assert "is not a Trainyard service, so the token was not sent" in (refusal(listener) or "")


def test_a_service_of_0_1_gets_the_token_by_the_kernel_s_word(
    listener: Listener, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It makes no key, so its home has none."""
    monkeypatch.setenv("TRAINYARD_HOME", str(tmp_path))
    assert refusal(listener) is None


def test_the_default_home_counts_for_the_port_of_its_service(
    listener: Listener, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    home = tmp_path / "trainyard-home"
    home.mkdir()
    (home / "service.key").write_text(KEY.hex())
    (home / "service.json").write_text('{"url": "http://127.0.0.1:1"}')
    assert refusal(listener) is None, "a service of another home"
    listener.asked.clear()
    (home / "service.json").write_text(json.dumps({"url": listener.url}))
    assert f"does not have the key of the service in {home}" in (refusal(listener) or "")
    listener.asked.clear()
    listener.key = KEY
    assert refusal(listener) is None


@pytest.mark.skipif(os.geteuid() != 0, reason="needs a home of another user")
@pytest.mark.parametrize("does", ["answers", "waits"])
def test_the_home_of_another_user(stranger: Stranger, does: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its key cannot be read, but the kernel says whether its owner runs the program."""
    with public_tmp_dir() as home:
        (home / "service.key").write_text(KEY.hex())
        (home / "service.key").chmod(0o600)
        monkeypatch.setenv("TRAINYARD_HOME", str(home))
        monkeypatch.setenv("TRAINYARD_SERVICE_USER", "nobody")
        url, _ = stranger(does=does)
        port = int(url.rsplit(":", 1)[1])
        with drop_root(), socket.create_connection(("127.0.0.1", port)) as connection:
            if does == "answers":
                local_peer.require_service(connection, url)
            monkeypatch.delenv("TRAINYARD_SERVICE_USER")
            with pytest.raises(
                UntrustedListener, match=r"only root may read the key of the service in .* set TRAINYARD_"
            ):
                local_peer.require_service(connection, url)


def test_the_key_replaces_the_kernel_s_word_on_systems_without_it(
    listener: Listener, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local_peer, "TABLES", ("/nowhere",))
    listener.key = KEY
    assert refusal(listener) is None
    listener.asked.clear()
    (home / "service.key").unlink()
    message = refusal(listener) or ""
    assert "this system does not show whose program listens there" in message
    assert "TRAINYARD_SERVICE_USER=any" in message
    listener.asked.clear()
    monkeypatch.setenv("TRAINYARD_SERVICE_USER", "any")
    assert refusal(listener) is None


def test_a_service_that_is_ending_or_unreachable_is_tried_again(listener: Listener, home: Path) -> None:
    listener.key = KEY
    listener.closes = True
    assert "it closes the connection that was checked" in (refusal(listener) or "")
    listener.closes, listener.status = False, 502
    assert "it answers 502" in (refusal(listener) or "")
    listener.asked.clear()
    with Client(listener.url, TOKEN, retries=RetryPolicy(seconds=60, first_pause=0.01)) as client:
        recovery = threading.Timer(0.1, setattr, (listener, "status", 200))
        recovery.start()
        assert client.version() == {"version": "0"}
        recovery.join()


@pytest.mark.parametrize("address", ["127.0.0.1", "::1"])
def test_programs_of_another_user_than_the_named_one(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRAINYARD_SERVICE_USER", "no-such-user")
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.create_server((address, 0), family=family) as listening:
        with socket.create_connection(listening.getsockname()[:2]) as connection:
            with pytest.raises(UntrustedListener, match="so the token was not sent"):
                local_peer.require_service(connection, "http://any")
            accepted, _ = listening.accept()
            with accepted:
                listening.close()
                # Now the other end alone shows the user.
                with pytest.raises(UntrustedListener, match="so the token was not sent"):
                    local_peer.require_service(connection, "http://any")
