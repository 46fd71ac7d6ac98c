"""Log lines by number and the search, compared with a plain reading of the file."""

import random
import tracemalloc
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.service.harness import ServiceHarness
from tests.service.test_log_reader import log
from tests.work import count_calls
from trainyard.service.logs import line_index
from trainyard.service.logs.line_index import ELLIPSIS, MAX_LINE_BYTES, LineIndexCache
from trainyard.service.logs.reader import BLOCK

SEED = 7


def plain(path: Path) -> list[str]:
    text = path.read_bytes().decode(errors="replace")
    whole = text.split("\n")
    return whole[:-1] if text.endswith("\n") or not text else whole


def found_all(known: LineIndexCache, path: Path, wanted: str, limit: int) -> list[tuple[int, str]]:
    found, after, ended = [], 0, False
    while not ended:
        matches, after, ended = known.search(path, wanted, after, limit)
        found += [(one.line, one.text) for one in matches]
    return found


@pytest.mark.parametrize("ending", ["", "\n", "no end"])
@pytest.mark.parametrize("block", [7, 64, BLOCK])
def test_lines_and_matches_are_those_of_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ending: str, block: int
) -> None:
    monkeypatch.setattr(line_index, "BLOCK", block)
    monkeypatch.setattr(line_index, "SEARCH_BLOCK", max(200, block))
    dice = random.Random(SEED)
    path, known = tmp_path / "log", LineIndexCache()
    path.write_bytes(b"")
    for _ in range(6):
        with path.open("ab") as file:
            for _ in range(dice.randrange(120)):
                file.write(("".join(dice.choice("abAB\u00e9 ") for _ in range(dice.randrange(90))) + "\n").encode())
            file.write(ending.encode())
        expected = plain(path)
        for _ in range(8):
            first, count = dice.randrange(1, len(expected) + 3), dice.randrange(40)
            read, index = known.read(path, first, count)
            assert read == expected[first - 1 : first - 1 + count], (SEED, first, count)
            assert (index.total, index.size) == (len(expected), path.stat().st_size)
        for wanted in ("ab", "BA\u00e9", "nowhere", "a"):
            fits = [(i, text) for i, text in enumerate(expected, 1) if wanted.lower() in text.lower()]
            assert found_all(known, path, wanted, dice.choice([1, 3, 1000])) == fits, (SEED, wanted)


def test_a_log_that_was_begun_anew_is_counted_anew(tmp_path: Path) -> None:
    path, known = tmp_path / "log", LineIndexCache()
    path.write_text("one\n" * 50_000)
    assert known.read(path, 50_000, 9)[0] == ["one"]
    path.write_text("two\n")
    found, index = known.read(path, 1, 9)
    assert (found, index.total) == (["two"], 1)


def test_long_lines_are_cut_and_skipped(tmp_path: Path) -> None:
    path, known = tmp_path / "log", LineIndexCache()
    path.write_bytes(b"first\n" + b"x" * (3 << 20) + b"needle\n" + b"\xf0\x9f\x98\x80" * 2000 + b"\nlast needle\n")
    read, index = known.read(path, 1, 10)
    assert index.total == 4
    assert [len(line) for line in read] == [5, MAX_LINE_BYTES + 1, MAX_LINE_BYTES // 4 + 1, 11]
    assert read[1].endswith(ELLIPSIS)
    assert found_all(known, path, "NEEDLE", 10) == [(4, "last needle")]
    assert [line for line, _ in found_all(known, path, "x", 10)] == [2]


def test_a_million_lines_cost_a_moment_and_little_memory(tmp_path: Path) -> None:
    path, known = tmp_path / "log", LineIndexCache()
    step = "step {:>8} loss 2.9134 lr 2.61e-04 tok/s 118240 grad 0.48 mem 61.2 GB data 0.8 ms\n"
    path.write_text("".join(step.format(i) for i in range(1, 1_000_001)))
    known.read(path, 1, 1)
    tracemalloc.start()
    read, index = known.read(path, 999_001, 500)
    assert (read[0][:13], index.total) == ("step   999001", 1_000_000)
    matches, searched, ended = known.search(path, "Step   999999", 0, 10)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert [one.line for one in matches] == [999_999]
    assert (searched, ended) == (1_000_000, True)
    assert peak < 16 << 20
    last, first = (count_calls(partial(known.read, path, line, 500)) for line in (999_001, 1))
    assert last < 2 * first, "the last lines are found as quickly as the first ones"


def test_over_the_api(rig: ServiceHarness) -> None:
    job_id, _ = rig.running()
    text = "".join(f"line {i}\n" for i in range(1, 1001))
    log(rig, job_id, text, rank=1)
    found = rig.get(f"/jobs/{job_id}/logs/lines", rank=1, first=999, count=5)
    assert found["lines"] == ["line 999", "line 1000"]
    assert (found["first_line"], found["total_lines"], found["bytes"]) == (999, 1000, len(text))
    page = rig.get(f"/jobs/{job_id}/logs/search", rank=1, q="LINE 99", limit=2)
    assert [one["line"] for one in page["data"]] == [99, 990]
    assert text[page["data"][1]["offset"] :].startswith("line 990\n")
    assert page["has_more"]
    rest = rig.get(f"/jobs/{job_id}/logs/search", rank=1, q="line 99", after_line=page["searched_lines"])
    assert [one["line"] for one in rest["data"]] == list(range(991, 1000))
    assert (rest["has_more"], rest["searched_lines"]) == (False, 1000)
    assert rig.get(f"/jobs/{job_id}/logs/lines", expect=404)["code"] == "log_not_found"


@pytest.mark.parametrize("params", [{}, {"q": ""}, {"q": "a\nb"}, {"q": "a", "limit": 0}, {"q": "a", "rank": "-1"}])
def test_bad_searches(rig: ServiceHarness, params: dict[str, Any]) -> None:
    job_id, _ = rig.running()
    rig.get(f"/jobs/{job_id}/logs/search", expect=422, **params)
