import socket
from collections.abc import Callable, Iterator

import pytest

from tests.client.fake_service import QUICK, URL, FakeService, console, job, written
from trainyard.client import api
from trainyard.client.api import Client
from trainyard.client.cli.main import main
from trainyard.client.cli.watch import watcher
from trainyard.client.connection import Connection

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(autouse=True)
def _no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TRAINYARD_URL", "TRAINYARD_TOKEN", "TRAINYARD_HOME", "NO_COLOR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("COLUMNS", "110")
    monkeypatch.setenv("TERM", "xterm")


@pytest.fixture
def service() -> FakeService:
    return FakeService(job())


@pytest.fixture
def trainyard(service: FakeService) -> Client:
    return Client(URL, retries=QUICK, transport=service.transport)


@pytest.fixture
def run(service: FakeService, monkeypatch: pytest.MonkeyPatch) -> Run:
    """The command against the fake: ``run("list", "--json")`` -> (exit code, stdout, stderr)."""

    def connected(url: str, token: str | None, timeout: float, *_: object) -> Connection:
        return Connection(url, token, timeout, QUICK, service.transport)

    monkeypatch.setattr(api, "Connection", connected)
    monkeypatch.setattr(watcher, "INTERVAL", 0.001)

    def command(*arguments: str, typed: str = "", terminal: bool = False) -> tuple[int, str, str]:
        to = console(typed, terminal=terminal)
        try:
            code = main(list(arguments), to)
        except SystemExit as error:
            code = int(str(error.code))
        return (int(code), *written(to))

    return command


@pytest.fixture
def refusing_port() -> Iterator[int]:
    """A port that refuses connections: the test holds it without listening, so no other process can listen on it."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield taken.getsockname()[1]
