"""Where webhooks may be sent, and what a hostile receiver can do to the sender."""

import contextlib
import functools
import ipaddress
import shutil
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from tests.faults.service_home import until
from tests.service.harness import ServiceHarness
from tests.service.receiver import Receiver, receiving, status
from tests.service.test_webhooks import deliveries, register, send
from trainyard.service.settings import InvalidSettings, Settings
from trainyard.service.ssrf import (
    AddressNotAllowed,
    Network,
    rejection_reason,
    resolve,
    resolve_allowed,
    validation_error,
)
from trainyard.service.webhooks.http_client import (
    MAX_RESPONSE_BYTES,
    MAX_SNIPPET_BYTES,
    DeliveryResult,
    WebhookClient,
)

LOOPBACK: list[Network] = [ipaddress.ip_network("127.0.0.0/8")]
OPENSSL = shutil.which("openssl")

NOT_PUBLIC = [
    "127.0.0.1",
    "127.255.255.254",
    "0.0.0.0",
    "10.0.0.1",
    "172.16.0.1",
    "172.31.255.255",
    "192.168.1.1",
    "169.254.169.254",
    "169.254.170.2",
    "100.64.0.1",
    "100.100.100.200",
    "192.0.0.192",
    "168.63.129.16",
    "198.18.0.1",
    "192.0.2.1",
    "224.0.0.1",
    "240.0.0.1",
    "255.255.255.255",
    "::",
    "::1",
    "fe80::1",
    "fc00::1",
    "fd00:ec2::254",
    "fec0::1",
    "ff02::1",
    "2001:db8::1",
    "::ffff:127.0.0.1",
    "::ffff:10.0.0.1",
    "::ffff:169.254.169.254",
    "::ffff:a9fe:a9fe",
    "2002:7f00:1::",
    "2002:a9fe:a9fe::1",
    "64:ff9b::7f00:1",
    "64:ff9b::a9fe:a9fe",
    "2001:0:4136:e378:8000:63bf:3fff:fdd2",
]
PUBLIC = ["8.8.8.8", "93.184.216.34", "2606:4700::1111", "::ffff:8.8.8.8", "64:ff9b::808:808", "2002:808:808::1"]


@pytest.mark.parametrize("address", NOT_PUBLIC)
def test_what_is_not_public_is_refused(address: str) -> None:
    assert rejection_reason(ipaddress.ip_address(address), []) is not None
    with pytest.raises(AddressNotAllowed):
        resolve_allowed(["8.8.8.8", address], [])


@pytest.mark.parametrize("address", PUBLIC)
def test_what_is_public_is_not(address: str) -> None:
    assert rejection_reason(ipaddress.ip_address(address), []) is None
    assert resolve_allowed([address], []) == [address]


def test_networks_that_are_allowed() -> None:
    allowed: list[Network] = [ipaddress.ip_network("10.1.0.0/16"), ipaddress.ip_network("fd00::/8")]
    for address in ("10.1.2.3", "::ffff:10.1.2.3", "64:ff9b::a01:203", "fd00::1"):
        assert rejection_reason(ipaddress.ip_address(address), allowed) is None
    for address in ("10.2.0.1", "127.0.0.1", "::ffff:10.2.0.1", "169.254.169.254"):
        assert rejection_reason(ipaddress.ip_address(address), allowed) is not None
    with pytest.raises(AddressNotAllowed):
        resolve_allowed([], allowed)


@pytest.mark.parametrize(
    "host",
    ["127.0.0.1", "127.1", "0x7f.1", "2130706433", "0177.0.0.1", "0", "[::1]", "[::ffff:7f00:1]", "localhost",
     "a.localhost", "LOCALHOST.", "169.254.169.254", "[fe80::1%25eth0]", "10.0.0.1:8080"],
)  # fmt: skip
def test_a_url_that_says_so_itself_is_refused_when_it_is_made(rig: ServiceHarness, host: str) -> None:
    for scheme in ("http", "https"):
        assert validation_error(f"{scheme}://{host}/x", []) is not None
    answer = rig.client.post("/webhooks", json={"url": f"http://{host}/x"})
    ours = host in ("127.0.0.1", "127.1", "0x7f.1", "2130706433", "0177.0.0.1", "[::ffff:7f00:1]")
    assert answer.status_code == (201 if ours or "localhost" in host.lower() else 422), "the rig allows 127.0.0.0/8"


@pytest.mark.parametrize(
    "url", ["https://example.com", "http://example.com:8080/a?b=c", "https://8.8.8.8/", "https://[2606:4700::1111]/"]
)
def test_good_urls(url: str) -> None:
    assert validation_error(url, []) is None


def test_the_setting() -> None:
    read = Settings.read({"TRAINYARD_WEBHOOK_NETWORKS": "10.0.0.0/8, fd00::/8"})
    assert read.webhook_networks == (ipaddress.ip_network("10.0.0.0/8"), ipaddress.ip_network("fd00::/8"))
    assert Settings.read({}).webhook_networks == ()
    for wrong in ("10.0.0.0/8,x", "10.0.0.1/8", "on"):
        with pytest.raises(InvalidSettings, match="TRAINYARD_WEBHOOK_NETWORKS"):
            Settings.read({"TRAINYARD_WEBHOOK_NETWORKS": wrong})


