"""Streams in the client: parsing, reconnecting, polling as a fallback, and their use by watch and logs."""

import json
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from queue import Queue
from typing import Any

import httpx2
import pytest

from tests.client.fake_service import NOW, URL, FakeService, job, metric, problem
from tests.client.test_logs import options
from trainyard.client import sse as streams
from trainyard.client.api import Client
from trainyard.client.cli.commands.logs import LogReader
from trainyard.client.cli.watch.watcher import Watcher
from trainyard.client.connection import RetryPolicy
from trainyard.client.errors import NotFound, ServiceUnreachable
from trainyard.client.sse import EventStream, StreamEvent, StreamUnsupported, parse_events

JOB = "job_7f3kq9"
DEADLINE = 60.0


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def gathered(into: list[Any], more: Iterable[Any]) -> list[Any]:
    into.extend(more)
    return into


def sse(kind: str, data: Any, place: str | None = None) -> str:
    return (f"id: {place}\n" if place else "") + f"event: {kind}\ndata: {json.dumps(data)}\n\n"


def streaming(*pieces: str) -> httpx2.Response:
    return httpx2.Response(200, text="retry: 1\n\n" + "".join(pieces), headers={"Content-Type": "text/event-stream"})


def connected(service: FakeService) -> Client:
    return Client(URL, retries=RetryPolicy(seconds=0), transport=service.transport)


# Parsing


def test_lines_become_events() -> None:
    shown = 'retry: 2000\n: hello\n\nid: 1-2\nevent: metric\ndata: {"a": 1}\n\n: still here\n\n'
    text = shown + "event: end\ndata:{}\n\nevent: cut"
    assert list(parse_events(text.split("\n"))) == [
        StreamEvent("metric", {"a": 1}, "1-2"),
        StreamEvent("end", {}, None),
    ]


# One connection


def test_a_stream_is_opened_read_and_ends(service: FakeService) -> None:
    service.faults = [lambda _: streaming(sse("metric", {"step": 1}, "1-2"), sse("end", {}))]
    found = list(connected(service).metric_stream(JOB, after_step=7, last_event_id="1-1"))
    assert [event.kind for event in found] == ["open", "metric", "end"]
    asked = service.requests[-1]
    assert (asked.url.path, asked.url.params["after_step"]) == (f"/jobs/{JOB}/metrics/stream", "7")
    assert (asked.headers["Last-Event-ID"], asked.headers["Accept"]) == ("1-1", "text/event-stream")
    service.faults = [lambda _: streaming()]
    assert [event.kind for event in connected(service).log_stream(JOB, rank=1, offset=5)] == ["open"]
    assert dict(service.requests[-1].url.params) == {"rank": "1", "offset": "5"}


def test_a_response_that_is_no_stream_is_an_error(service: FakeService) -> None:
    with pytest.raises(StreamUnsupported):
        list(connected(service).metric_stream(JOB))
    service.faults = [lambda _: problem(404, "job_not_found", "No job has this id.")]
    with pytest.raises(NotFound):
        list(connected(service).metric_stream(JOB))


def test_a_broken_stream_is_service_unreachable(service: FakeService) -> None:
    def broken(request: httpx2.Request) -> httpx2.Response:
        raise httpx2.ReadError("reset", request=request)

    service.faults = [broken]
    with pytest.raises(ServiceUnreachable, match="reset"):
        list(connected(service).metric_stream(JOB))
    service.faults = [lambda _: streaming("event: metric\ndata: {broken\n\n")]
    with pytest.raises(ServiceUnreachable):
        list(connected(service).metric_stream(JOB))


# The stream


def test_a_stream_reconnects_after_the_last_event(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "RETRY_SECONDS", 0.001)
    asked: list[str | None] = []

    def open_stream(behind: str | None) -> Iterator[StreamEvent]:
        asked.append(behind)
        yield StreamEvent("open")
        if len(asked) == 1:
            yield StreamEvent("metric", 1, "1-1")
            raise ServiceUnreachable(URL, "reset")
        if len(asked) == 2:
            return
        yield StreamEvent("metric", 2, "1-2")
        yield StreamEvent("end")

    stream = EventStream(open_stream).start()
    stream._thread.join(DEADLINE)
    assert not stream._thread.is_alive()
    assert asked == [None, "1-1", "1-1"]
    assert [event.data for event in stream.drain() if event.kind == "metric"] == [1, 2]
    assert not stream.healthy
    assert stream.drain() == []


@pytest.mark.parametrize("error", [StreamUnsupported("no"), NotFound(404, {}), ServiceUnreachable(URL, "x")])
def test_without_a_stream_the_thread_ends_or_retries(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "RETRY_SECONDS", 0.001)
    tries: list[int] = []

    def open_stream(_: str | None) -> Iterator[StreamEvent]:
        tries.append(1)
        raise error
        yield

    stream = EventStream(open_stream).start()
    if isinstance(error, ServiceUnreachable):
        until(lambda: len(tries) > 3)
        assert stream._thread.is_alive()
        stream.close()
    stream._thread.join(DEADLINE)
    assert not stream._thread.is_alive()
    assert not stream.healthy


