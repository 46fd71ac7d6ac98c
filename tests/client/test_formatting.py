from datetime import UTC, datetime, timedelta

import pytest

from trainyard.client.cli.formatting import (
    ago,
    bar,
    compact_number,
    count,
    duration,
    fixed,
    local_time,
    one_line,
    safe,
    scientific,
    size,
    sparkline,
    status_word,
    table,
    utc,
)
from trainyard.contract.status import JobStatus

NOW = datetime(2026, 1, 31, 16, 31, 5, tzinfo=UTC)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s"),
        (-3, "0 s"),
        (59.4, "59 s"),
        (59.6, "1 min"),
        (200, "3 min 20 s"),
        (7800, "2 h 10 min"),
        (7200, "2 h"),
        (90000, "1 d 1 h"),
        (None, "-"),
    ],
)
def test_duration(seconds: float | None, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (406_000_000, "406 M"),
        (1_310_720_000, "1.31 B"),
        (999, "999"),
        (6400, "6.4 k"),
        (2e12, "2 T"),
        (3e15, "3,000 T"),
        (None, "-"),
    ],
)
def test_large(value: float | None, text: str) -> None:
    assert compact_number(value) == text


def test_numbers() -> None:
    assert (count(12400), count(None), count(118240.4)) == ("12,400", "-", "118,240")
    assert (fixed(2.9131), fixed(None), fixed(0.4821, 2)) == ("2.913", "-", "0.48")
    assert (scientific(2.614e-4), scientific(None)) == ("2.61e-04", "-")
    assert (size(2_310_000_000), size(512), size(None), size(1000)) == ("2.3 GB", "512 B", "-", "1.0 kB")


def test_times() -> None:
    assert local_time("2026-01-31T16:31:05Z") == NOW
    assert local_time("2026-01-31T16:31:05") == NOW
    assert local_time("soon") is None
    assert local_time(None) is None
    assert ago("2026-01-31T16:28:05Z", NOW) == "3 min ago"
    assert ago(None, NOW) == "-"
    assert utc(NOW + timedelta(microseconds=5)) == "2026-01-31T16:31:05Z"


def test_bars_and_sparks() -> None:
    assert bar(0.31, 10) == "###-------"
    assert (bar(None, 4), bar(2, 4), bar(-1, 4)) == ("----", "####", "----")
    assert sparkline([8, 7, 6, 5, 4, 3, 2, 1], 8) == "█▇▆▅▄▃▂▁"
    assert sparkline([], 8) == ""
    assert sparkline([3.0], 8) == "▁"
    assert sparkline([1, 1, 1], 8) == "▁▁▁"
    assert sparkline([8, 8, 1, 1], 2) == "█▁"
    assert len(sparkline(list(range(1000)), 24)) == 24


def test_tables_align() -> None:
    assert table(("A", "LONG"), [("1", "x"), ("222", "y")], right=frozenset({0})) == ["  A  LONG", "  1  x", "222  y"]
    assert table(("A", "B"), []) == ["A  B"]


def test_chinese_and_accents_take_their_columns_of_the_terminal() -> None:
    rows = [["预训练", "1"], ["cafe\N{COMBINING ACUTE ACCENT}", "22"]]
    assert table(["NAME", "STEP"], rows) == ["NAME    STEP", "预训练  1", "cafe\N{COMBINING ACUTE ACCENT}    22"]
    assert one_line("预训练", 6) == "预训练"
    assert [one_line("预训练模型", width) for width in (9, 8, 7, 5, 2)] == [
        "预训练...",
        "预训...",
        "预训...",
        "预...",
        "..",
    ]


def test_every_status_has_a_glyph_and_its_word() -> None:
    for status in JobStatus:
        glyph, word = status_word(status).split(" ")
        assert glyph != "?"
        assert word == status.upper()
    assert status_word("novel") == "? NOVEL"


def test_what_others_wrote_cannot_command_the_terminal() -> None:
    assert one_line("a\x1b[2Jb\nc", 20) == "a [2Jb c"
    assert one_line("a" * 30, 10) == "aaaaaaa..."
    assert safe("a\x1b[2J\tb\n\x07") == "a\N{REPLACEMENT CHARACTER}[2J\tb\n\N{REPLACEMENT CHARACTER}"


def test_all_spaces_and_joined_emoji_are_printed_unchanged() -> None:
    """`str.isprintable` is False for most spaces and for the characters that join letters and emoji."""
    for text in ("\u3000第一段。", "20\u00a0%", "a\u200cb", "👩\u200d💻", "soft\u00adhyphen", "\ue000", "\ufeff"):
        assert safe(text) == text
    for unsafe in "\x00\r\x1b\x7f\x85\x9b\u200e\u2028\u202e\u2067\udcff":
        assert safe(f"a{unsafe}b") == "a\N{REPLACEMENT CHARACTER}b"
