"""The service that a module's stories are told to, each with its own ``corpus``; a port for a service of one's own."""

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.story.service_process import Served


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Iterator[Served]:
    service = Served(tmp_path_factory.mktemp("home") / "home", [corpus.parent])
    service.start()
    yield service
    service.stop()


@pytest.fixture
def free_port() -> str:
    """A port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])