def post(client: WebhookClient, url: str) -> DeliveryResult:
    return client.post(url, {"webhook-id": "evt_1"}, b"{}")


def test_a_name_that_is_bound_anew_gains_nothing() -> None:
    """The name leads to 127.0.0.2, which is allowed, when it is looked at, and to 127.0.0.1 ever after."""
    looked_up: list[str] = []

    def rebinding(host: str, port: int) -> Sequence[str]:
        looked_up.append(host)
        return ["127.0.0.2"] if len(looked_up) == 1 else ["127.0.0.1"]

    client = WebhookClient([ipaddress.ip_network("127.0.0.2/32")], rebinding)
    with receiving_beside_another() as (meant, inside):
        url = f"http://evil.example:{meant.port}/hook"
        assert post(client, url).status == 204
        assert looked_up == ["evil.example"], "once for a try: what was looked at is what was connected to"
        assert meant.got[0].headers["host"] == f"evil.example:{meant.port}"
        refused = post(client, url)
        assert refused.status is None
        assert "not public" in str(refused.error)
        assert inside() == 0
        assert len(meant.got) == 1


def test_a_name_with_one_bad_address_among_good_ones_is_refused() -> None:
    client = WebhookClient([ipaddress.ip_network("127.0.0.2/32")], lambda host, port: ["127.0.0.2", "::1"])
    with receiving("127.0.0.2") as meant:
        assert post(client, f"http://two.example:{meant.port}/").status is None
        assert meant.got == []


@contextlib.contextmanager
def receiving_beside_another() -> Iterator[tuple[Receiver, Callable[[], int]]]:
    """A receiver at 127.0.0.2, and how many have come to the same port of 127.0.0.1."""
    while True:
        with receiving("127.0.0.2") as meant:
            try:
                listener = socket.create_server(("127.0.0.1", meant.port))
            except OSError:
                continue  # Another program has this port there.
            with listener:
                listener.setblocking(False)
                yield meant, functools.partial(accept_waiting, listener)
            return


def accept_waiting(listener: socket.socket) -> int:
    """Return 1 if a connection waits, which is closed, else 0."""
    try:
        listener.accept()[0].close()
    except BlockingIOError:
        return 0
    return 1


def test_the_next_address_is_tried_where_one_does_not_answer() -> None:
    with receiving("127.0.0.3") as there:
        client = WebhookClient(LOOPBACK, lambda host, port: ["127.0.0.2", "127.0.0.3"])
        assert post(client, f"http://two.example:{there.port}/").accepted


def test_a_redirect_is_a_no_and_nobody_goes_there(any_rig: ServiceHarness) -> None:
    with receiving() as inside, receiving() as outside:
        outside.answer = status(307, Location=inside.url)
        webhook = register(any_rig, outside.url, events=["job.created"])
        any_rig.submit()
        send(any_rig)
        [waits] = deliveries(any_rig, webhook)
        assert waits["state"] == "pending"
        assert (waits["tries"][0]["status"], waits["tries"][0]["error"]) == (307, "redirects are not followed")
        assert inside.got == []


def test_a_refused_address_says_so_in_the_log(any_rig: ServiceHarness) -> None:
    any_rig.sender._client = WebhookClient([], lambda host, port: ["169.254.169.254"])
    webhook = register(any_rig, "https://metadata.example/", events=["job.created"])
    any_rig.submit()
    send(any_rig)
    [waits] = deliveries(any_rig, webhook)
    assert waits["tries"][0]["status"] is None
    assert "not public" in waits["tries"][0]["error"]


Script = Callable[[socket.socket], None]


@pytest.fixture
def raw() -> Iterator[Callable[[Script], str]]:
    """Servers that do what HTTP does not foresee; each takes connections and runs the script on them."""
    listeners = []
    ending = threading.Event()

    def serve(script: Script) -> str:
        listener = socket.create_server(("127.0.0.1", 0))
        listeners.append(listener)

        def run() -> None:
            while not ending.is_set():
                try:
                    connection = listener.accept()[0]
                except OSError:
                    return
                with connection:
                    connection.settimeout(60)
                    try:
                        connection.recv(65536)
                        script(connection)
                    except OSError:
                        pass

        threading.Thread(target=run, daemon=True).start()
        return f"http://127.0.0.1:{listener.getsockname()[1]}/"

    yield serve
    ending.set()
    for listener in listeners:
        listener.close()


HEAD = b"HTTP/1.1 200 OK\r\n"


def _drip(connection: socket.socket) -> None:
    for letter in HEAD + b"X: " + b"y" * 10_000:
        connection.sendall(bytes([letter]))
        time.sleep(0.05)


def _endless_head(connection: socket.socket) -> None:
    connection.sendall(HEAD)
    while True:
        connection.sendall(b"X-More: " + b"y" * 1000 + b"\r\n")


