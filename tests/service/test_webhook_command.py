"""`trainyard webhook ...` against the service itself and a real receiver."""

import json
from collections.abc import Iterator
from typing import Any

import pytest

from tests.service.conftest import Command
from tests.service.harness import ServiceHarness
from tests.service.receiver import Receiver, receiving, status, verified
from tests.service.test_webhooks import send
from trainyard.client.cli.commands.webhooks import parse_rule
from trainyard.client.exit_codes import UsageError
from trainyard.service.webhooks.notice_client import NoticeClient


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with receiving() as made:
        yield made


def made(command: Command, *arguments: str) -> dict[str, Any]:
    code, out, err = command("webhook", "create", *arguments, "--json")
    assert code == 0, err
    found: dict[str, Any] = json.loads(out)
    return found


def test_a_life(command: Command, rig: ServiceHarness, receiver: Receiver) -> None:
    code, out, err = command("webhook", "create", receiver.url, "--event", "job.created")
    assert code == 0
    secret, webhook_id = out.strip(), err.split()[0]
    assert secret.startswith("whsec_")
    assert secret not in err
    rig.submit()
    send(rig)
    assert verified(secret, receiver.got[0])
    code, out, _ = command("webhook", "list")
    assert webhook_id in out
    assert "all jobs" in out
    assert " ok" in out
    assert secret not in out
    code, out, _ = command("webhook", "deliveries", webhook_id)
    assert "delivered" in out
    assert "204 in " in out
    [delivery] = json.loads(command("webhook", "deliveries", webhook_id, "--json")[1])["data"]
    assert command("webhook", "redeliver", webhook_id, delivery["id"])[0] == 0
    send(rig)
    assert receiver.got[0].id == receiver.got[1].id
    code, out, _ = command("webhook", "rotate", webhook_id)
    assert out.strip() not in ("", secret)
    assert command("webhook", "disable", webhook_id)[2] == f"{webhook_id} is disabled\n"
    assert command("webhook", "enable", webhook_id)[2] == f"{webhook_id} is ok\n"
    code, out, _ = command("webhook", "show", webhook_id)
    assert receiver.url in out
    assert "job.created" in out
    assert command("webhook", "delete", webhook_id, "-y")[0] == 0
    assert "no webhooks" in command("webhook", "list")[2]
    assert command("webhook", "show", webhook_id)[0] == 1


def test_what_it_is_about(command: Command, rig: ServiceHarness) -> None:
    job_id = rig.submit(name="pre-12")
    webhook = made(
        command, "https://example.com/x", "--job", "pre-12", "--label", "team=lm", "--description", "d",
        "--rule", "nonfinite", "--rule", "no_progress=30", "--rule", "plateau=2000", "--rule", "eval_loss_below=2.5",
    )  # fmt: skip
    assert (webhook["job_id"], webhook["labels"], webhook["description"]) == (job_id, {"team": "lm"}, "d")
    assert webhook["rules"] == [
        {"kind": "nonfinite"},
        {"kind": "no_progress", "minutes": 30.0},
        {"kind": "plateau", "steps": 2000, "min_delta": 0.01},
        {"kind": "eval_loss_below", "value": 2.5},
    ]
    assert "plateau" in command("webhook", "show", webhook["id"])[1]


def test_the_test_verb_says_what_came_of_it(
    command: Command, rig: ServiceHarness, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    webhook = made(command, receiver.url)
    assert command("webhook", "test", webhook["id"], "--timeout", "0")[0] == 1
    monkeypatch.setattr("trainyard.client.cli.commands.webhooks.time.sleep", lambda _: send(rig))
    code, out, _ = command("webhook", "test", webhook["id"])
    assert (code, out.split(" in ")[0]) == (0, "delivered: 204")
    receiver.answer = status(401, "who are you")
    code, out, _ = command("webhook", "test", webhook["id"])
    assert (code, out.split(" in ")[0]) == (1, "failed: 401")


@pytest.mark.parametrize("text", ["", "nonfinite=1", "plateau", "plateau=x", "other=3", "no_progress="])
def test_what_is_no_rule(text: str) -> None:
    with pytest.raises(UsageError, match="--rule takes nonfinite, no_progress=MINUTES"):
        parse_rule(text)


def test_wrong_usage_and_what_the_service_refuses(command: Command) -> None:
    assert command("webhook", "create", "https://example.com", "--label", "x")[0] == 2
    code, _, err = command("webhook", "create", "http://10.0.0.1/", "--rule", "plateau=0")
    assert code == 1
    assert "/rules/0/steps" in err
    code, _, err = command("webhook", "create", "http://10.0.0.1/")
    assert "TRAINYARD_WEBHOOK_NETWORKS" in err


class Unchecked(NoticeClient):
    """Accepts every URL, without a process."""

    def validation_error(self, url: str) -> str | None:
        return None


def test_the_url_of_a_chat_may_come_from_stdin_and_is_not_shown(command: Command, rig: ServiceHarness) -> None:
    rig.sender.notices = Unchecked()
    code, out, err = command("webhook", "create", "-", stdin="feishu://s3cr3t-key\n")
    assert (code, out.strip()) == (0, err.split()[0])
    assert "sends a short text to feishu://***" in err
    assert "feishu://***" in command("webhook", "list")[1]
    assert "feishu://***" in command("webhook", "show", out.strip())[1]
    assert "s3cr3t" not in out + err
