"""The streams over real sockets: replay, order, ends, stalled readers, and the cost."""

import asyncio
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import insert

from tests.service.conftest import MakeHarness
from tests.service.harness import ServiceHarness
from tests.service.live_server import DEADLINE, Reader, served
from trainyard.contract.rundir import RunDir
from trainyard.contract.status import Reason
from trainyard.service import descriptors
from trainyard.service.clock import utc_now
from trainyard.service.db.models import MetricRow
from trainyard.service.logs.reader import read_growing
from trainyard.service.metrics import store
from trainyard.service.streams import broadcaster, sse, subscribers
from trainyard.service.streams.sse import event, parse_last_event_id

Open = Callable[..., Reader]


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(broadcaster, "POLL_SECONDS", 0.02)
    monkeypatch.setattr(broadcaster, "MIN_POLL_SECONDS", 0.01)
    monkeypatch.setattr(subscribers, "POLL_SECONDS", 0.02)


@pytest.fixture
def open_stream(any_rig: ServiceHarness, quick: None) -> Iterator[Open]:
    made: list[Reader] = []
    with served(any_rig) as address:

        def make(job_id: str, what: str = "metrics", query: str = "", **headers: str) -> Reader:
            made.append(Reader(address, f"/jobs/{job_id}/{what}/stream{query}", False, **headers))
            return made[-1]

        yield make
        for reader in made:
            reader.close()


@pytest.fixture
def open_sqlite(rig: ServiceHarness, quick: None) -> Iterator[Open]:
    made: list[Reader] = []
    with served(rig) as address:

        def make(path: str, small: bool = False, **headers: str) -> Reader:
            made.append(Reader(address, path, small, **headers))
            return made[-1]

        yield make
        for reader in made:
            reader.close()


def ids(events: list[dict[str, Any]]) -> list[str]:
    return [found.get("id", found["event"]) for found in events]


# Metrics


def test_the_curve_so_far_then_what_comes_then_the_end(any_rig: ServiceHarness, open_stream: Open) -> None:
    job_id, attempt = any_rig.running()
    for step in (1, 2, 3):
        attempt.metric(step, loss=float(step))
    any_rig.ship(attempt)
    reader = open_stream(job_id)
    assert reader.status == 200
    assert reader.headers["content-type"].startswith("text/event-stream")
    assert reader.headers["cache-control"] == "no-store"
    first = reader.take(3)
    assert ids(first) == ["1-2", "1-3", "1-4"]
    assert [found["data"] for found in first] == any_rig.data(job_id, "metrics")
    attempt.metric(4, loss=None, nonfinite=True)
    any_rig.ship(attempt)
    assert reader.take(1)[0]["data"]["nonfinite"] is True
    any_rig.exit(attempt, "completed", step=4)
    assert reader.take(1) == [{"event": "end", "data": {"status": "succeeded"}}]
    assert next(reader.iterator, None) is None, "the service closes the stream behind its end"


def test_last_event_id_goes_on_behind_it(any_rig: ServiceHarness, open_stream: Open) -> None:
    job_id, attempt = any_rig.running(steps=1000)
    for step in range(1, 701):
        attempt.metric(step)
    any_rig.exit(attempt, "completed", step=700)
    whole = list(open_stream(job_id).events())
    assert [found["data"]["step"] for found in whole[:-1]] == list(range(1, 701))
    for behind in (0, 1, 350, 699, 700):
        again = list(open_stream(job_id, **{"Last-Event-ID": f"1-{behind + 1}"}).events())
        assert again == whole[behind:], behind
    later = list(open_stream(job_id, query="?after_step=690").events())
    assert later == whole[690:]