def _endless_patience(connection: socket.socket) -> None:
    while True:
        connection.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")


def _endless_body(connection: socket.socket) -> None:
    connection.sendall(HEAD + b"Transfer-Encoding: chunked\r\n\r\n")
    while True:
        connection.sendall(b"1000\r\n" + b"z" * 4096 + b"\r\n")


def _dripping_body(connection: socket.socket) -> None:
    connection.sendall(HEAD + b"Content-Length: 1000\r\n\r\n")
    for _ in range(1000):
        connection.sendall(b"z")
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("script", "seen"),
    [
        (_drip, "no answer within 0.5 s"),
        (lambda connection: connection.recv(1), "no answer within 0.5 s"),
        (_endless_head, "it does not speak HTTP"),
        (_endless_patience, "it sends too much before its response"),
        (lambda connection: connection.sendall(b"SSH-2.0-OpenSSH\r\n"), "it does not speak HTTP"),
        (lambda connection: connection.sendall(b"\0" * 100_000), "it does not speak HTTP"),
        (lambda connection: connection.sendall(b"HTTP/1.1 2"), "it does not speak HTTP"),
        (lambda connection: None, "it does not speak HTTP"),
    ],
)
def test_a_receiver_that_misbehaves_costs_a_bounded_time(
    raw: Callable[[Script], str], script: Script, seen: str
) -> None:
    # Its other faults are shown without a deadline, which might come first on a busy host.
    seconds = 0.5 if "0.5 s" in seen else 60.0
    answer = post(WebhookClient(LOOPBACK, seconds=seconds), raw(script))
    assert (answer.status, answer.error) == (None, seen)


@pytest.mark.parametrize("script", [_endless_body, _dripping_body])
def test_of_a_long_answer_the_begin_is_read(raw: Callable[[Script], str], script: Script) -> None:
    """The status has been said: what comes behind it changes nothing."""
    url, client = raw(script), WebhookClient(LOOPBACK, seconds=0.5)
    # On a busy host the deadline may come before the status.
    answer = until(lambda: found if (found := post(client, url)).accepted else None, 60)
    assert answer.snippet is not None
    assert set(answer.snippet) == {"z"}
    assert len(answer.snippet) <= MAX_SNIPPET_BYTES < MAX_RESPONSE_BYTES


def test_nobody_there_and_no_such_name() -> None:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))  # bound, so that no other program listens there meanwhile
        port = holder.getsockname()[1]
        assert post(WebhookClient(LOOPBACK), f"http://127.0.0.1:{port}/").error == "Connection refused"

    def unknown(host: str, port: int) -> Sequence[str]:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    assert post(WebhookClient(LOOPBACK, unknown), "http://nowhere.example/").error == "its name cannot be resolved"
    for impossible in ("http://" + "a" * 64 + ".example/", "https://.example.com/", "https://a..example/"):
        assert post(WebhookClient(LOOPBACK), impossible).error == "its name cannot be resolved"
    assert "127.0.0.1" in resolve("localhost", 80)


def test_the_target_and_the_headers_are_sent_as_the_url_has_them() -> None:
    with receiving() as receiver:
        asked = f"http://127.0.0.1:{receiver.port}/a;b/c;d%20e?x=1;y=2&z"
        assert post(WebhookClient(LOOPBACK), asked).accepted
        assert receiver.got[0].path == "/a;b/c;d%20e?x=1;y=2&z"
        assert receiver.got[0].headers["connection"] == "close"
        assert receiver.got[0].headers["content-length"] == "2"


@pytest.mark.skipif(OPENSSL is None, reason="openssl is not installed")
def test_tls_is_for_the_name_and_the_connection_for_the_checked_address(tmp_path: Path) -> None:
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    subprocess.run(
        [OPENSSL or "", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes",
         "-days", "2",         "-subj", "/CN=hooks.example", "-addext", "subjectAltName=DNS:hooks.example",
         "-keyout", key, "-out", certificate],
        check=True, capture_output=True,
    )  # fmt: skip
    names: list[str] = []
    theirs = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    theirs.load_cert_chain(certificate, key)
    theirs.sni_callback = lambda _, name, __: names.append(name)
    ours = ssl.create_default_context(cafile=str(certificate))
    with receiving(context=theirs) as receiver:
        found = lambda host, port: ["127.0.0.1"]  # noqa: E731
        good = post(WebhookClient(LOOPBACK, found, ours), f"https://hooks.example:{receiver.port}/hook")
        assert good.accepted, good.error
        assert names == ["hooks.example"]
        assert receiver.got[0].headers["host"] == f"hooks.example:{receiver.port}"
        other = post(WebhookClient(LOOPBACK, found, ours), f"https://other.example:{receiver.port}/hook")
        assert "certificate" in str(other.error)
        strangers = post(WebhookClient(LOOPBACK, found), f"https://hooks.example:{receiver.port}/hook")
        assert "certificate" in str(strangers.error)
        assert len(receiver.got) == 1
