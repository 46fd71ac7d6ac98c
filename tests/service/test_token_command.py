"""`trainyard token ...` against the service itself."""

import json
import re
from datetime import UTC, datetime

import pytest

from tests.service.conftest import Command
from tests.service.harness import ServiceHarness
from trainyard.client.cli.commands import tokens
from trainyard.client.exit_codes import UsageError

OPERATOR = "the-operator's-own"


def test_a_token_s_life(command: Command, rig: ServiceHarness) -> None:
    code, out, err = command("token", "create", "ci", "--scope", "submit", "--expires-in", "90d", "--max-jobs", "3")
    assert code == 0
    token = out.strip()
    assert re.fullmatch(r"ty_[a-z2-7]{12}_\S{43}", token), "nothing but the secret, to be piped"
    assert "scope submit, valid until" in err
    assert "not shown again" in err
    assert token not in err
    assert command("list", "--token", token)[0] == 0
    spec = rig.home / "spec.json"
    spec.write_text(json.dumps(rig.spec()))
    assert command("submit", str(spec), "-y", "--json", "--token", token)[0] == 0
    assert command("token", "list", "--token", token)[0] == 4, "not authorised"
    assert command("token", "limit", "ci", "--max-devices", "8")[:2] == (0, "ci jobs 1 devices 1 of 8\n")
    code, out, err = command("token", "rotate", "ci", "--overlap", "1h")
    assert "the previous secret stays valid until" in err
    assert [command("list", "--token", one)[0] for one in (token, out.strip())] == [0, 0]
    code, listed, _ = command("token", "list")
    assert listed.splitlines()[1].split()[:2] == ["ci", "submit"]
    assert token not in listed
    assert command("token", "revoke", "ci", "-y")[0] == 0
    assert command("list", "--token", token)[0] == 4
    assert "revoked" in command("token", "list")[1]
    assert command("token", "rotate", "ci")[0] == 1


def test_as_json_and_who_submitted(command: Command, rig: ServiceHarness) -> None:
    assert json.loads(command("token", "list", "--json")[1]) == {"object": "list", "data": [], "has_more": False}
    assert "create one" in command("token", "list")[2]
    made = json.loads(command("token", "create", "ci", "--json")[1])
    assert (made["scope"], made["expires_at"]) == ("read", None)
    assert json.loads(command("token", "rotate", "ci", "--json")[1])["token"] != made["token"]
    assert json.loads(command("token", "limit", "ci", "--json")[1])["max_jobs"] is None
    assert json.loads(command("token", "revoke", "ci", "-y", "--json")[1]) == {"name": "ci", "revoked": True}
    job_id = rig.submit()
    assert re.search(r"submitted +by local", command("show", job_id)[1])


def test_wrong_usage(command: Command) -> None:
    assert command("token", "create", "a b")[0] == 1
    assert command("token", "create", "ci", "--scope", "root")[0] == 2
    assert command("token", "create", "ci", "--expires-in", "soon")[0] == 2
    code, _, err = command("token", "revoke", "nobody-knows", "-y")
    assert (code, "[token_not_found]" in err) == (1, True)
    assert [tokens.parse_duration(text, "--overlap") for text in ("90", "90s", "5min", "12h", "2D")] == [
        90,
        90,
        300,
        43200,
        172800,
    ]
    with pytest.raises(UsageError, match=r"--overlap takes .* such as 12h, not .-5"):
        tokens.parse_duration("-5", "--overlap")


def test_how_a_token_stands() -> None:
    now = datetime(2026, 1, 1, tzinfo=UTC)
    past, future = "2025-12-31T00:00:00Z", "2026-02-01T00:00:00Z"
    assert [tokens._status(token, now) for token in ({}, {"expires_at": past}, {"expires_at": future})] == [
        "valid",
        "expired",
        f"valid until {future}",
    ]
