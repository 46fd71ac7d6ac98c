"""Notices: what chats and mailboxes get, each in its own format, and what is shown and reached by no notice."""

import asyncio
import base64
import email
import email.policy
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Awaitable, Iterator
from email.message import EmailMessage
from pathlib import Path
from typing import Any

import pytest
from aiosmtpd.controller import Controller
from aiosmtpd.smtp import SMTP, AuthResult, Envelope, Session
from sqlalchemy import select

from tests.service.conftest import MakeHarness
from tests.service.harness import ServiceHarness
from tests.service.receiver import DEADLINE, Receiver, receiving, status
from tests.service.test_auth import bearer, created
from tests.service.test_http_client import LOOPBACK
from tests.service.test_webhooks import deliveries, register, send
from trainyard.contract.status import Reason
from trainyard.service.db.models import WebhookRow
from trainyard.service.notice_urls import is_notice_url, masked_url
from trainyard.service.settings import Settings
from trainyard.service.webhooks.http_client import DeliveryResult
from trainyard.service.webhooks.notice_client import NoticeClient, NoticeProcess
from trainyard.service.webhooks.notices import Notice, notice
from trainyard.service.webhooks.retry_policy import MAX_NOTICES, MAX_SLOW_NOTICES, NextDelivery, pick

KEY = "s3cr3tkey0123456789abcdefghij"
FAILED = Notice(
    "pre-12 failed", "Line 7 is no JSON. Fix it.\nReason: data_invalid.\nhttp://h:8000/jobs/job_1", "failure"
)


class Listening(Controller):
    """Serves on a socket that listens already: between the choice of a free port and its use, others may take it."""

    def __init__(self, handler: Any, listener: socket.socket, **options: Any) -> None:
        super().__init__(handler, *listener.getsockname(), **options)
        self._listener = listener

    def _create_server(self) -> Awaitable[asyncio.AbstractServer]:
        return self.loop.create_server(self._factory_invoker, sock=self._listener)


class Mailbox:
    """An SMTP server that keeps what it gets."""

    def __init__(self) -> None:
        self.messages: list[EmailMessage] = []
        self.logins: list[tuple[bytes, bytes]] = []
        listener = socket.create_server(("127.0.0.1", 0))
        self.port = listener.getsockname()[1]
        self._controller = Listening(
            self, listener, authenticator=self._login, auth_require_tls=False, ready_timeout=DEADLINE
        )

    def __enter__(self) -> "Mailbox":
        self._controller.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._controller.stop()

    async def handle_DATA(  # noqa: N802 - the library's name
        self, server: SMTP, session: Session, envelope: Envelope
    ) -> str:
        assert isinstance(envelope.content, bytes)
        parsed = email.message_from_bytes(envelope.content, policy=email.policy.default)
        assert isinstance(parsed, EmailMessage)
        self.messages.append(parsed)
        return "250 kept"

    def _login(self, server: SMTP, session: Session, envelope: Envelope, mechanism: str, data: Any) -> AuthResult:
        self.logins.append((data.login, data.password))
        return AuthResult(success=True)


@pytest.fixture(scope="module")
def chats() -> Iterator[Receiver]:
    with receiving() as made:
        yield made


@pytest.fixture(scope="module")
def process(chats: Receiver) -> Iterator[NoticeProcess]:
    """One process for the module: Apprise takes a second to load."""
    program = (
        sys.executable,
        "-P",
        str(Path(__file__).with_name("notice_program.py")),
        chats.url.removesuffix("/hook"),
    )
    process = NoticeProcess(program)
    yield process
    process.close()


@pytest.fixture
def shared(process: NoticeProcess) -> NoticeClient:
    return NoticeClient(LOOPBACK, "http://h:8000", process, seconds=60.0)


@pytest.fixture
def guarded(process: NoticeProcess) -> NoticeClient:
    """Of a service that allows no private network."""
    return NoticeClient((), None, process)


@pytest.fixture
def receiver(chats: Receiver) -> Receiver:
    chats.got.clear()
    chats.answer = status(200)
    return chats


@pytest.fixture
def rig_with_notices(rig: ServiceHarness, shared: NoticeClient) -> Iterator[ServiceHarness]:
    own, rig.sender.notices = rig.sender.notices, shared
    yield rig
    rig.sender.notices = own


