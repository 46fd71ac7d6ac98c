"""The key by which clients recognise the service of a home, and the proof that the service makes with it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.service.harness import ServiceHarness
from trainyard.client.api import Client
from trainyard.client.connection import RetryPolicy
from trainyard.client.errors import ServiceUnreachable
from trainyard.contract.service_proof import prove_service
from trainyard.service.home import service_key

NONCE = "0123456789abcdef" * 2


def test_the_key_is_for_the_owner_alone_and_stays(tmp_path: Path) -> None:
    umask = os.umask(0)
    try:
        key = service_key(tmp_path)
    finally:
        os.umask(umask)
    assert len(key) == 32
    assert [path.name for path in tmp_path.iterdir()] == ["service.key"]
    assert (tmp_path / "service.key").stat().st_mode & 0o7777 == 0o600
    assert service_key(tmp_path) == key


def test_a_key_that_others_could_read_or_that_is_damaged_is_replaced(tmp_path: Path) -> None:
    first = service_key(tmp_path)
    (tmp_path / "service.key").chmod(0o640)
    second = service_key(tmp_path)
    assert second != first
    for damage in (b"", b"\xff\xfe", b"0123"):
        (tmp_path / "service.key").write_bytes(damage)
        assert service_key(tmp_path) not in (first, second)
        assert (tmp_path / "service.key").stat().st_mode & 0o7777 == 0o600


def test_the_proof_needs_a_nonce_and_is_for_the_address_of_the_connection(rig: ServiceHarness) -> None:
    key = service_key(rig.settings.home)
    asked = rig.client.get("/health", headers={"Trainyard-Nonce": NONCE})
    address, port = "127.0.0.1", 8000
    assert asked.headers["Trainyard-Proof"] == prove_service(key, NONCE, address, port)
    assert asked.json() == {"status": "ok"}
    for headers in ({}, {"Trainyard-Nonce": ""}, {"Trainyard-Nonce": "short"}, {"Trainyard-Nonce": f"{NONCE}\n x"}):
        assert "Trainyard-Proof" not in rig.client.get("/health", headers=headers).headers


@pytest.mark.long
def test_the_command_s_client_recognises_a_real_service_by_its_home(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "trainyard-home"
    service = subprocess.Popen(
        [sys.executable, "-m", "trainyard.service", "--home", str(home), "--port", "0"],
        env={**os.environ, "TRAINYARD_TOKEN": "secret", "TRAINYARD_TOKEN_FILE": ""},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    with service:
        try:
            assert service.stdout is not None
            url = service.stdout.readline().split()[-1]
            for told in (str(home), ""):
                monkeypatch.setenv("TRAINYARD_HOME", told)
                monkeypatch.chdir(tmp_path)
                with Client(url, "secret") as client:
                    assert client.version()["name"] == "trainyard"
            # As if another program had taken the port of the service of this home.
            (home / "service.key").write_text(f"{'0' * 64}\n")
            with Client(url, "secret", retries=RetryPolicy(seconds=0)) as client:
                with pytest.raises(ServiceUnreachable, match="does not have the key of the service in"):
                    client.version()
            assert json.loads((home / "service.json").read_text())["url"] == url
        finally:
            service.kill()