def test_another_attempt_says_where_it_goes_on(any_rig: ServiceHarness, open_stream: Open) -> None:
    rig = any_rig
    job_id, first = rig.running()
    for step in (1, 2, 3, 4):
        first.metric(step)
    rig.ship(first)
    reader = open_stream(job_id)
    assert ids(reader.take(4)) == ["1-2", "1-3", "1-4", "1-5"]
    rig.exit(first, "crashed", Reason.HUNG, step=4)
    rig.post_action(job_id, "resume")
    second = rig.next_attempt(job_id, 2, start_step=2)
    second.metric(3)
    rig.ship(second)
    announced, point = reader.take(2)
    assert announced == {"event": "attempt", "data": {"attempt": 2, "start_step": 2}}
    assert (point["id"], point["data"]["step"]) == ("2-2", 3)
    rig.exit(second, "completed", step=3)
    assert reader.take(1)[0]["event"] == "end"
    stitched = list(open_stream(job_id).events())
    assert [found["data"].get("step") for found in stitched] == [1, 2, None, 3, None]


def test_a_job_at_rest_keeps_its_stream(any_rig: ServiceHarness, open_stream: Open) -> None:
    job_id, attempt = any_rig.running()
    any_rig.post_action(job_id, "pause")
    any_rig.exit(attempt, "stopped", step=0)
    reader = open_stream(job_id)
    any_rig.post_action(job_id, "cancel")
    assert reader.take(1) == [{"event": "end", "data": {"status": "cancelled"}}]


def test_a_job_that_is_deleted_ends_its_stream(rig: ServiceHarness, open_sqlite: Open) -> None:
    job_id, attempt = rig.running()
    rig.exit(attempt, "completed", step=1)
    assert [found["event"] for found in open_sqlite(f"/jobs/{job_id}/metrics/stream").events()] == ["end"]
    assert rig.client.delete(f"/jobs/{job_id}").status_code == 204
    assert open_sqlite(f"/jobs/{job_id}/metrics/stream").status == 404


@pytest.mark.parametrize(
    ("path", "headers", "status"),
    [
        ("/jobs/job_none/metrics/stream", {}, 404),
        ("/jobs/job_none/logs/stream", {}, 404),
        ("/jobs/{}/metrics/stream", {"Last-Event-ID": "x"}, 422),
        ("/jobs/{}/metrics/stream?after_step=-1", {}, 422),
        ("/jobs/{}/logs/stream?rank=..", {}, 422),
        ("/jobs/{}/logs/stream?tail=1&offset=1", {}, 422),
        ("/jobs/{}/logs/stream?attempt=0", {}, 422),
    ],
)
def test_bad_questions(rig: ServiceHarness, open_sqlite: Open, path: str, headers: dict[str, str], status: int) -> None:
    job_id = rig.submit()
    assert open_sqlite(path.format(job_id), **headers).status == status
    assert rig.pulse.readers == 0