def sent(client: NoticeClient, url: str) -> DeliveryResult:
    assert client.validation_error(url) is None, url
    return client.send(url, FAILED)


def payload(kind: str = "job.failed", **job: Any) -> dict[str, Any]:
    progress = {"step": 13201, "steps": 40000, "loss": 2.3101}
    shown = {"id": "job_1", "name": "pre-12", "reason": None, "message": None, "error": None, "progress": progress}
    return {"type": kind, "data": {"job": {**shown, **job}, "event": {"message": "out of GPU memory on rank 2"}}}


# The text


def test_the_text_is_the_sentence_the_reason_and_the_link() -> None:
    card = {"hint": "Halve batch_size."}
    failed = notice(payload(reason="out_of_memory", error=card), "https://train.example.com")
    assert failed.title == "pre-12 failed"
    assert failed.level == "failure"
    assert failed.body.split("\n") == [
        "Out of GPU memory on rank 2. Halve batch_size.",
        "Step 13,201 of 40,000, loss 2.310.",
        "Reason: out_of_memory.",
        "https://train.example.com/jobs/job_1",
    ]
    assert notice(payload("job.running"), None).title == "pre-12 is running"
    assert notice(payload("job.running"), None).body.endswith("\nJob: job_1")
    assert notice(payload("rule.no_progress"), None).level == "warning"
    assert notice(payload("rule.no_progress"), None).title == "pre-12: alert no_progress"
    test = {"type": "webhook.test", "data": {"webhook_id": "wh_1", "event": None, "job": None}}
    assert notice(test, "http://h").body == "Notices from Trainyard arrive here.\nhttp://h"


def test_a_name_mentions_no_one_and_stays_on_one_line() -> None:
    text = notice(payload(name="@everyone <!channel>\r\nBcc: a@b.c\x1b[0m" + "x" * 1000), None)
    assert "@everyone" not in text.title
    assert "<!channel" not in text.title
    assert "\n" not in text.title + "".join(notice(payload(name="a\u2028b"), None).title)
    assert text.title.isprintable() or "\u200b" in text.title
    assert len(text.title) < 700


def test_links_begin_with_the_public_url() -> None:
    assert Settings.read({"TRAINYARD_PUBLIC_URL": "https://t.example.com/"}).link_url == "https://t.example.com"
    assert Settings.read({"TRAINYARD_PORT": "8123"}).link_url == "http://127.0.0.1:8123"
    assert Settings.read({"TRAINYARD_PORT": "0"}).link_url is None


# Each receiver's own format


def test_json(shared: NoticeClient, receiver: Receiver) -> None:
    result = sent(shared, f"json://user:{KEY}@127.0.0.1:{receiver.port}/path?+x-team=lm")
    assert (result.accepted, result.status, result.error) == (True, 200, None)
    [got] = receiver.got
    assert (got.path, got.headers["x-team"]) == ("/path", "lm")
    assert {name: got.payload[name] for name in ("title", "message", "type")} == {
        "title": FAILED.title,
        "message": FAILED.body,
        "type": "failure",
    }


def test_ntfy(shared: NoticeClient, receiver: Receiver) -> None:
    assert sent(shared, f"ntfy://127.0.0.1:{receiver.port}/training").accepted
    [got] = receiver.got
    assert (got.payload["topic"], got.payload["title"]) == ("training", FAILED.title)
    assert got.payload["message"] == FAILED.body


def test_slack(shared: NoticeClient, receiver: Receiver) -> None:
    receiver.answer = status(200, "ok")
    assert sent(shared, f"slack://T1JJ3T3L2/A1BRTD4JD/{KEY[:24]}/#training").accepted
    [got] = receiver.got
    assert got.path == f"/slack/T1JJ3T3L2/A1BRTD4JD/{KEY[:24]}"
    shown = json.dumps(got.payload, ensure_ascii=False)
    assert FAILED.title in shown
    assert "Line 7 is no JSON" in shown
    assert "job_1" in shown


def test_discord(shared: NoticeClient, receiver: Receiver) -> None:
    receiver.answer = status(204)
    assert sent(shared, f"discord://123456789012345678/{KEY}").accepted
    [got] = receiver.got
    assert got.path.startswith(f"/discord/123456789012345678/{KEY}")
    assert "Line 7 is no JSON" in json.dumps(got.payload)


