"""A token goes only to a program of a trusted user: another one may listen on the port of a dead service."""

import contextlib
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest

from tests.unprivileged import NOBODY
from trainyard.client import local_peer
from trainyard.client.api import Client
from trainyard.client.cli import job_names
from trainyard.client.connection import RetryPolicy
from trainyard.client.errors import ServiceUnreachable

TOKEN = "canary-token-of-a-user"
STRANGER = """
import contextlib, os, socket, sys
if os.geteuid() == 0:
    os.setuid(int(sys.argv[1]))
listener = socket.create_server((sys.argv[2], 0), family=int(sys.argv[3]), dualstack_ipv6=sys.argv[2] == "::")
print(listener.getsockname()[1], flush=True)
if sys.argv[4] == "accepts":
    while True:
        connection, _ = listener.accept()
        connection.settimeout(20)
        print(connection.recv(65536), flush=True)
        with contextlib.suppress(OSError):
            connection.sendall(b"HTTP/1.1 200 OK\\r\\nConnection: close\\r\\nContent-Length: 8\\r\\n\\r\\nno JSON.")
        connection.close()
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

        def start(address: str = "127.0.0.1", accepts: bool = True) -> tuple[str, subprocess.Popen[str]]:
            family = socket.AF_INET6 if ":" in address else socket.AF_INET
            words = [str(NOBODY), address, str(int(family)), "accepts" if accepts else "waits"]
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
@pytest.mark.parametrize("accepts", [True, False])
def test_a_stranger_gets_no_token(stranger: Stranger, address: str, accepts: bool) -> None:
    url, process = stranger(address, accepts)
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
    monkeypatch.setattr(job_names, "SERVICE_SECONDS", 20.0)
    assert list(job_names.jobs()) == []
    process.kill()
    assert TOKEN not in process.communicate()[0]


@pytest.mark.skipif(os.geteuid() != 0, reason="needs a program of another user")
@pytest.mark.parametrize("named", ["nobody", str(NOBODY)])
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


@pytest.mark.parametrize("address", ["127.0.0.1", "::1"])
def test_programs_of_this_user_and_of_the_system_are_trusted(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.create_server((address, 0), family=family) as listener:
        with socket.create_connection(listener.getsockname()[:2]) as connection:
            assert local_peer.distrust(connection) is None
            monkeypatch.setenv("TRAINYARD_SERVICE_USER", "no-such-user")
            assert "so the token was not sent" in (local_peer.distrust(connection) or "")
            accepted, _ = listener.accept()
            with accepted:
                listener.close()
                assert "so the token was not sent" in (local_peer.distrust(connection) or ""), "the other end alone"
                monkeypatch.setattr(local_peer, "TABLES", ("/nowhere",))
                assert local_peer.distrust(connection) is None, "a kernel without the list"
