"""Limits on requests, their timeouts, and the metrics of the process."""

import contextlib
import functools
import gzip
import http.client
import itertools
import json
import re
import select
import socket
import time
from collections.abc import Callable
from datetime import timedelta

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.service.harness import ServiceHarness
from tests.service.live_server import DEADLINE, served
from trainyard.contract.status import Reason
from trainyard.service import bodies, server
from trainyard.service.api import middleware
from trainyard.service.clock import utc_now
from trainyard.service.db.models import IdempotencyRow
from trainyard.service.jobs import repository
from trainyard.service.observability.prometheus import ServiceMetrics
from trainyard.service.settings import Settings


def raw(
    address: tuple[str, int],
    *pieces: bytes,
    drip: bytes = b"",
    pause: float = 0.0,
    then: Callable[[], None] = lambda: None,
) -> bytes:
    """Send these bytes, and return what the service answers until it ends the connection.

    ``drip``: is sent again and again until then. ``then``: called once the first piece was sent.
    """
    answer, deadline = b"", time.monotonic() + DEADLINE
    with socket.create_connection(address, timeout=DEADLINE) as connection:
        # Sending fails if the connection was reset. What was answered before that can still be read.
        with contextlib.suppress(ConnectionError):
            for number, piece in enumerate(itertools.chain(pieces, itertools.repeat(drip) if drip else ())):
                assert time.monotonic() < deadline, "the service does not end the connection"
                connection.sendall(piece)
                if number == 0:
                    then()
                if select.select([connection], [], [], pause)[0]:
                    answer += connection.recv(65536)
        with contextlib.suppress(ConnectionError):
            while data := connection.recv(65536):
                answer += data
    return answer


def code(answer: bytes) -> str:
    found: str = json.loads(answer.partition(b"\r\n\r\n")[2])["code"]
    return found


HEAD = b"POST /jobs HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"