def test_feishu_and_dingtalk_answer_200_to_what_they_reject(shared: NoticeClient, receiver: Receiver) -> None:
    receiver.answer = status(200, '{"code": 0, "msg": "success"}')
    assert sent(shared, f"feishu://{KEY}").accepted
    [got] = receiver.got
    assert got.path == f"/feishu/{KEY}"
    assert got.payload["msg_type"] == "text"
    assert got.payload["content"]["text"].split() == f"{FAILED.title} {FAILED.body}".split()
    receiver.answer = status(200, '{"code": 19024, "msg": "Key Words Not Found"}')
    rejected = shared.send(f"feishu://{KEY}", FAILED)
    assert (rejected.accepted, rejected.status) == (False, 200)
    assert "Key Words Not Found" in (rejected.error or "")
    receiver.answer = status(200, '{"errcode": 0, "errmsg": "ok"}')
    assert sent(shared, f"dingtalk://{KEY}").accepted
    assert receiver.got[-1].path.startswith(f"/dingtalk?access_token={KEY}")
    assert "Line 7 is no JSON" in json.dumps(receiver.got[-1].payload)
    assert sent(shared, f"wecombot://{KEY}").accepted
    assert receiver.got[-1].path == f"/wecombot?key={KEY}"
    assert "Line 7 is no JSON" in receiver.got[-1].payload["text"]["content"]


def test_mail(shared: NoticeClient) -> None:
    with Mailbox() as mailbox:
        url = f"mailto://robot:{KEY}@127.0.0.1:{mailbox.port}?from=t@example.com&to=a@example.com,b@example.com"
        result = sent(shared, url)
        assert (result.accepted, result.status, result.error) == (True, None, None)
        [message, *_] = mailbox.messages
        assert message["subject"] == FAILED.title
        assert message.get_content_type() == "text/plain"
        assert message.get_content().split() == FAILED.body.split()
        assert {str(one["to"]) for one in mailbox.messages} == {"a@example.com", "b@example.com"}
        assert set(mailbox.logins) == {(b"robot", KEY.encode())}


# What never happens


@pytest.mark.parametrize(
    ("url", "error"),
    [
        ("slak://a/b/c", "did you mean slack://?"),
        ("zzzzzzzzzz://a/b/c", "https://appriseit.com/services/ lists them"),
        ("slack://a", "is no complete slack:// URL"),
        ("syslog://", "neither by HTTP nor by mail"),
        ("json://127.0.0.1/x", "not public"),
        ("json://2130706433/x", "not public"),
        ("jsons://[::ffff:10.0.0.1]/x", "not public"),
        ("ntfy://localhost/topic", "not public"),
        ("mailto://robot:pass@10.0.0.1?from=t@example.com&to=a@example.com", None),
    ],
)
def test_a_url_is_checked_before_it_is_stored(guarded: NoticeClient, url: str, error: str | None) -> None:
    found = guarded.validation_error(url)
    assert (found is None) if error is None else (error in (found or "")), found


def test_a_name_that_leads_to_a_private_address_is_not_connected_to(guarded: NoticeClient, receiver: Receiver) -> None:
    """It is found public, or not found at all, when the webhook is made, and private when it is sent."""
    url = f"json://rebinding.test:{receiver.port}/x"
    assert guarded.validation_error(url) is None
    result = guarded.send(url, FAILED)
    assert not result.accepted
    assert "not public" in (result.error or "")
    assert receiver.got == []


@pytest.mark.parametrize("redirect", ["", "?redirect=yes"])
def test_redirects_are_not_followed(shared: NoticeClient, receiver: Receiver, redirect: str) -> None:
    receiver.answer = status(307, Location=f"http://127.0.0.1:{receiver.port}/elsewhere")
    result = sent(shared, f"json://127.0.0.1:{receiver.port}/x{redirect}")
    assert (result.accepted, result.status, result.error) == (False, 307, "redirects are not followed")
    assert len(receiver.got) == 1


