"""X-Forwarded headers count if a trusted proxy sent them, and never otherwise."""

import json
import logging
import socket
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from tests.fakes.inventory import FixedInventory
from tests.service.harness import ServiceHarness
from trainyard.service import __main__ as entry
from trainyard.service.api.dependencies import AppState
from trainyard.service.app import create_app
from trainyard.service.proxies import TrustedProxies, parse_address
from trainyard.service.settings import InvalidSettings, Settings

SAID = {"X-Forwarded-For": "198.51.100.7", "X-Forwarded-Proto": "https", "X-Forwarded-Host": "yard.example"}


def client(
    rig: ServiceHarness, proxies: str, peer: str = "10.0.0.5", hosts: tuple[str, ...] = ("127.0.0.1",)
) -> TestClient:
    """A client of the rig's service as somebody at ``peer`` reaches it."""
    settings = rig.settings.model_copy(
        update={"proxies": TrustedProxies.parse(proxies.split(",")), "allowed_hosts": hosts}
    )
    services = AppState(
        settings, rig.database, FixedInventory(tuple(rig.devices)), rig.scheduler, rig.pulse, rig.sender
    )
    app = create_app(services, scheduling=False)
    return TestClient(app, base_url="http://127.0.0.1:8000", client=(peer, 40000), follow_redirects=False)


def logged(caplog: pytest.LogCaptureFixture) -> Any:
    return [vars(record) for record in caplog.records if record.message == "request"][-1]["client"]


@pytest.mark.parametrize(
    ("proxies", "peer", "chain", "seen"),
    [
        ("", "10.0.0.5", "198.51.100.7", "10.0.0.5"),
        ("10.0.0.6", "10.0.0.5", "198.51.100.7", "10.0.0.5"),
        ("10.0.0.5", "10.0.0.5", "198.51.100.7", "198.51.100.7"),
        ("10.0.0.0/8", "10.0.0.5", "6.6.6.6, 198.51.100.7, 10.0.0.9", "198.51.100.7"),
        ("10.0.0.5", "10.0.0.5", "6.6.6.6, 198.51.100.7", "198.51.100.7"),
        ("10.0.0.5", "10.0.0.5", "198.51.100.7:4711", "198.51.100.7"),
        ("10.0.0.5", "10.0.0.5", "[2001:db8::1]:4711", "2001:db8::1"),
        ("10.0.0.5", "10.0.0.5", "198.51.100.7, unknown", "10.0.0.5"),
        ("10.0.0.5", "10.0.0.5", "<script>", "10.0.0.5"),
        ("10.0.0.5", "10.0.0.5", "", "10.0.0.5"),
        ("10.0.0.0/8", "10.0.0.5", "10.0.0.9", "10.0.0.9"),
        ("::1,127.0.0.1", "::1", "2001:db8::1", "2001:db8::1"),
        ("10.0.0.5", "::ffff:10.0.0.5", "198.51.100.7", "198.51.100.7"),
    ],
)
def test_the_client_is_the_last_one_that_is_no_proxy_of_ours(
    rig: ServiceHarness, caplog: pytest.LogCaptureFixture, proxies: str, peer: str, chain: str, seen: str
) -> None:
    caplog.set_level(logging.DEBUG, "trainyard")
    client(rig, proxies, peer).get("/health", headers={"X-Forwarded-For": chain})
    assert logged(caplog) == seen


def test_the_scheme_and_the_host_are_those_that_were_asked_for(rig: ServiceHarness) -> None:
    behind = client(rig, "10.0.0.5", hosts=("yard.example",))
    assert behind.get("/jobs/", headers=SAID).headers["location"] == "https://yard.example/jobs"
    own = {**SAID, "Origin": "https://yard.example"}
    assert behind.post("/jobs", json=rig.spec(), headers=own).status_code == 201
    foreign = {**SAID, "Origin": "https://elsewhere.example"}
    assert behind.post("/jobs", json=rig.spec(), headers=foreign).json()["code"] == "foreign_origin"
    unknown = {**SAID, "X-Forwarded-Host": "elsewhere.example"}
    assert behind.get("/jobs", headers=unknown).json()["code"] == "foreign_host"
    last = {**SAID, "X-Forwarded-Host": "yard.example, elsewhere.example", "X-Forwarded-Proto": "https, gopher"}
    assert behind.get("/jobs", headers=last).json()["code"] == "foreign_host", "the last one is the proxy's own word"
    assert behind.get("/jobs/", headers={**SAID, "X-Forwarded-Proto": "https, gopher"}).headers["location"] == (
        "http://yard.example/jobs"
    )


