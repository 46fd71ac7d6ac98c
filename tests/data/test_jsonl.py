"""Which lines are documents, and what is said of those that are not."""

import json
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unprivileged import drop_root, public_tmp_dir
from trainyard.contract.file_identity import Compression, compression_of
from trainyard.contract.json_lines import BadLineError
from trainyard.worker.data import jsonl
from trainyard.worker.data.jsonl import BadLineGrouper, DataInvalid, ParseStats, text_of
from trainyard.worker.data.readers import open_reader

BAD = [
    (b"\xff\xfe{", "not UTF-8 at byte 1"),
    (b'{"text": "\xc3"}', "not UTF-8 at byte 11"),
    (b"hello", "not JSON at character 1"),
    (b'{"text": "a"', "not JSON at character 13"),
    (b'{"text": "a"} {"text": "b"}', "not JSON at character 15"),
    (b'{"text": "a\x00b"}', "not JSON at character 12"),
    (b'"a bare string with text in it"', "not a JSON object but a string"),
    (b'["text"]', "not a JSON object but a list"),
    (b"null", "not a JSON object but null"),
    (b"17", "not a JSON object but a number"),
    (b"true", "not a JSON object but a boolean"),
    (b"{}", "no 'text' in the object"),
    (b'{"Text": "a"}', "no 'text' in the object, which has 'Text'"),
    (b'{"text": null}', "'text' is not a string but null"),
    (b'{"text": 1}', "'text' is not a string but a number"),
    (b'{"text": 1.5}', "'text' is not a string but a number"),
    (b'{"text": false}', "'text' is not a string but a boolean"),
    (b'{"text": ["a"]}', "'text' is not a string but a list"),
    (b'{"text": {"text": "a"}}', "'text' is not a string but an object"),
    (b'{"text": ""}', "'text' is empty"),
    (b'{"text": "a\\ud800b"}', "'text' holds a lone surrogate, which is no text"),
    (b'{"text": "a", "n": NaN}', "not JSON: holds NaN"),
    (b'{"text": "a", "n": -Infinity}', "not JSON: holds -Infinity"),
    (b'{"text": "a", "n": ' + b"7" * 5000 + b"}", "holds a number with too many digits"),
    (b"[" * 100_000, "nested too deep"),
    (b'{"text": ' + b'{"a":' * 100_000 + b"1" + b"}" * 100_001, "nested too deep"),
    (None, "longer than 8 MiB"),
]

GOOD = [
    (b'{"text": "plain"}', "plain"),
    (b'{"text": "carriage return"}\r', "carriage return"),
    (b' \t{"text" : "spaced"} ', "spaced"),
    (b'{"text": "nul \\u0000 inside"}', "nul \0 inside"),
    ('{"text": "line \u2028 and \u2029 and \x85 separators"}'.encode(), "line \u2028 and \u2029 and \x85 separators"),
    (b'{"text": "\\ud83d\\ude00"}', "\U0001f600"),
    (b'{"text": "first", "text": "last"}', "last"),
    (b'{"id": 1e999, "text": "huge float"}', "huge float"),
    (b'{"text": " "}', " "),
]


@pytest.mark.parametrize(("raw", "why"), BAD, ids=[why for _, why in BAD])
def test_bad_lines_say_why(raw: bytes | None, why: str) -> None:
    with pytest.raises(BadLineError) as found:
        text_of(raw, "text")
    assert str(found.value) == why


@pytest.mark.parametrize(("raw", "text"), GOOD)
def test_good_lines_give_their_text(raw: bytes, text: str) -> None:
    assert text_of(raw, "text") == text


def test_the_field_is_the_one_asked_for() -> None:
    assert text_of(b'{"text": "a", "content": "b"}', "content") == "b"


def read(path: Path) -> tuple[list[tuple[int, str]], ParseStats]:
    with open_reader(path) as reader:
        found = [(document.line, document.text) for document in reader.documents("text")]
        return found, reader.stats


