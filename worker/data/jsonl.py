"""Parse JSONL lines into documents, and count and describe the bad lines."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NoReturn

from trainyard.contract.corpus_files import shown
from trainyard.contract.file_identity import MAX_NAME_LENGTH, MAX_NAMES
from trainyard.contract.json_lines import BadLineError, parse_json_line

MAX_LINE_BYTES = 8 << 20
"""A longer line is a bad line: a document is in memory together with its tokens."""

MAX_BAD_LINE_EXAMPLES = 20
"""How many bad lines are listed; all are counted."""

OTHER_FIELDS = ", which has "


class DataInvalid(ValueError):
    """The corpus cannot be trained on; the message names the file and lines, the reason, and what to do."""


@dataclass(frozen=True)
class Document:
    """The text of a document, and its line number from 1."""

    line: int
    text: str


@dataclass
class ParseStats:
    """Counts of the lines read so far. ``examples`` holds (line number, reason) of the first bad lines.

    ``special_tokens``: occurrences in the texts, in ``special_texts`` of them. ``added_tokens``: matched added tokens
    that are not special.
    """

    lines: int = 0
    blank_lines: int = 0
    bad_lines: int = 0
    documents: int = 0
    examples: list[tuple[int, str]] = field(default_factory=list)
    special_tokens: int = 0
    special_texts: int = 0
    added_tokens: int = 0

    def add_bad(self, line: int, reason: str) -> None:
        """Count a bad line, and keep it as an example if few were."""
        self.bad_lines += 1
        self.examples = sorted([*self.examples, (line, reason)])[:MAX_BAD_LINE_EXAMPLES]

    def with_encoding(self, found: "ParseStats") -> "ParseStats":
        """Return the counts with what was found when the texts were encoded.

        The bad lines of ``found`` are moved from the documents to the bad lines, and its tokens are added.
        """
        return ParseStats(
            lines=self.lines,
            blank_lines=self.blank_lines,
            bad_lines=self.bad_lines + found.bad_lines,
            documents=self.documents - found.bad_lines,
            examples=sorted([*self.examples, *found.examples])[:MAX_BAD_LINE_EXAMPLES],
            special_tokens=self.special_tokens + found.special_tokens,
            special_texts=self.special_texts + found.special_texts,
            added_tokens=self.added_tokens + found.added_tokens,
        )

    def add(self, other: "ParseStats") -> None:
        """Add the counts of another file."""
        self.lines += other.lines
        self.blank_lines += other.blank_lines
        self.bad_lines += other.bad_lines
        self.documents += other.documents
        self.special_tokens += other.special_tokens
        self.special_texts += other.special_texts
        self.added_tokens += other.added_tokens
        self.examples = [*self.examples, *other.examples][:MAX_BAD_LINE_EXAMPLES]

    def followed_by(self, more: "ParseStats") -> "ParseStats":
        """Return the counts of a file, of which ``more`` counts the next lines, from 1 again."""
        shifted = [(self.lines + line, reason) for line, reason in more.examples]
        total = replace(self)
        total.add(replace(more, examples=shifted))
        return total

    def describe_bad(self) -> str:
        """Return text such as ``5 bad lines: line 3: not JSON; lines 7 to 10: not UTF-8``."""
        groups: list[str] = []
        grouper = BadLineGrouper(groups.append)
        for line, reason in self.examples:
            grouper.add(line, reason)
        grouper.end()
        more = self.bad_lines - len(self.examples)
        noun = "bad line" if self.bad_lines == 1 else "bad lines"
        return f"{self.bad_lines:,} {noun}: {'; '.join(groups)}" + (f"; and {more:,} more" if more else "")

    def empty_reason(self, text_field: str) -> str:
        """Return why there is nothing to train on, and what to do."""
        needed = f'it needs one JSON object a line, such as {{"{text_field}": "..."}}'
        if not self.bad_lines:
            return f"holds no document: {needed}, or any text where its name ends in .txt"
        other_field = any(OTHER_FIELDS in reason for _, reason in self.examples)
        advice = "text_field says under which key the texts are" if other_field else needed
        return f"holds no text under {text_field!r}: {self.describe_bad()}. What to do: {advice}"


class BadLineGrouper:
    """Emits one message for consecutive lines that are bad for the same reason."""

    def __init__(self, emit: Callable[[str], object]) -> None:
        self._emit = emit
        self._first = self._last = 0
        self._reason = ""

    def add(self, line: int, reason: str) -> None:
        if (line, reason) != (self._last + 1, self._reason):
            self.end()
            self._first, self._reason = line, reason
        self._last = line

    def end(self) -> None:
        """Emit the last group."""
        if self._first:
            lines = f"line {self._first}" if self._first == self._last else f"lines {self._first} to {self._last}"
            self._emit(f"{lines}: {self._reason}")
        self._first = self._last = 0


@dataclass
class VerboseParseStats(ParseStats):
    """Counts that also report every bad line, without a limit."""

    grouper: BadLineGrouper = field(default_factory=lambda: BadLineGrouper(print), compare=False)

    def add_bad(self, line: int, reason: str) -> None:
        super().add_bad(line, reason)
        self.grouper.add(line, reason)


def require_unchanged(path: Path) -> NoReturn:
    """Raise DataInvalid for a file that changed while it was read."""
    raise DataInvalid(f"{shown(path)} changed while it was read: wait until it is complete, then start again")


def text_of(raw: bytes | None, text_field: str) -> str:
    """Return the text of one raw line, which is None if the line is too long. Raises BadLineError with the reason."""
    if raw is None:
        raise BadLineError(f"longer than {MAX_LINE_BYTES >> 20} MiB")
    value = parse_json_line(raw)
    if not isinstance(value, dict):
        raise BadLineError(f"not a JSON object but {_type_name(value)}")
    if text_field not in value:
        raise BadLineError(f"no {text_field!r} in the object{_other_text_fields(value)}")
    text = value[text_field]
    if not isinstance(text, str):
        raise BadLineError(f"{text_field!r} is not a string but {_type_name(text)}")
    if not text:
        raise BadLineError(f"{text_field!r} is empty")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise BadLineError(f"{text_field!r} holds a lone surrogate, which is no text") from None
    return text


def _other_text_fields(value: dict[str, Any]) -> str:
    names = [repr(name) for name, text in value.items() if isinstance(text, str) and name.isprintable()]
    short = [name for name in names if len(name) <= MAX_NAME_LENGTH][:MAX_NAMES]
    return f"{OTHER_FIELDS}{', '.join(short)}" if short else ""


def _type_name(value: object) -> str:
    names = {type(None): "null", bool: "a boolean", str: "a string", list: "a list", dict: "an object"}
    return names.get(type(value), "a number")