def test_a_stream_without_a_reader_holds_a_bounded_number_of_events(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "MAX_QUEUED", 5)
    sent: list[int] = []

    def endless(_: str | None) -> Iterator[StreamEvent]:
        while True:
            sent.append(1)
            yield StreamEvent("metric", len(sent), f"1-{len(sent)}")

    stream = EventStream(endless, _events=Queue(5)).start()
    until(lambda: len(sent) == 6)
    stream.wait(1.0)
    assert len(stream.drain()) >= 5
    stream.close()
    stream._thread.join(DEADLINE)
    assert not stream._thread.is_alive()


# Watch and logs over a stream


class Scripted:
    """A stream whose events a test adds one by one."""

    def __init__(self) -> None:
        self.pieces: list[StreamEvent] = []
        self.more = threading.Event()
        self.ended = False

    def __call__(self, *_: Any, **__: Any) -> Iterator[StreamEvent]:
        yield StreamEvent("open")
        while not self.ended:
            while self.pieces:
                yield self.pieces.pop(0)
            self.more.wait(0.01)


@pytest.fixture
def script() -> Iterator[Scripted]:
    made = Scripted()
    yield made
    made.ended = True


def test_watch_reads_points_from_the_stream(
    service: FakeService, script: Scripted, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainyard = connected(service)
    monkeypatch.setattr(trainyard, "metric_stream", script)
    service.curve = [metric(100, attempt=2)]
    watcher = Watcher(trainyard, JOB, "pre-12", streams=True)
    assert [point["step"] for point in watcher.poll(NOW).new_points] == [100]
    stream = watcher._stream
    assert stream is not None
    until(lambda: stream.healthy)
    script.pieces += [StreamEvent("metric", metric(step, attempt=2), f"2-{step}") for step in (100, 200)]
    fresh: list[Any] = []
    until(lambda: bool(gathered(fresh, watcher.poll(NOW).new_points)))
    assert [point["step"] for point in fresh] == [200], "100 was known already"
    asked = [request.url.path for request in service.requests if "metrics" in request.url.path]
    assert asked == [f"/jobs/{JOB}/metrics"], "asked for once, at the start"
    service.jobs[JOB] = job(attempt=3)
    script.pieces += [
        StreamEvent("attempt", {"attempt": 3, "start_step": 100}),
        StreamEvent("metric", metric(200), "3-2"),
    ]
    fresh.clear()
    until(lambda: bool(gathered(fresh, watcher.poll(NOW).new_points)))
    assert [point["step"] for point in fresh] == [200]
    assert watcher.state.curve.losses == [3.0, 3.0]
    service.jobs[JOB] = job("succeeded", attempt=3)
    service.curve = [metric(300, attempt=3)]
    assert [point["step"] for point in watcher.poll(NOW).new_points] == [300], "the last points are asked for"
    watcher.close()


def test_watch_polls_while_the_stream_is_not_connected(service: FakeService) -> None:
    watcher = Watcher(connected(service), JOB, "pre-12", streams=True)
    for step in (100, 200, 300):
        service.curve.append(metric(step))
        assert [point["step"] for point in watcher.poll(NOW).new_points] == [step]
    watcher.close()


def test_logs_read_text_from_the_stream(
    service: FakeService, script: Scripted, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainyard = connected(service)
    monkeypatch.setattr(trainyard, "log_stream", script)
    service.log = "one\n"
    reader = LogReader(trainyard, trainyard.job(JOB), options(), streams=True)
    assert list(reader.read_new()) == ["one\n"]
    stream = reader._stream
    assert stream is not None
    until(lambda: stream.healthy)

    def said(attempt: int, offset: int, text: str) -> StreamEvent:
        end = offset + len(text)
        return StreamEvent(
            "log", {"attempt": attempt, "offset": offset, "data": text, "next_offset": end}, f"{attempt}-{end}"
        )

    script.pieces += [said(2, 0, "one\n"), said(2, 4, "two\n"), said(3, 0, "new\n")]
    found: list[str] = []
    until(lambda: "new\n" in gathered(found, reader.read_new()))
    assert found == ["two\n", "new\n"]
    reader.refresh()
    assert reader._attempt == 3
    script.pieces += [said(3, 2, "w\nmore\n")]
    until(lambda: not list(reader.read_new()) and not reader._streams)
    service.log = "new\nmore\n"
    assert list(reader.read_new()) == ["more\n"], "an overlap is not printed twice"
    reader.close()