def test_lines_are_counted_and_named(tmp_path: Path) -> None:
    file = tmp_path / "mixed.jsonl"
    file.write_bytes(
        b'\xef\xbb\xbf{"text": "one"}\r\n'
        b"\n  \t\r\n"
        b"oops\n"
        b'{"text": "five \xe2\x80\xa8 still five"}\n'
        b'{"text": 6}\n'
        b'{"text": "seven, without a newline"}'
    )
    documents, stats = read(file)
    assert documents == [(1, "one"), (5, "five \u2028 still five"), (7, "seven, without a newline")]
    assert (stats.lines, stats.blank_lines, stats.bad_lines, stats.documents) == (7, 2, 2, 3)
    assert stats.examples == [(4, "not JSON at character 1"), (6, "'text' is not a string but a number")]
    assert stats.describe_bad() == (
        "2 bad lines: line 4: not JSON at character 1; line 6: 'text' is not a string but a number"
    )


def test_the_first_twenty_are_named_and_all_are_counted(tmp_path: Path) -> None:
    file = tmp_path / "bad.jsonl"
    file.write_bytes(b"x\n" * 1000)
    _, stats = read(file)
    assert stats.bad_lines == 1000
    assert [line for line, _ in stats.examples] == list(range(1, 21))
    assert stats.describe_bad().endswith("; and 980 more")


def test_lines_that_are_bad_for_one_reason_are_named_together() -> None:
    stats, said = ParseStats(), list[str]()
    runs = BadLineGrouper(said.append)
    for line, why in ((1, "a"), (2, "a"), (3, "b"), (5, "b"), (6, "b"), (7, "b")):
        stats.add_bad(line, why)
        runs.add(line, why)
    assert said == ["lines 1 to 2: a", "line 3: b"]
    runs.end()
    runs.end()
    assert said == ["lines 1 to 2: a", "line 3: b", "lines 5 to 7: b"]
    assert stats.describe_bad() == "6 bad lines: lines 1 to 2: a; line 3: b; lines 5 to 7: b"


def test_an_object_without_the_text_says_which_texts_it_has(tmp_path: Path) -> None:
    file = tmp_path / "other.jsonl"
    file.write_text('{"content": "a", "id": 3, "' + "x" * 50 + '": "b", "title": "c"}\n{"id": 3}\n')
    _, stats = read(file)
    said = "no 'text' in the object"
    assert stats.examples == [(1, f"{said}, which has 'content', 'title'"), (2, said)]
    assert stats.empty_reason("text").endswith("What to do: text_field says under which key the texts are")


def test_one_bad_line_is_singular() -> None:
    stats = ParseStats()
    stats.add_bad(3, "not JSON")
    assert stats.describe_bad() == "1 bad line: line 3: not JSON"


@pytest.mark.parametrize("length", [99, 100, 101, 250, 1000])
def test_a_line_that_is_too_long_is_one_bad_line(length: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jsonl, "MAX_LINE_BYTES", 100)
    file = tmp_path / "long.jsonl"
    line = b'{"text": "' + b"a" * (length - 12) + b'"}'
    assert len(line) == length
    file.write_bytes(b'{"text": "before"}\n' + line + b'\n{"text": "after"}\n')
    documents, stats = read(file)
    fits = length < 100
    assert [text[:1] for _, text in documents] == (["b", "a", "a"] if fits else ["b", "a"])
    assert documents[-1] == (3, "after")
    assert stats.bad_lines == (0 if fits else 1)
    assert stats.examples == ([] if fits else [(2, "longer than 0 MiB")])


def test_a_long_first_line_behind_a_byte_order_mark_is_one_bad_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jsonl, "MAX_LINE_BYTES", 100)
    file = tmp_path / "long.jsonl"
    file.write_bytes(b"\xef\xbb\xbf" + b"a" * 150 + b'\n{"text": "after"}\n')
    documents, stats = read(file)
    assert documents == [(2, "after")]
    assert stats.examples == [(1, "longer than 0 MiB")]


