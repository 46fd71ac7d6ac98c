"""Logs: the tail, reading on from an offset, and files of any size."""

import random
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from tests.service.harness import ServiceHarness
from trainyard.contract.rundir import RunDir
from trainyard.service.logs.reader import read_from, read_tail


def log(rig: ServiceHarness, job_id: str, text: str | bytes, rank: int | None = 0, number: int = 1) -> Path:
    attempt = RunDir(rig.home / "runs" / job_id).attempt(number)
    attempt.logs.mkdir(parents=True, exist_ok=True)
    path = attempt.agent_log if rank is None else attempt.rank_log(rank)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_tail_and_on_from_there(rig: ServiceHarness) -> None:
    job_id, _ = rig.running()
    path = log(rig, job_id, "one\ntwo\nthree\n")
    chunk = rig.get(f"/jobs/{job_id}/logs", tail=2)
    assert chunk == {"data": "two\nthree\n", "next_offset": 14}
    with path.open("a") as file:
        file.write("four\n")
    assert rig.get(f"/jobs/{job_id}/logs", offset=14) == {"data": "four\n", "next_offset": 19}
    assert rig.get(f"/jobs/{job_id}/logs", offset=19) == {"data": "", "next_offset": 19}
    assert rig.get(f"/jobs/{job_id}/logs")["data"] == "one\ntwo\nthree\nfour\n"
    assert rig.get(f"/jobs/{job_id}/logs", offset=0, limit=5) == {"data": "one\nt", "next_offset": 5}
    assert rig.get(f"/jobs/{job_id}/logs", offset=10**12) == {"data": "", "next_offset": 10**12}


def test_whose_log(rig: ServiceHarness) -> None:
    job_id, _ = rig.running()
    log(rig, job_id, "rank one", rank=1)
    log(rig, job_id, "the agent", rank=None)
    assert rig.get(f"/jobs/{job_id}/logs", rank=1)["data"] == "rank one"
    assert rig.get(f"/jobs/{job_id}/logs", rank="agent", attempt=1)["data"] == "the agent"
    for params in ({"rank": 2}, {"attempt": 2}, {}):
        assert rig.get(f"/jobs/{job_id}/logs", expect=404, **params)["code"] == "log_not_found"
    no_attempt = rig.get(f"/jobs/{job_id}/logs", expect=404, attempt=2)
    assert no_attempt["detail"] == "The job has no attempt of this number: its newest is 1."
    waiting = rig.get(f"/jobs/{rig.submit()}/logs", expect=404)
    assert (waiting["code"], waiting["detail"]) == ("log_not_found", "The job has no log yet: it has not started.")


@pytest.mark.parametrize(
    "params",
    [
        {"rank": "-1"},
        {"rank": "../../../etc/passwd"},
        {"rank": "all"},
        {"rank": "²"},
        {"attempt": 0},
        {"attempt": 2**63},
        {"tail": 0},
        {"tail": 1, "offset": 1},
        {"limit": 2**40},
    ],
)
def test_bad_questions(rig: ServiceHarness, params: dict[str, Any]) -> None:
    job_id, _ = rig.running()
    rig.get(f"/jobs/{job_id}/logs", expect=422, **params)


def test_reading_on_gives_every_character_once(tmp_path: Path) -> None:
    dice = random.Random(5)
    text = "".join(dice.choice("aß€😀\n") for _ in range(3000))
    path = tmp_path / "log"
    path.write_text(text)
    for limit in (4, 5, 7, 100, 4096):
        pieces, offset = [], 0
        while True:
            data, following = read_from(path, offset, limit)
            if not data:
                break
            assert following > offset
            pieces.append(data)
            offset = following
        assert "".join(pieces) == text, limit


def test_bytes_that_are_no_text_do_not_stop_the_reader(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_bytes(b"\x80" * 50 + b"\xff\xfe\xf0" * 50 + b"end\n")
    offset = 0
    for _ in range(200):
        data, following = read_from(path, offset, 4)
        assert following > offset or not data
        offset = following
    assert offset == path.stat().st_size


@pytest.mark.parametrize("lines", [1, 2, 3, 50, 5000])
def test_tail_is_the_last_lines(tmp_path: Path, lines: int) -> None:
    path = tmp_path / "log"
    written = [f"line {i} {'x' * (i % 90)}\n" for i in range(4000)]
    for ending in ("", "without an end"):
        path.write_text("".join(written) + ending)
        expected = ([*written, ending] if ending else written)[-lines:]
        data, following = read_tail(path, lines, 1 << 20)
        assert data == "".join(expected)
        assert following == path.stat().st_size


def test_a_long_line_is_cut_at_the_limit(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_bytes(b"x" * 1_000_000 + b"\nshort\n")
    assert read_tail(path, 2, 4096)[0] == "x" * 4089 + "\nshort\n"
    path.write_bytes(b"x" * 500 + b"\n" + b"y" * 3900 + b"\n")
    assert read_tail(path, 2, 4096)[0] == "y" * 3900 + "\n", "what is left of a short line is left out"
    path.write_bytes(b"x" * 1_000_000)
    assert len(read_tail(path, 2, 4096)[0]) == 4096
    path.write_bytes(b"")
    assert read_tail(path, 2, 4096) == ("", 0)


def test_a_tail_shows_the_end_of_a_line_of_two_megabytes(rig: ServiceHarness) -> None:
    """In 0.1 only what came after the line was returned: of a traceback in one line, nothing."""
    job_id, _ = rig.running()
    log(rig, job_id, "\u00e9" * 1_000_000 + "the cause\nthe last line\n")
    data = rig.get(f"/jobs/{job_id}/logs", tail=200)["data"]
    assert data.endswith("the cause\nthe last line\n")
    assert len(data.encode()) in (65535, 65536)
    assert "\ufffd" not in data


def test_a_huge_log_costs_little_memory(tmp_path: Path) -> None:
    path = tmp_path / "log"
    with path.open("wb") as file:
        file.truncate(20 << 30)
        file.seek(20 << 30)
        file.write(b"\nlast line\n")
    tracemalloc.start()
    data, following = read_tail(path, 1, 64 << 10)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert data == "last line\n"
    assert following == (20 << 30) + 11
    assert peak < 1 << 20