def test_a_body_that_drips_is_given_up(rig: ServiceHarness, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(middleware, "MAX_BODY_SECONDS", 0.3)
    with served(rig) as address:
        answer = raw(address, HEAD + b"Content-Length: 1000\r\n\r\n", drip=b"x", pause=0.05)
        assert b" 408 " in answer.splitlines()[0]
        assert code(answer) == "request_timeout"
        chunked = raw(address, HEAD + b"Transfer-Encoding: chunked\r\n\r\n", drip=b"1\r\nx\r\n", pause=0.05)
        assert code(chunked) == "request_timeout"


def test_a_head_that_drips_is_cut_off(rig: ServiceHarness, monkeypatch: pytest.MonkeyPatch) -> None:
    # Set once what must arrive in time has been sent: on a busy host that may take longer than 0.3 s.
    hurry = functools.partial(monkeypatch.setattr, server, "MAX_REQUEST_SECONDS", 0.3)
    with served(rig) as address:
        whole = b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\n"
        assert raw(address, whole + b"Connection: close\r\n\r\n").startswith(b"HTTP/1.1 200")
        second = raw(address, whole + b"\r\n", b"GET /he", drip=b"a", pause=0.05, then=hurry)
        assert raw(address) == b"", "one that says nothing"
        assert raw(address, b"GET /health HT", drip=b"T", pause=0.05) == b""
        assert second.count(b"HTTP/1.1") == 1, "the next head on the same connection has its deadline too"


@pytest.mark.parametrize("length", [b"Content-Length: 100000", b"Transfer-Encoding: chunked"])
def test_a_body_that_was_refused_cannot_drip_on(
    rig: ServiceHarness, monkeypatch: pytest.MonkeyPatch, length: bytes
) -> None:
    """Anybody can be refused: who goes on sending after the answer must not keep the connection."""
    hurry = functools.partial(monkeypatch.setattr, server, "MAX_REQUEST_SECONDS", 0.3)
    drop = b"1\r\nx\r\n" if b"chunked" in length else b"x"
    with served(rig) as address:
        foreign = b"POST /jobs HTTP/1.1\r\nHost: elsewhere\r\n" + length + b"\r\n\r\n"
        answer = raw(address, foreign, drip=drop, pause=0.05, then=hurry)
        assert b" 403 " in answer.splitlines()[0]
        monkeypatch.undo()
        # A small one that comes whole leaves the connection as it was.
        whole = b"POST /jobs HTTP/1.1\r\nHost: elsewhere\r\nContent-Length: 1\r\n\r\nx"
        again = b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n"
        assert raw(address, whole, again, pause=0.2).count(b"HTTP/1.1 ") == 2


def test_a_chunked_body_over_the_limit_is_cut_off_on_the_wire(
    rig: ServiceHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    hurry = functools.partial(monkeypatch.setattr, server, "MAX_REQUEST_SECONDS", 0.3)
    chunk = b"10000\r\n" + b"x" * 65536 + b"\r\n"
    with served(rig) as address:
        answer = raw(address, HEAD + b"Transfer-Encoding: chunked\r\n\r\n", *[chunk] * 17, pause=0.01, then=hurry)
        assert b" 413 " in answer.splitlines()[0]
        assert code(answer) == "body_too_large"


def test_a_body_may_be_so_deep_and_no_deeper(rig: ServiceHarness) -> None:
    def code_of(body: str) -> tuple[int, str, str]:
        answer = rig.client.post("/jobs", content=body, headers={"Content-Type": "application/json"})
        return answer.status_code, answer.json()["code"], answer.json()["detail"]

    for open_, shut in (("[", "]"), ('{"a":', "}")):
        for levels in (bodies.MAX_DEPTH + 1, 500, 2000, 50_000):
            found = code_of(open_ * levels + "1" + shut * levels)
            assert found == (422, "invalid_json", "The body is nested more than 64 levels deep."), levels
        assert code_of(open_ * bodies.MAX_DEPTH + "1" + shut * bodies.MAX_DEPTH)[1] == "invalid_spec"
    wide = json.dumps({"data": {"data_path": str(rig.corpus)}, "labels": {f"k{n}": "v" for n in range(64)}})
    assert rig.client.post("/jobs", content=wide, headers={"Content-Type": "application/json"}).status_code == 201


def test_a_stream_is_not_under_the_deadline_of_requests(rig: ServiceHarness, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "MAX_REQUEST_SECONDS", 1.0)
    monkeypatch.setattr(middleware, "MAX_BODY_SECONDS", 1.0)
    from tests.service.live_server import Reader

    job_id, attempt = rig.running()
    with served(rig) as address:
        reader = Reader(address, f"/jobs/{job_id}/metrics/stream")
        time.sleep(1.2)  # longer than both: the test is that nothing happens
        attempt.metric(1)
        rig.ship(attempt)
        assert reader.take(1)[0]["data"]["step"] == 1
        reader.close()


def test_addresses_and_headers_over_the_limit(rig: ServiceHarness) -> None:
    long = rig.client.get("/jobs", params={"name": "x" * 9000})
    assert (long.status_code, long.json()["code"]) == (414, "url_too_long")
    assert rig.client.get("/" + "x" * 9000).status_code == 414
    large = rig.client.get("/jobs", headers={"X-Large": "y" * 40_000})
    assert (large.status_code, large.json()["code"]) == (431, "headers_too_large")
    with served(rig) as address:
        huge = raw(address, b"GET /jobs HTTP/1.1\r\nHost: 127.0.0.1\r\nX: " + b"y" * (80 << 10) + b"\r\n\r\n")
        assert huge.split()[1] in (b"400", b"431")


# Clients that leave, and old ones


def test_a_client_that_leaves_in_the_middle_of_its_body_is_no_error_of_the_service(
    rig: ServiceHarness, caplog: pytest.LogCaptureFixture
) -> None:
    job_id = rig.submit()
    with served(rig) as address:
        for path in ("/jobs", f"/jobs/{job_id}/resume", "/webhooks"):
            with socket.create_connection(address, timeout=DEADLINE) as connection:
                head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
                connection.sendall(f"{head}Content-Length: 100\r\n\r\n{{".encode())
        deadline = time.monotonic() + DEADLINE
        while rig.client.get("/metrics").text.count('_count{method="POST",route="') < 4:
            assert time.monotonic() < deadline
            time.sleep(0.02)
    statuses = re.findall(r'_count\{method="POST",route="[^"]+",status="(\d+)"\}', rig.client.get("/metrics").text)
    assert sorted(statuses) == ["201", "499", "499", "499"]
    assert [record for record in caplog.records if record.exc_info] == []


def test_http_1_0_without_host(rig: ServiceHarness) -> None:
    """Health checks of load balancers send it. A browser always sends Host, for which it is checked."""
    with served(rig) as address:
        assert raw(address, b"GET /health HTTP/1.0\r\n\r\n").split()[1] == b"200"
        assert raw(address, b"GET /jobs HTTP/1.0\r\n\r\n").split()[1] == b"200"
        assert raw(address, b"GET /health HTTP/1.0\r\nHost: evil.example\r\n\r\n").split()[1] == b"403"
        assert raw(address, b"GET /health HTTP/1.0\r\nHost:\r\n\r\n").split()[1] == b"403"
        assert raw(address, b"GET /health HTTP/1.1\r\n\r\n").split()[1] == b"400"


@pytest.mark.parametrize("encoding", ["gzip", "br", None])
def test_a_compressed_body_is_named_as_such(rig: ServiceHarness, encoding: str | None) -> None:
    headers = {"Content-Type": "application/json", **({"Content-Encoding": encoding} if encoding else {})}
    for path in ("/jobs", "/jobs/plan", "/webhooks"):
        answer = rig.client.post(path, content=gzip.compress(json.dumps(rig.spec()).encode()), headers=headers)
        assert (answer.status_code, answer.json()["code"]) == (415, "unsupported_content_encoding"), path
    answer = rig.client.post("/jobs", json=rig.spec(), headers={"Content-Encoding": "identity"})
    assert answer.status_code == 201


# Idempotency keys


def test_a_key_is_forgotten_after_its_days(any_rig: ServiceHarness) -> None:
    def submit(key: str, name: str) -> tuple[int, str]:
        body = any_rig.spec(name=name)
        answer = any_rig.client.post("/jobs", json=body, headers={"Idempotency-Key": key})
        return answer.status_code, answer.json().get("id")

    first = submit("a", "one")
    assert submit("a", "one") == (200, first[1])
    assert submit("a", "two")[0] == 422
    with any_rig.database.write() as session:
        known = session.get(IdempotencyRow, ("a", "local"))
        assert known is not None
        known.created_at = utc_now() - timedelta(days=8)
    again = submit("a", "two")
    assert again[0] == 201
    assert again[1] != first[1]
    assert submit("a", "two") == (200, again[1])
    with any_rig.database.write() as session:
        repository.delete_old_keys(session, utc_now() + timedelta(seconds=5))
    assert submit("a", "three")[0] == 201
    assert len(any_rig.get("/jobs")["data"]) == 3


def test_the_setting() -> None:
    assert Settings.read({}).idempotency_days == 7
    assert Settings.read({"TRAINYARD_IDEMPOTENCY_DAYS": "30"}).idempotency_days == 30


# Prometheus

LINE = re.compile(r'[a-z_]+(\{[a-z]+="[^"\n]*"(,[a-z]+="[^"\n]*")*\})? [0-9.e+-]+')


def test_the_text_is_complete_and_well_formed(any_rig: ServiceHarness) -> None:
    rig = any_rig
    job_id, attempt = rig.running()
    attempt.metric(1, tokens=1234)
    rig.ship(attempt)
    _, failed = rig.running()
    rig.exit(failed, "crashed", Reason.HUNG, step=0)
    rig.submit(resources={"nproc_per_node": 2})
    rig.get(f"/jobs/{job_id}")
    rig.client.request("BREW", "/nowhere")
    text = rig.client.get("/metrics")
    assert text.headers["content-type"].startswith("text/plain; version=0.0.4")
    lines = text.text.splitlines()
    samples = [line for line in lines if not line.startswith("#")]
    assert [line for line in samples if not LINE.fullmatch(line)] == []
    described = {line.split()[2] for line in lines if line.startswith("# HELP")}
    typed = {line.split()[2]: line.split()[3] for line in lines if line.startswith("# TYPE")}
    assert described == set(typed)
    for line in samples:
        name = re.split(r"[{ ]", line)[0]
        assert name in typed or re.sub(r"_(bucket|sum|count)$", "", name) in typed, line
    assert all(name.endswith("_total") for name, kind in typed.items() if kind == "counter")
    for line in (
        'trainyard_jobs{status="queued"} 1',
        "trainyard_queue_length 1",
        "trainyard_devices 2",
        "trainyard_devices_leased 1",
        "trainyard_attempts_live 1",
        'trainyard_attempts_ended{outcome="crashed"} 1',
        f'trainyard_job_tokens_total{{job="{job_id}"}} 1234',
        "trainyard_streams 0",
        'trainyard_request_seconds_count{method="GET",route="/jobs/{job_id}",status="200"} ',
        'trainyard_request_seconds_count{method="other",route="none",status="404"} 1',
        'trainyard_ingest_lag_seconds_bucket{le="+Inf"} ',
        "trainyard_report_age_seconds ",
        "trainyard_queue_oldest_seconds ",
    ):
        assert [found for found in samples if found.startswith(line)], line
    assert "/stream" not in text.text
    assert "_created" not in text.text


def test_a_histogram_counts_up() -> None:
    telemetry = ServiceMetrics()
    for value in (0.005, 0.01, 0.02, 90.0):
        telemetry.requests.labels("GET", "/jobs", "200").observe(value)
    (found,) = [metric for metric in telemetry.collect() if metric.name == "trainyard_request_seconds"]
    assert (found.documentation, found.type) == (
        "Duration of requests, without streams and downloads.",
        "histogram",
    )
    labels = {"method": "GET", "route": "/jobs", "status": "200"}
    assert all(labels.items() <= sample.labels.items() for sample in found.samples)
    buckets = [(s.labels["le"], s.value) for s in found.samples if s.name == "trainyard_request_seconds_bucket"]
    assert buckets[:4] == [("0.005", 1), ("0.01", 2), ("0.025", 3), ("0.05", 3)]
    assert buckets[-2:] == [("10.0", 3), ("+Inf", 4)]
    rest = {s.name: s.value for s in found.samples if "le" not in s.labels}
    assert rest == {"trainyard_request_seconds_sum": pytest.approx(90.035), "trainyard_request_seconds_count": 4}


def test_each_service_counts_its_own_work() -> None:
    first, second = ServiceMetrics(), ServiceMetrics()
    first.rows_removed("metrics", 3)
    assert [s.value for metric in first.collect() for s in metric.samples if s.labels == {"what": "metrics"}] == [3]
    assert [s for metric in second.collect() for s in metric.samples if s.labels == {"what": "metrics"}] == []


def test_a_parser_of_prometheus_takes_it(rig: ServiceHarness) -> None:
    job_id, attempt = rig.running()
    attempt.metric(1, tokens=1234)
    rig.ship(attempt)
    families = {family.name: family for family in text_string_to_metric_families(rig.client.get("/metrics").text)}
    assert families["trainyard_request_seconds"].type == "histogram"
    tokens = families["trainyard_job_tokens"].samples
    assert [(found.labels, found.value) for found in tokens] == [({"job": job_id}, 1234.0)]
    assert all(family.documentation for family in families.values())


def test_head_is_answered_as_get_is_without_the_body(rig: ServiceHarness) -> None:
    job_id = rig.submit()
    with (
        served(rig) as (host, port),
        contextlib.closing(http.client.HTTPConnection(host, port, timeout=DEADLINE)) as line,
    ):
        found = {}
        for path in ("/health", "/jobs", f"/jobs/{job_id}", "/jobs/job_aaaa", f"/jobs/{job_id}/metrics/stream"):
            # One connection for all: a body too many would be taken for the next answer.
            line.request("HEAD", path, headers={"Accept": "application/json"})
            answer = line.getresponse()
            assert answer.read() == b""
            found[path] = answer.status
            line.request("GET", "/health")
            assert json.loads(line.getresponse().read())["status"] == "ok"
    assert list(found.values()) == [200, 200, 200, 404, 405]