def refused(path: Path) -> str:
    with pytest.raises(DataInvalid) as found:
        read(path)
    assert str(path) in str(found.value)
    return str(found.value)


def test_a_fifo_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    assert "is not a regular file" in refused(tmp_path / "fifo")


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    assert "is not a regular file" in refused(Path("/dev/zero"))
    assert "is not a regular file" in refused(Path("/dev/null"))
    assert "is not a regular file" in refused(tmp_path)
    assert "No such file or directory" in refused(tmp_path / "missing.jsonl")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    assert "cannot be read" in refused(tmp_path / "loop")


def test_a_file_without_permission_is_refused() -> None:
    with public_tmp_dir() as folder:
        file = folder / "secret.jsonl"
        file.write_text('{"text": "a"}\n')
        with drop_root():
            assert read(file)[1].documents == 1
        file.chmod(0)
        with drop_root():
            assert "Permission denied" in refused(file)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_other_encodings_are_refused_with_what_to_do(encoding: str, tmp_path: Path) -> None:
    file = tmp_path / "wide.jsonl"
    file.write_bytes('{"text": "wide"}\n'.encode(encoding) * 3)
    assert "save it as UTF-8" in refused(file)


@pytest.mark.parametrize("change", ["grow", "shrink", "touch"])
def test_a_file_that_changes_is_refused(change: str, tmp_path: Path) -> None:
    file = tmp_path / "changing.jsonl"
    file.write_bytes(b'{"text": "a"}\n' * 100)
    with open_reader(file) as reader:
        documents = reader.documents("text")
        next(documents)
        if change == "grow":
            with file.open("ab") as more:
                more.write(b'{"text": "b"}\n' * 100_000)
        elif change == "shrink":
            os.truncate(file, 5)
        else:
            os.utime(file, ns=(1, 1))
        with pytest.raises(DataInvalid, match="changed while it was read"):
            list(documents)
    assert reader.stats.documents <= 100


@settings(deadline=None)
@given(st.lists(st.text(min_size=1), max_size=20), st.sampled_from(["\n", "\r\n"]), st.booleans())
def test_any_text_comes_back(texts: list[str], newline: str, escaped: bool) -> None:
    # Text that is not Unicode cannot be in a UTF-8 file, escaped or not.
    texts = [text.encode(errors="replace").decode() for text in texts]
    file = Path(os.environ.get("TMPDIR", "/tmp")) / f"trainyard-lines-{os.getpid()}.jsonl"
    raw = "".join(json.dumps({"text": text}, ensure_ascii=escaped) + newline for text in texts).encode()
    file.write_bytes(raw)
    try:
        documents, stats = read(file)
    finally:
        file.unlink()
    assert [text for _, text in documents] == texts
    assert stats.bad_lines == 0


@settings(deadline=None)
@given(st.lists(st.binary(max_size=60), max_size=12))
def test_any_bytes_are_counted(pieces: list[bytes]) -> None:
    """Against a slow independent reader: each line is blank, bad or a document, and nothing else is raised."""
    raw = b"\n".join(pieces)
    file = Path(os.environ.get("TMPDIR", "/tmp")) / f"trainyard-bytes-{os.getpid()}.jsonl"
    file.write_bytes(raw)
    expected = raw.split(b"\n")[: -1 if raw.endswith(b"\n") or not raw else None]
    looks_wide = raw.startswith((b"\xff\xfe", b"\xfe\xff")) or raw.count(0) > len(raw) // 4
    try:
        if compression_of(raw) is not Compression.NONE:
            refused(file)
            return
        if looks_wide:
            assert "UTF-16 or binary" in refused(file)
            return
        documents, stats = read(file)
    finally:
        file.unlink()
    assert stats.lines == len(expected)
    assert stats.blank_lines + stats.bad_lines + stats.documents == len(expected)
    assert len(documents) == stats.documents
