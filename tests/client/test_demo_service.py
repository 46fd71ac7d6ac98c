import sys
from pathlib import Path

import pytest

from tests.client.fake_service import URL
from trainyard.client.demo.service import DemoService, ServiceFailed, environment


def test_the_user_s_own_settings_stay_outside(tmp_path: Path) -> None:
    made = environment({"PATH": "/bin", "TRAINYARD_TOKEN": "secret", "TRAINYARD_URL": URL}, tmp_path)
    assert made == {
        "PATH": "/bin",
        "TRAINYARD_HOME": str(tmp_path),
        "TRAINYARD_HOST": "127.0.0.1",
        "TRAINYARD_PORT": "0",
    }


def test_a_service_that_ends_at_once_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "trainyard.client.demo.service.environment", lambda *_: {"PATH": "/bin", "PYTHONPATH": "/nowhere"}
    )
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with DemoService(tmp_path) as service, pytest.raises(ServiceFailed, match="exit code 1"):
        service.start()
    assert service.tail(3) == []