def test_below_a_path_prefix_the_api_works_and_the_pages_are_refused_in_words(rig: ServiceHarness) -> None:
    """In 0.1 the dashboard was a blank page there: its files have absolute addresses."""
    seen = client(rig, "10.0.0.5")
    prefixed = {"X-Forwarded-Prefix": "/trains/"}
    created = seen.post("/jobs", json=rig.spec(), headers=prefixed)
    assert created.headers["location"] == f"/trains/jobs/{created.json()['id']}"
    for path in ("/", "/docs", "/jobs"):
        answer = seen.get(path, headers={**prefixed, "Accept": "text/html"})
        assert (answer.status_code, answer.json()["code"]) == (501, "path_prefix")
        assert "Give the service a host name of its own" in answer.json()["detail"]
    assert seen.get("/jobs", headers=prefixed).status_code == 200
    for harmless in ("/", "", "//evil.example", "javascript:", "/a b"):
        answer = seen.post("/jobs", json=rig.spec(), headers={"X-Forwarded-Prefix": harmless})
        assert answer.headers["location"] == f"/jobs/{answer.json()['id']}"
        assert seen.get("/", headers={"X-Forwarded-Prefix": harmless}).status_code == 200
    stranger = client(rig, "10.0.0.6")
    assert stranger.get("/", headers=prefixed).status_code == 200


def test_a_link_to_the_next_page_has_the_prefix(rig: ServiceHarness) -> None:
    job_id, attempt = rig.running()
    for step in (1, 2):
        attempt.metric(step)
    rig.ship(attempt)
    headers = {"X-Forwarded-Prefix": "/trains", "Accept": "text/csv"}
    answer = client(rig, "10.0.0.5").get(f"/jobs/{job_id}/metrics?limit=1", headers=headers)
    assert answer.headers["link"] == f'</trains/jobs/{job_id}/metrics?limit=1&after_step=1>; rel="next"'


def test_others_are_not_believed(rig: ServiceHarness) -> None:
    direct = client(rig, "10.0.0.6")
    assert direct.get("/jobs/", headers=SAID).headers["location"] == "http://127.0.0.1:8000/jobs"
    assert direct.get("/jobs", headers={**SAID, "Host": "yard.example"}).json()["code"] == "foreign_host"
    own = {**SAID, "Origin": "https://yard.example"}
    assert direct.post("/jobs", json=rig.spec(), headers=own).json()["code"] == "foreign_origin"


def test_addresses() -> None:
    assert [str(parse_address(text)) for text in ("1.2.3.4", " ::1 ", "[::1]", "::ffff:1.2.3.4")] == [
        "1.2.3.4",
        "::1",
        "::1",
        "1.2.3.4",
    ]
    assert [parse_address(text) for text in ("", "localhost", "1.2.3", "1.2.3.4.5", "[", "::g")] == [None] * 6


# What may be listened on, and by whom

REFUSED = (
    "0.0.0.0",
    "::",
    "::0",
    "0",
    "0x0",
    "00.0.0.0",
    "[::]",
    "::ffff:0.0.0.0",
    "10.0.0.5",
    "fe80::1",
    "yard.example",
    "localhost.evil.example",
    "localhost.",
    "127.0.0.1.evil.example",
    "127.1",
    "unix:/tmp/socket",
    "/tmp/socket",
    "*",
    " ",
)


@pytest.mark.parametrize("host", REFUSED)
def test_without_a_token_nothing_else_than_loopback_is_listened_on(
    tmp_path: Path, host: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("TRAINYARD_TOKEN", "TRAINYARD_TOKEN_FILE"):
        monkeypatch.delenv(name, raising=False)
    home = tmp_path / "home"
    assert entry.main([f"--host={host}", "--port=0", f"--home={home}"]) == 2
    assert "set TRAINYARD_TOKEN" in capsys.readouterr().err
    assert not home.exists(), "refused before anything was done"
    monkeypatch.setenv("TRAINYARD_HOST", host)
    assert entry.main(["--port=0", f"--home={home}"]) == 2


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.9", "::1", "localhost"])
def test_loopback_needs_none(host: str) -> None:
    assert Settings.read({}, host=host).host == host


def test_a_name_that_means_another_address_is_found_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = Settings.read({}, host="localhost", port=0, home=tmp_path)
    real = socket.socket.bind
    monkeypatch.setattr(socket.socket, "bind", lambda self, _: real(self, ("0.0.0.0", 0)))
    with pytest.raises(InvalidSettings, match="others can reach"):
        entry._bind(settings)
    with entry._bind(settings.model_copy(update={"token": "long enough"})) as listener:
        assert listener.getsockname()[0] == "0.0.0.0"


def test_the_setting() -> None:
    with pytest.raises(InvalidSettings, match="through a proxy without a token"):
        Settings.read({"TRAINYARD_TRUSTED_PROXIES": "127.0.0.1"})
    for wrong in ("proxy.example", "10.0.0.5/8", "10.0.0.256", "*"):
        with pytest.raises(InvalidSettings, match="addresses or networks"):
            Settings.read({"TRAINYARD_TRUSTED_PROXIES": wrong, "TRAINYARD_TOKEN": "x"})
    settings = Settings.read({"TRAINYARD_TRUSTED_PROXIES": "127.0.0.1, 10.0.0.0/8,", "TRAINYARD_TOKEN": "x"})
    assert len(settings.proxies.networks) == 2
    assert json.dumps(str(settings.proxies.networks[0])) == '"127.0.0.1/32"'
    assert Settings.read({}).proxies == TrustedProxies()
