"""What the stories need of this machine."""

import socket

import pytest


@pytest.fixture
def free_port() -> str:
    """A port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])