def test_too_many_readers_are_told_so(rig: ServiceHarness, open_sqlite: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(descriptors, "MAX_STREAMS", 2)
    path = f"/jobs/{rig.submit()}/metrics/stream"
    readers_ = [open_sqlite(path) for _ in range(3)]
    assert [reader.status for reader in readers_] == [200, 200, 429]
    assert readers_[2].headers["retry-after"] == "10"


def test_a_comment_comes_while_nothing_does(
    rig: ServiceHarness, open_sqlite: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sse, "KEEPALIVE_SECONDS", 0.1)
    blocks = open_sqlite(f"/jobs/{rig.submit()}/metrics/stream").blocks()
    assert next(blocks) == ["retry: 2000", ": trainyard"]
    assert next(blocks) == [": still here"]


def test_a_reader_that_goes_gives_its_place_back(rig: ServiceHarness, open_sqlite: Open) -> None:
    reader = open_sqlite(f"/jobs/{rig.submit()}/metrics/stream")
    assert rig.pulse.readers == 1
    reader.close()
    reader.socket.close()
    _until(lambda: rig.pulse.readers == 0)


def _until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_who_does_not_read_is_dropped_and_delays_nobody(
    rig: ServiceHarness, open_sqlite: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stalled readers and 30 that read. The curve is far larger than what a socket holds."""
    monkeypatch.setattr(sse, "STALL_SECONDS", 600.0)
    job_id, attempt = rig.running(steps=100_000)
    path = f"/jobs/{job_id}/metrics/stream"
    step = 8000
    point = {"job_id": job_id, "attempt": 1, "stitched": True, "epoch": 0.0, "loss": 1.0, "learning_rate": 1e-3}
    rest = {"tokens": 1, "nonfinite": False, "at": utc_now()}
    with rig.database.write() as session:
        session.execute(insert(MetricRow), [{**point, **rest, "seq": s - step, "step": s} for s in range(1, step + 1)])
    stalled = [open_sqlite(path, small=True) for _ in range(20)]
    live = [open_sqlite(f"{path}?after_step={step}") for _ in range(30)]

    def require_live(step: int) -> None:
        attempt.metric(step)
        rig.ship(attempt, attempt.lines[-1:])
        assert [reader.take(1)[0]["data"]["step"] for reader in live] == [step] * 30

    require_live(step + 1)
    assert rig.pulse.readers == 50, "no reader had to wait until the stalled ones were dropped"
    monkeypatch.setattr(sse, "STALL_SECONDS", 0.5)
    stalled += [open_sqlite(path, small=True) for _ in range(5)]
    _until(lambda: rig.pulse.readers <= 50)
    require_live(step + 2)
    assert len(stalled) == 25


def test_readers_share_one_look(rig: ServiceHarness, open_sqlite: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    job_id, attempt = rig.running(steps=1000)
    live = [open_sqlite(f"/jobs/{job_id}/metrics/stream") for _ in range(20)]
    asked: list[str] = []
    rows_behind = store.rows_after

    def counted(*arguments: Any) -> Any:
        asked.append(arguments[1])
        return rows_behind(*arguments)

    monkeypatch.setattr(store, "rows_after", counted)
    for step in range(1, 6):
        attempt.metric(step)
        rig.ship(attempt, attempt.lines[-1:])
        assert [reader.take(1)[0]["data"]["step"] for reader in live] == [step] * 20
    assert len(asked) < 20, "one look for all of them, not one each"


def test_the_database_away_is_waited_for(
    rig: ServiceHarness, open_sqlite: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    job_id, attempt = rig.running()
    reader = open_sqlite(f"/jobs/{job_id}/metrics/stream")
    attempt.metric(1)
    look, failures = rig.pulse._poll, [0]

    def away(known: Any) -> Any:
        failures[0] += 1
        if failures[0] < 4:
            raise OSError("gone")
        return look(known)

    monkeypatch.setattr(rig.pulse, "_poll", away)
    rig.ship(attempt)
    assert reader.take(1)[0]["data"]["step"] == 1
    assert failures[0] >= 4


def test_an_ending_service_ends_its_streams_without_an_end(rig: ServiceHarness, open_sqlite: Open) -> None:
    job_id = rig.submit()
    reader = open_sqlite(f"/jobs/{job_id}/metrics/stream")
    rig.pulse.stop()
    assert list(reader.events()) == []
    assert open_sqlite(f"/jobs/{job_id}/metrics/stream").status == 503


# Logs


def log(rig: ServiceHarness, job_id: str, text: str, number: int = 1, rank: int = 0) -> Path:
    attempt = RunDir(rig.home / "runs" / job_id).attempt(number)
    attempt.logs.mkdir(parents=True, exist_ok=True)
    with attempt.rank_log(rank).open("a") as file:
        file.write(text)
    return attempt.rank_log(rank)


def test_a_log_as_it_is_written(any_rig: ServiceHarness, open_stream: Open) -> None:
    rig = any_rig
    job_id, first = rig.running()
    log(rig, job_id, "one\ntwo\n")
    reader = open_stream(job_id, "logs", "?offset=0")
    assert reader.take(1) == [
        {"id": "1-8", "event": "log", "data": {"attempt": 1, "offset": 0, "data": "one\ntwo\n", "next_offset": 8}}
    ]
    log(rig, job_id, "three\n")
    assert reader.take(1)[0]["data"]["data"] == "three\n"
    rig.exit(first, "crashed", Reason.HUNG, step=0)
    rig.post_action(job_id, "resume")
    second = rig.next_attempt(job_id, 2)
    log(rig, job_id, "again\n", number=2)
    assert reader.take(1)[0]["data"] == {"attempt": 2, "offset": 0, "data": "again\n", "next_offset": 6}
    rig.exit(second, "completed", step=0)
    assert reader.take(1)[0]["event"] == "end"
    resumed = list(open_stream(job_id, "logs", **{"Last-Event-ID": "1-8"}).events())
    assert [found["data"].get("data") for found in resumed] == ["three\n", "again\n", None]
    tail = list(open_stream(job_id, "logs", "?tail=1&attempt=1").events())
    assert [found["data"].get("data") for found in tail] == ["three\n", None]


def test_a_log_that_is_not_there_yet(rig: ServiceHarness, open_sqlite: Open) -> None:
    job_id, attempt = rig.running()
    reader = open_sqlite(f"/jobs/{job_id}/logs/stream?rank=1")
    log(rig, job_id, "here\n", rank=1)
    assert reader.take(1)[0]["data"]["data"] == "here\n"
    rig.exit(attempt, "completed", step=0)
    assert reader.take(1)[0]["event"] == "end"
    waiting = open_sqlite(f"/jobs/{rig.submit()}/logs/stream")
    assert waiting.status == 200


def test_a_character_whose_rest_is_still_to_come(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_bytes("aß".encode()[:-1])
    assert read_growing(path, 0, 100, last=False) == ("a", 1)
    assert read_growing(path, 1, 100, last=False) == ("", 1)
    assert read_growing(path, 1, 100, last=True) == ("\N{REPLACEMENT CHARACTER}", 2)
    path.write_bytes("aß".encode())
    assert read_growing(path, 1, 100, last=False) == ("ß", 3)
    path.write_bytes(b"\xf0\xffab")
    assert read_growing(path, 0, 100, last=False)[1] == 4


# Parts


def test_events_as_bytes() -> None:
    assert (
        event("metric", {"a": None, "b": "x\ny"}, (1, 2))
        == b'id: 1-2\nevent: metric\ndata: {"a": null, "b": "x\\ny"}\n\n'
    )
    assert event("end", {}) == b"event: end\ndata: {}\n\n"
    assert parse_last_event_id("12-34") == (12, 34)
    for bad in ("", "1", "1-", "-1", "1-2-3", "a-b", "9" * 20 + "-1"):
        assert parse_last_event_id(bad) is None


def test_no_thread_waits_for_a_reader(make_rig: MakeHarness, sqlite_url: str) -> None:
    """Streams have four threads of their own, however many readers there are."""
    rig = make_rig(sqlite_url)
    assert rig.pulse._threads._max_workers == broadcaster.THREADS == 4
    assert os.cpu_count()
    assert asyncio.iscoroutinefunction(rig.pulse.open)
    rig.close()


def test_what_this_process_stores_itself_waits_for_no_beat(
    rig: ServiceHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(broadcaster, "POLL_SECONDS", 600.0)
    monkeypatch.setattr(broadcaster, "MIN_POLL_SECONDS", 0.0)
    job_id, attempt = rig.running()
    with served(rig) as address:
        reader = Reader(address, f"/jobs/{job_id}/metrics/stream")
        for step in (1, 2):
            attempt.metric(step)
            rig.ship(attempt)
            assert reader.take(1)[0]["data"]["step"] == step
        rig.exit(attempt, "completed", step=2)
        assert reader.take(1)[0]["event"] == "end"
        reader.close()
