import errno
import json
import os
import threading
from pathlib import Path
from typing import Any

import pytest

from trainyard.contract.events import EVENT, MetricEvent, PhaseChanged, WarningEvent
from trainyard.contract.outbox import OutboxReader
from trainyard.contract.status import Phase
from trainyard.worker.events.writer import EventWriter, NullEventWriter


def lines(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_lines_are_numbered_and_readable_by_the_contract(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    with EventWriter(path) as outbox:
        outbox.emit(PhaseChanged(phase=Phase.TRAINING))
        outbox.emit(MetricEvent(step=3, epoch=0.5, loss=2.0, learning_rate=1e-3, tokens=10))
    events = [EVENT.validate_json(line) for line in path.read_text().splitlines()]
    assert [event.seq for event in events] == [1, 2]
    assert isinstance(events[1], MetricEvent)
    assert events[1].loss == 2.0


def test_a_number_that_is_not_finite_is_null(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    with EventWriter(path) as outbox:
        outbox.emit(
            MetricEvent(step=1, epoch=0, loss=float("nan"), grad_norm=float("inf"), learning_rate=1.0, tokens=1)
        )
    assert "NaN" not in path.read_text()
    assert "Infinity" not in path.read_text()
    assert lines(path)[0]["loss"] is None


def test_text_of_any_kind_stays_one_line(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    message = 'line\nbreak \u2028 and \x85 and "quotes" and \0'
    with EventWriter(path) as outbox:
        outbox.emit(WarningEvent(code="x", message=message))
        outbox.emit(WarningEvent(code="y", message="next"))
    assert path.read_bytes().count(b"\n") == 2
    assert [line["message"] for line in OutboxReader(path).read(10)] == [message, "next"]


def test_seq_goes_on_and_a_torn_line_is_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    with EventWriter(path) as outbox:
        outbox.emit(WarningEvent(code="a", message="a"))
    with path.open("ab") as file:
        file.write(b'{"kind": "warn')
    with EventWriter(path) as outbox:
        outbox.emit(WarningEvent(code="b", message="b"))
    assert [(line["seq"], line["code"]) for line in lines(path)] == [(1, "a"), (2, "b")]


def test_what_a_full_disk_refuses_is_written_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, real_write, full = tmp_path / "events.jsonl", os.write, True

    def write(descriptor: int, data: bytes) -> int:
        if not full:
            return real_write(descriptor, data)
        if len(data) < 60:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real_write(descriptor, data[:20])

    monkeypatch.setattr(os, "write", write)
    outbox = EventWriter(path)
    outbox.emit(WarningEvent(code="a", message="first"))
    assert path.read_bytes() == b""
    full = False
    outbox.emit(WarningEvent(code="b", message="second"))
    outbox.close()
    assert [(line["seq"], line["code"]) for line in lines(path)] == [(1, "a"), (2, "b")]


@pytest.mark.parametrize("call", ["fstat", "write", "ftruncate"])
def test_no_event_is_lost_by_a_temporary_io_error(call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A network file system may evict its client."""
    path, real_write = tmp_path / "events.jsonl", os.write
    outbox = EventWriter(path)
    outbox.emit(WarningEvent(code="a", message="first"))

    def fail(*_: Any) -> Any:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as broken:
        broken.setattr(os, "write", lambda descriptor, data: real_write(descriptor, data[:20]))
        broken.setattr(os, call, fail)
        outbox.emit(WarningEvent(code="b", message="second"))
        outbox.emit(WarningEvent(code="c", message="third"))
    outbox.emit(WarningEvent(code="d", message="fourth"))
    outbox.close()
    assert [(line["seq"], line["code"]) for line in lines(path)] == [(1, "a"), (2, "b"), (3, "c"), (4, "d")]


def test_other_ranks_say_nothing() -> None:
    silent = NullEventWriter()
    silent.emit(WarningEvent(code="a", message="a"))
    silent.close()
    assert silent.seq == 0


def test_two_threads_never_share_a_line_or_a_number(tmp_path: Path) -> None:
    path, each = tmp_path / "events.jsonl", 400
    with EventWriter(path) as outbox:

        def speak(who: str) -> None:
            for number in range(each):
                outbox.emit(WarningEvent(code=who, message="x" * (number % 50)))

        threads = [threading.Thread(target=speak, args=(who,)) for who in ("training", "save")]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    found = lines(path)
    assert [line["seq"] for line in found] == list(range(1, 2 * each + 1))
    assert sorted(str(line["code"]) for line in found) == ["save"] * each + ["training"] * each