def test_no_part_of_the_url_is_in_the_result(shared: NoticeClient, receiver: Receiver) -> None:
    receiver.answer = status(
        429,
        f"user robot {KEY} Basic {base64.b64encode(f'robot:{KEY}'.encode()).decode()} at 127.0.0.1",
        Retry_After="90",
    )
    result = sent(shared, f"json://robot:{KEY}@127.0.0.1:{receiver.port}/hidden-topic")
    assert (result.status, result.retry_after) == (429, 90)
    assert result.snippet == "user *** *** Basic *** at ***"
    receiver.answer = status(200, json.dumps({"code": 1, "msg": f"no robot {KEY}"}))
    assert KEY not in str(shared.send(f"feishu://{KEY}", FAILED))


def test_a_receiver_that_does_not_answer_ends_at_the_deadline(process: NoticeProcess) -> None:
    with receiving() as silent:
        silent.hold.clear()
        client = NoticeClient(LOOPBACK, None, process, seconds=0.5)
        result = client.send(f"json://127.0.0.1:{silent.port}/x", FAILED)
        assert (result.accepted, result.status, result.error) == (False, None, "no answer within 0.5 s")
        assert result.seconds >= 0.5
        silent.hold.set()
        assert NoticeClient(LOOPBACK, None, process).send(f"json://127.0.0.1:{silent.port}/x", FAILED).accepted


def test_a_process_that_was_killed_is_started_again(
    process: NoticeProcess, shared: NoticeClient, receiver: Receiver
) -> None:
    url = f"json://127.0.0.1:{receiver.port}/x"
    assert sent(shared, url).accepted
    killed = process.pid
    assert killed is not None
    os.kill(killed, signal.SIGKILL)
    while process.pid == killed:
        time.sleep(0.01)
    assert sent(shared, url).accepted


def test_the_process_has_no_secret_of_the_service(
    process: NoticeProcess, shared: NoticeClient, receiver: Receiver
) -> None:
    assert sent(shared, f"json://127.0.0.1:{receiver.port}/x").accepted
    environment = Path(f"/proc/{process.pid}/environ").read_bytes()
    names = {line.split(b"=")[0] for line in environment.split(b"\0") if line}
    assert names <= {b"LANG", b"LC_ALL", b"PATH", b"PYTHONPATH", b"REQUESTS_CA_BUNDLE", b"TZ"}


