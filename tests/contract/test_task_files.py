"""Task files: what a line may be, and how each bad one is named."""

import json
from pathlib import Path
from typing import Any

import pytest

from trainyard.contract.allowed_paths import OutsideRoots
from trainyard.contract.task_files import (
    MAX_LISTED_LINES,
    Example,
    TaskFileInvalid,
    TaskKind,
    describe_bad_lines,
    parse_examples,
    read_task_file,
)

CHOICE = {"context": "The sky is", "choices": [" blue", " red"], "answer": 0}
CONTINUATION = {"context": "The sky is", "continuation": " blue"}


def reasons(kind: TaskKind, *lines: object) -> list[tuple[int, str]]:
    content = b"\n".join(line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines)
    return parse_examples(content, kind)[1]


def test_lines_become_examples_with_their_numbers() -> None:
    content = b"\xef\xbb\xbf" + json.dumps({**CHOICE, "id": 7}).encode() + b"\r\n\n  \n" + json.dumps(CHOICE).encode()
    examples, bad = parse_examples(content, "choice")
    assert not bad
    assert examples == [Example(line, "The sky is", (" blue", " red"), 0) for line in (1, 4)]
    examples, bad = parse_examples(json.dumps({**CONTINUATION, "context": ""}).encode(), "continuation")
    assert not bad
    assert examples == [Example(1, "", (" blue",), 0)]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"context": None}, "'context' must be a string"),
        ({"choices": [" blue"]}, "'choices' must be a list of at least 2 strings"),
        ({"choices": "ab"}, "'choices' must be a list of at least 2 strings"),
        ({"choices": [" blue", 3]}, "'choices[1]' must be a string"),
        ({"choices": ["", " red"]}, "'choices[0]' is empty"),
        ({"answer": 2}, "'answer' must be an integer from 0 to 1, the index of the right choice"),
        ({"answer": -1}, "'answer' must be an integer from 0 to 1, the index of the right choice"),
        ({"answer": True}, "'answer' must be an integer from 0 to 1, the index of the right choice"),
        ({"answer": "0"}, "'answer' must be an integer from 0 to 1, the index of the right choice"),
        ({"context": "\ud800"}, "'context' holds a lone surrogate, which is no text"),
    ],
)
def test_bad_choices(change: dict[str, Any], reason: str) -> None:
    assert reasons("choice", CHOICE, {**CHOICE, **change}) == [(2, reason)]


def test_other_bad_lines() -> None:
    assert reasons("choice", CONTINUATION) == [
        (1, "has 'continuation' and no 'choices': kind must be \"continuation\"")
    ]
    assert reasons("continuation", CHOICE) == [(1, "has 'choices' and no 'continuation': kind must be \"choice\"")]
    assert reasons("continuation", {"context": ""}) == [(1, "'continuation' must be a string")]
    assert reasons("choice", b"{", b"\xff", [], b'{"answer": NaN}', b"[" * 100_000, b"1" * 5000) == [
        (1, "not JSON at character 2"),
        (2, "not UTF-8 at byte 1"),
        (3, "not a JSON object"),
        (4, "not JSON: holds NaN"),
        (5, "nested too deep"),
        (6, "holds a number with too many digits"),
    ]
    (one,) = reasons("choice", {})
    assert one == (1, "'context' must be a string, 'choices' must be a list of at least 2 strings")


def test_bad_lines_are_listed_and_counted() -> None:
    assert describe_bad_lines([(3, "not JSON")]) == "has 1 bad line: line 3: not JSON"
    text = describe_bad_lines([(line, "x") for line in range(1, MAX_LISTED_LINES + 6)])
    assert text.startswith("has 25 bad lines: line 1: x; line 2: x; ")
    assert text.endswith("line 20: x; and 5 more")


def test_a_file_is_read_below_its_roots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inside = tmp_path / "data"
    inside.mkdir()
    file = inside / "facts.jsonl"
    file.write_text(json.dumps(CHOICE))
    assert len(read_task_file(file, "choice", [inside]).examples) == 1
    with pytest.raises(OutsideRoots):
        read_task_file(file, "choice", [tmp_path / "other"])
    with pytest.raises(OSError, match="regular file"):
        read_task_file(inside, "choice")
    file.write_text("\n")
    with pytest.raises(TaskFileInvalid, match="holds no example"):
        read_task_file(file, "choice")
    monkeypatch.setattr("trainyard.contract.task_files.MAX_TASK_BYTES", 1 << 20)
    file.write_bytes(b" " * ((1 << 20) + 1))
    with pytest.raises(TaskFileInvalid, match="is larger than 1 MiB"):
        read_task_file(file, "choice")
