"""Each complete line once, in order, whatever the writer was doing when it died."""

import io
import json
import random
from pathlib import Path
from typing import Any

import pytest

from trainyard.contract.events import EVENT, MetricEvent
from trainyard.contract.outbox import OutboxReader


def test_a_line_counts_only_with_its_newline(tmp_path: Path) -> None:
    file = tmp_path / "events.jsonl"
    reader = OutboxReader(file)
    assert reader.read(10) == []
    file.write_bytes(b'{"kind": "warning"}\n{"kind": "met')
    assert [line["seq"] for line in reader.read(10)] == [1]
    assert reader.read(10) == []
    with file.open("ab") as more:
        more.write(b'ric"}\n')
    assert reader.read(10) == [{"kind": "metric", "seq": 2}]


def test_garbage_keeps_its_place(tmp_path: Path) -> None:
    file = tmp_path / "events.jsonl"
    file.write_bytes(b'{"a": 1}\nnot json\n[1]\n{"loss": NaN}\n\xff\n{"b": 2}\n')
    lines = OutboxReader(file).read(10)
    assert [line["seq"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert [line.get("kind") for line in lines] == [None, *["unreadable"] * 4, None]


def test_reading_in_chunks_gives_all_lines(tmp_path: Path) -> None:
    seed = 7
    print("seed", seed)
    chance = random.Random(seed)
    file = tmp_path / "events.jsonl"
    whole = b"".join(json.dumps({"n": n, "x": "y" * chance.randrange(50)}).encode() + b"\n" for n in range(1, 400))
    reader, written = OutboxReader(file), 0
    seen: list[dict[str, Any]] = []
    while written < len(whole) or len(seen) < 399:
        grown = min(len(whole), written + chance.randrange(1, 400))
        with file.open("ab") as out:
            out.write(whole[written:grown])
        written = grown
        seen += reader.read(chance.randrange(1, 20))
    assert [line["n"] for line in seen] == list(range(1, 400))
    assert [line["seq"] for line in seen] == list(range(1, 400))


def test_a_retry_does_not_read_from_the_first_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "events.jsonl"
    file.write_bytes(b"".join(b'{"n": %d, "x": "%s"}\n' % (n, b"y" * 1000) for n in range(1, 5001)))
    reader = OutboxReader(file)
    reader.seek_after(4000)
    reads: list[int] = []
    seek = io.BufferedReader.seek

    class Watched(io.BufferedReader):
        def seek(self, offset: int, whence: int = 0, /) -> int:
            reads.append(offset)
            return seek(self, offset, whence)

    monkeypatch.setattr(Path, "open", lambda path, mode: Watched(io.FileIO(path)))
    for _ in range(3):  # nothing is acknowledged
        assert [line["n"] for line in reader.read(500)] == list(range(4001, 4501))
        reader.seek_after(4000)
    assert min(reads) > 4_000_000
    reader.seek_after(4300)
    assert reader.read(1)[0]["n"] == 4301
    reader.seek_after(10)  # a service that has lost lines
    assert reader.read(1)[0]["n"] == 11


def test_rewinding_reads_again_what_was_not_stored(tmp_path: Path) -> None:
    file = tmp_path / "events.jsonl"
    file.write_bytes(b"".join(b'{"n": %d}\n' % n for n in range(1, 11)))
    reader = OutboxReader(file)
    reader.read(8)
    reader.seek_after(3)
    assert [line["n"] for line in reader.read(2)] == [4, 5]
    reader.seek_after(9)
    assert [line["n"] for line in reader.read(5)] == [10]
    reader.seek_after(99)
    assert reader.seq == 10
    assert OutboxReader(file).skip_to_end() == 10


def test_a_metric_that_was_not_finite_is_null_in_strict_json() -> None:
    line = MetricEvent(
        step=1, epoch=0.1, loss=float("nan"), learning_rate=1e-3, tokens=5, nonfinite=True
    ).model_dump_json()
    assert json.loads(line, parse_constant=lambda _: 1 / 0)["loss"] is None
    read = EVENT.validate_json(line)
    assert isinstance(read, MetricEvent)
    assert read.nonfinite
