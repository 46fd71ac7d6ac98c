"""`trainyard token ...` against the service itself."""

import json
import re
from collections.abc import Callable
from datetime import UTC, datetime

import httpx2
import pytest

from client import access, api, cli
from client.connection import Connection, Patience
from client.exits import UsageError
from tests.client.fake_service import console, written
from tests.service.rig import Rig

Run = Callable[..., tuple[int, str, str]]
OPERATOR = "the-operator's-own"


@pytest.fixture
def run(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> Run:
    """The command, connected to the rig: ``run("token", "list")`` -> (exit code, stdout, stderr)."""

    def answered(request: httpx2.Request) -> httpx2.Response:
        answer = rig.client.request(
            request.method, str(request.url), content=request.content, headers=list(request.headers.multi_items())
        )
        return httpx2.Response(answer.status_code, headers=answer.headers, content=answer.content)

    def connected(url: str, token: str | None, timeout: float, *_: object) -> Connection:
        return Connection(url, token, timeout, Patience(seconds=0), httpx2.MockTransport(answered))

    monkeypatch.setattr(api, "Connection", connected)
    for name in ("TRAINYARD_TOKEN", "TRAINYARD_URL"):
        monkeypatch.delenv(name, raising=False)

    def command(*arguments: str) -> tuple[int, str, str]:
        to = console()
        try:
            code = int(cli.main(list(arguments), to))
        except SystemExit as error:
            code = int(str(error.code))
        return (code, *written(to))

    return command


def test_a_token_s_life(run: Run, rig: Rig) -> None:
    code, out, err = run("token", "create", "ci", "--scope", "submit", "--expires-in", "90d", "--max-jobs", "3")
    assert code == 0
    token = out.strip()
    assert re.fullmatch(r"ty_[a-z2-7]{12}_\S{43}", token), "nothing but the secret, to be piped"
    assert "scope submit, good until" in err
    assert "not shown again" in err
    assert token not in err
    assert run("list", "--token", token)[0] == 0
    spec = rig.home / "spec.json"
    spec.write_text(json.dumps(rig.spec()))
    assert run("submit", str(spec), "-y", "--json", "--token", token)[0] == 0
    assert run("token", "list", "--token", token)[0] == 4, "not authorised"
    assert run("token", "limit", "ci", "--max-devices", "8")[:2] == (0, "ci jobs 1 devices 1 of 8\n")
    code, out, err = run("token", "rotate", "ci", "--overlap", "1h")
    assert "the one before stays good until" in err
    assert [run("list", "--token", one)[0] for one in (token, out.strip())] == [0, 0]
    code, listed, _ = run("token", "list")
    assert listed.splitlines()[1].split()[:2] == ["ci", "submit"]
    assert token not in listed
    assert run("token", "revoke", "ci")[0] == 0
    assert run("list", "--token", token)[0] == 4
    assert "revoked" in run("token", "list")[1]
    assert run("token", "rotate", "ci")[0] == 1


def test_as_json_and_who_submitted(run: Run, rig: Rig) -> None:
    assert json.loads(run("token", "list", "--json")[1]) == {"object": "list", "data": [], "has_more": False}
    assert "make one" in run("token", "list")[2]
    made = json.loads(run("token", "create", "ci", "--json")[1])
    assert (made["scope"], made["expires_at"]) == ("read", None)
    assert json.loads(run("token", "rotate", "ci", "--json")[1])["token"] != made["token"]
    assert json.loads(run("token", "limit", "ci", "--json")[1])["max_jobs"] is None
    assert json.loads(run("token", "revoke", "ci", "--json")[1]) == {"name": "ci", "revoked": True}
    job_id = rig.submit()
    assert re.search(r"by +local", run("show", job_id)[1])


def test_wrong_usage(run: Run) -> None:
    assert run("token", "create", "a b")[0] == 1
    assert run("token", "create", "ci", "--scope", "root")[0] == 2
    assert run("token", "create", "ci", "--expires-in", "soon")[0] == 2
    assert run("token", "revoke", "nobody-knows")[0] == 1
    assert [access.seconds_in(text) for text in ("90", "90s", "5min", "12h", "2D")] == [90, 90, 300, 43200, 172800]
    with pytest.raises(UsageError, match="12h"):
        access.seconds_in("-5")


def test_how_a_token_stands() -> None:
    now = datetime(2026, 1, 1, tzinfo=UTC)
    past, future = "2025-12-31T00:00:00Z", "2026-02-01T00:00:00Z"
    assert [access._standing(token, now) for token in ({}, {"expires_at": past}, {"expires_at": future})] == [
        "good",
        "expired",
        f"good until {future}",
    ]
