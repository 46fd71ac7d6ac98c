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


def test_the_end_of_its_log_is_evidence_and_not_requests(tmp_path: Path) -> None:
    request = "2026-01-31T16:31:10.000Z INFO trainyard request request_id=req_1 route=/jobs status=200"
    rejected = request.replace("INFO", "WARNING").replace("200", "422")
    service = DemoService(tmp_path)
    service.log.write_text("\n".join(["launching", *[request] * 50, rejected, *[request] * 50]))
    assert service.tail(10) == ["launching", rejected]


def test_a_service_that_does_nothing_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainyard.client.demo.service.STALL_SECONDS", 0.2)
    (tmp_path / "sleeps").write_text("#!/bin/sh\nexec sleep 60\n")
    (tmp_path / "sleeps").chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "sleeps"))
    with DemoService(tmp_path) as service, pytest.raises(ServiceFailed, match="has done nothing for"):
        service.start()
