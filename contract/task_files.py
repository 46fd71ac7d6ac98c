"""Task files: JSONL with one example per line, on which a model is scored. Standard library only.

``choice``: {"context": str, "choices": [str, ...], "answer": int}. ``continuation``: {"context": str, "continuation":
str}. Other keys and blank lines are ignored.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from trainyard.contract.allowed_paths import open_regular_inside
from trainyard.contract.file_identity import BOM
from trainyard.contract.json_lines import BadLineError, parse_json_line

TaskKind = Literal["choice", "continuation"]

MAX_TASK_BYTES = 64 << 20
MAX_LISTED_LINES = 20


class TaskFileInvalid(ValueError):
    """The file cannot be used. ``reason`` continues a sentence that begins with the path; the message has both."""

    def __init__(self, path: str | Path, reason: str) -> None:
        super().__init__(f"{path} {reason}")
        self.reason = reason


@dataclass(frozen=True)
class Example:
    """One example. ``texts``: what is scored after ``context``: the choices, or the continuation alone.

    ``answer``: the index of the right text. ``line``: its number in the file, from 1.
    """

    line: int
    context: str
    texts: tuple[str, ...]
    answer: int = 0


@dataclass(frozen=True)
class TaskFile:
    """The examples of a file, and the sha256 of its content."""

    examples: tuple[Example, ...]
    sha256: str


def read_task_file(path: str | Path, kind: TaskKind, roots: Sequence[Path] = ()) -> TaskFile:
    """Read a file below one of ``roots``, or anywhere without roots.

    Raises TaskFileInvalid, which lists the bad lines, and OSError and OutsideRoots as `open_regular_inside` does.
    """
    with open_regular_inside(path, roots) as file:
        content = _read_all(file, MAX_TASK_BYTES + 1)
    if len(content) > MAX_TASK_BYTES:
        raise TaskFileInvalid(path, f"is larger than {MAX_TASK_BYTES >> 20} MiB")
    examples, bad = parse_examples(content, kind)
    if bad:
        raise TaskFileInvalid(path, describe_bad_lines(bad))
    if not examples:
        raise TaskFileInvalid(path, "holds no example: a task file has one JSON object per line")
    return TaskFile(tuple(examples), hashlib.sha256(content).hexdigest())


def _read_all(file: Any, limit: int) -> bytes:
    parts: list[bytes] = []
    while limit > 0 and (part := file.read(min(limit, 1 << 20))):
        parts.append(part)
        limit -= len(part)
    return b"".join(parts)


def parse_examples(content: bytes, kind: TaskKind) -> tuple[list[Example], list[tuple[int, str]]]:
    """Return the examples, and (line number, reason) of each bad line."""
    examples: list[Example] = []
    bad: list[tuple[int, str]] = []
    for line, raw in enumerate(content.removeprefix(BOM).split(b"\n"), start=1):
        if not raw.strip():
            continue
        try:
            value = _parse_object(raw)
            examples.append(_choice(line, value) if kind == "choice" else _continuation(line, value))
        except BadLineError as error:
            bad.append((line, str(error)))
    return examples, bad


def describe_bad_lines(bad: Sequence[tuple[int, str]]) -> str:
    """Return text such as ``has 2 bad lines: line 3: not JSON; line 7: no 'context'``."""
    listed = "; ".join(f"line {line}: {reason}" for line, reason in bad[:MAX_LISTED_LINES])
    more = f"; and {len(bad) - MAX_LISTED_LINES:,} more" if len(bad) > MAX_LISTED_LINES else ""
    return f"has {len(bad):,} bad line{'s' if len(bad) != 1 else ''}: {listed}{more}"


def _parse_object(raw: bytes) -> dict[str, Any]:
    value = parse_json_line(raw)
    if not isinstance(value, dict):
        raise BadLineError("not a JSON object")
    return value


def _choice(line: int, value: dict[str, Any]) -> Example:
    if "choices" not in value and "continuation" in value:
        raise BadLineError("has 'continuation' and no 'choices': kind must be \"continuation\"")
    problems = list(_context_problems(value))
    choices, answer = value.get("choices"), value.get("answer")
    if not isinstance(choices, list) or len(choices) < 2:
        problems.append("'choices' must be a list of at least 2 strings")
    else:
        problems += [problem for i, text in enumerate(choices) for problem in _text_problems(f"choices[{i}]", text)]
        if type(answer) is not int or not 0 <= answer < len(choices):
            problems.append(f"'answer' must be an integer from 0 to {len(choices) - 1}, the index of the right choice")
    if problems:
        raise BadLineError(", ".join(problems[:MAX_LISTED_LINES]))
    assert isinstance(choices, list) and isinstance(answer, int)  # noqa: PT018 - for mypy; checked above
    return Example(line, value["context"], tuple(choices), answer)


def _continuation(line: int, value: dict[str, Any]) -> Example:
    if "continuation" not in value and "choices" in value:
        raise BadLineError("has 'choices' and no 'continuation': kind must be \"choice\"")
    problems = [*_context_problems(value), *_text_problems("continuation", value.get("continuation"))]
    if problems:
        raise BadLineError(", ".join(problems))
    return Example(line, value["context"], (value["continuation"],))


def _context_problems(value: dict[str, Any]) -> Iterator[str]:
    # An empty context is fine: the text is then scored as the beginning of a document.
    yield from _text_problems("context", value.get("context"), may_be_empty=True)


def _text_problems(name: str, text: Any, *, may_be_empty: bool = False) -> Iterator[str]:
    if not isinstance(text, str):
        yield f"{name!r} must be a string"
    elif not text and not may_be_empty:
        yield f"{name!r} is empty"
    else:
        try:
            text.encode()
        except UnicodeEncodeError:
            yield f"{name!r} holds a lone surrogate, which is no text"