def test_a_plugin_opens_no_file_and_starts_no_program(tmp_path: Path) -> None:
    """The audit hook in a process of its own, because it cannot be removed."""
    secret = tmp_path / "secret"
    secret.write_text("x")
    code = f"""
import socket, subprocess, sys
from trainyard.service.webhooks.notice_process import Guard
guard = Guard()
sys.addaudithook(guard)
def refused(action):
    try: action()
    except PermissionError: return True
    return False
found = [
    refused(lambda: open({str(secret)!r})),
    refused(lambda: open({str(tmp_path / "new")!r}, "w")),
    refused(lambda: subprocess.run(["true"])),
    refused(lambda: socket.socket().connect(("93.184.215.14", 9))),
]
guard.allow(())
found += [
    refused(lambda: socket.socket().connect(("127.0.0.1", 9))),
    refused(lambda: socket.socket(type=socket.SOCK_DGRAM).sendto(b"x", ("10.0.0.1", 9))),
    refused(lambda: socket.socket(socket.AF_UNIX).connect("/run/x")),
]
guard.allow(None)
found.append(not refused(lambda: socket.socket().connect_ex(("127.0.0.1", 9))))
print(found)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == str([True] * 8), done.stderr


# By the API


def test_a_notice_goes_the_way_of_every_webhook(rig_with_notices: ServiceHarness, receiver: Receiver) -> None:
    """Queued with its event, retried, logged, and its URL shown nowhere."""
    rig = rig_with_notices
    url = f"json://robot:{KEY}@127.0.0.1:{receiver.port}/{KEY}"
    webhook = register(rig, url, events=["job.failed"])
    assert (webhook["url"], webhook["secret"]) == ("json://***", None)
    job_id, attempt = rig.running(name="pre-12")
    attempt.metric(1)
    rig.exit(attempt, "crashed", Reason.DATA_INVALID, step=1, message="line 7 is no JSON")
    receiver.answer = status(500, f"no {KEY}")
    send(rig)
    [waits] = deliveries(rig, webhook)
    assert (waits["state"], waits["tries"][0]["status"], waits["tries"][0]["response"]) == ("pending", 500, "no ***")
    rig.clock.forward(60)
    receiver.answer = status(200)
    send(rig)
    [done] = deliveries(rig, webhook)
    assert (done["state"], [one["status"] for one in done["tries"]]) == ("delivered", [500, 200])
    got = receiver.got[-1].payload
    assert got["title"] == "pre-12 failed"
    assert got["message"].startswith("Line 7 is no JSON.")
    assert "Reason: data_invalid." in got["message"]
    assert got["message"].endswith(f"http://h:8000/jobs/{job_id}")
    path = f"/webhooks/{webhook['id']}"
    for place in ("/webhooks", path, f"{path}/deliveries", f"{path}/deliveries/{done['id']}"):
        assert KEY not in rig.client.get(place).text, place
    assert KEY not in rig.client.post(f"{path}/rotate").text


def test_a_masked_url_changes_nothing(rig_with_notices: ServiceHarness, receiver: Receiver) -> None:
    rig = rig_with_notices
    url = f"json://127.0.0.1:{receiver.port}/{KEY}"
    path = f"/webhooks/{register(rig, url)['id']}"
    assert rig.client.patch(path, json={"url": "json://***", "description": "d"}).json()["description"] == "d"
    with rig.database.read() as session:
        assert session.scalars(select(WebhookRow.url)).one() == url
    for masked in ("slack://***", f"slack://{KEY}"):
        answer = rig.client.patch(path, json={"url": masked})
        assert answer.status_code == 422
        assert [found["pointer"] for found in answer.json()["errors"]] == ["/url"]
        assert KEY not in answer.text
    assert register(rig, "json://***", expect=422)["code"] == "invalid_request"
    changed = rig.client.patch(path, json={"url": f"feishu://{KEY}"})
    assert changed.json()["url"] == "feishu://***"
    back = rig.client.patch(path, json={"url": "https://example.com/"})
    assert back.json()["url"] == "https://example.com/"
    assert rig.client.post(f"{path}/rotate").json()["secret"].startswith("whsec_")


def test_a_notice_url_needs_admin(make_rig: MakeHarness, any_url: str, shared: NoticeClient) -> None:
    rig = make_rig(any_url)
    own, rig.sender.notices = rig.sender.notices, shared
    operator = created(rig, "ops", scope="operate")
    answer = rig.client.post("/webhooks", json={"url": f"feishu://{KEY}"}, headers=bearer(operator))
    assert (answer.status_code, answer.json()["code"]) == (403, "forbidden")
    assert "needs the scope admin" in answer.json()["detail"]
    assert KEY not in answer.text
    webhook = register(rig, f"feishu://{KEY}")
    path = f"/webhooks/{webhook['id']}"
    answer = rig.client.patch(path, json={"url": f"slack://{KEY}"}, headers=bearer(operator))
    assert answer.status_code == 403
    assert rig.client.patch(path, json={"enabled": False}, headers=bearer(operator)).status_code == 200
    assert (
        rig.client.post("/webhooks", json={"url": "https://example.com"}, headers=bearer(operator)).status_code == 201
    )
    rig.sender.notices = own


def test_only_the_kind_of_a_notice_url_is_shown() -> None:
    assert masked_url("SLACK://a/b") == "slack://***"
    assert masked_url("https://example.com/x") == "https://example.com/x"
    assert not is_notice_url("HTTPS://example.com")
    assert not is_notice_url("no url")


def test_notices_leave_places_for_webhooks_and_slow_ones_for_quick_ones() -> None:
    heads = [NextDelivery(n, f"notice-{n}", 0, is_notice=True) for n in range(50)]
    hook = NextDelivery(99, "hook", 0)
    notices = {head.webhook_id for head in heads}
    sent = pick([*heads, hook], {}, frozenset(), notices)
    assert len(sent) == MAX_NOTICES + 1
    assert sent[-1] == hook
    slow = {head.webhook_id for head in heads[:40]}
    picked = pick(heads, {}, slow, notices)
    assert sum(one.webhook_id in slow for one in picked) == MAX_SLOW_NOTICES
    assert len(picked) == MAX_NOTICES
    assert pick(heads, {one.number: one.webhook_id for one in picked}, slow, notices) == []
