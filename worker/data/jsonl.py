"""Lines of a corpus: which are documents, which are not and why."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from trainyard.contract.file_identity import MAX_NAME_LENGTH, MAX_NAMES

MAX_LINE_BYTES = 8 << 20
"""A longer line is a bad line: one document is held in memory together with its tokens."""

MAX_BAD_LINE_EXAMPLES = 20
"""How many bad lines are named; all are counted."""


TEXT_FIELD_HINTS = ", which has "


class DataInvalid(ValueError):
    """The corpus cannot be trained on; the message says which file and lines, why, and what to do."""


class BadLineError(ValueError):
    """One line is no document; the message says why."""


@dataclass(frozen=True)
class Document:
    """The text of one line, which counts from 1."""

    line: int
    text: str


@dataclass
class ParseStats:
    """What was found so far. ``named`` holds (line number, why) of the first bad lines."""

    lines: int = 0
    blank_lines: int = 0
    bad_lines: int = 0
    documents: int = 0
    examples: list[tuple[int, str]] = field(default_factory=list)

    def add_bad(self, line: int, why: str) -> None:
        """Count a bad line, and name it if few were."""
        self.bad_lines += 1
        self.examples = sorted([*self.examples, (line, why)])[:MAX_BAD_LINE_EXAMPLES]

    def minus(self, found: "ParseStats") -> "ParseStats":
        """The counts where the documents that ``found`` calls bad are none."""
        return ParseStats(
            lines=self.lines,
            blank_lines=self.blank_lines,
            bad_lines=self.bad_lines + found.bad_lines,
            documents=self.documents - found.bad_lines,
            examples=sorted([*self.examples, *found.examples])[:MAX_BAD_LINE_EXAMPLES],
        )

    def describe_bad(self) -> str:
        """``5 bad lines: line 3: not JSON; lines 7 to 10: not UTF-8``."""
        said: list[str] = []
        runs = BadLineGrouper(said.append)
        for line, why in self.examples:
            runs.add(line, why)
        runs.end()
        listed = "; ".join(said)
        more = self.bad_lines - len(self.examples)
        noun = "bad line" if self.bad_lines == 1 else "bad lines"
        return f"{self.bad_lines:,} {noun}: {listed}" + (f"; and {more:,} more" if more else "")

    def empty_reason(self, text_field: str) -> str:
        """Why there is nothing to train on, and what to do."""
        needed = f'it needs one JSON object a line, such as {{"{text_field}": "..."}}'
        if not self.bad_lines:
            return f"holds no document: {needed}, or any text where its name ends in .txt"
        elsewhere = any(TEXT_FIELD_HINTS in why for _, why in self.examples)
        advice = "text_field says under which key the texts are" if elsewhere else needed
        return f"holds no text under {text_field!r}: {self.describe_bad()}. What to do: {advice}"


class BadLineGrouper:
    """Says bad lines as they are found, those that follow each other and are bad for one reason together."""

    def __init__(self, say: Callable[[str], object]) -> None:
        self._say = say
        self._first = self._last = 0
        self._why = ""

    def add(self, line: int, why: str) -> None:
        """One more."""
        if (line, why) != (self._last + 1, self._why):
            self.end()
            self._first, self._why = line, why
        self._last = line

    def end(self) -> None:
        """No more."""
        if self._first:
            which = f"line {self._first}" if self._first == self._last else f"lines {self._first} to {self._last}"
            self._say(f"{which}: {self._why}")
        self._first = self._last = 0


@dataclass
class VerboseParseStats(ParseStats):
    """A tally that says every bad line, however many there are."""

    runs: BadLineGrouper = field(default_factory=lambda: BadLineGrouper(print), compare=False)

    def add_bad(self, line: int, why: str) -> None:
        """Count it, and say it."""
        super().add_bad(line, why)
        self.runs.add(line, why)


def require_unchanged(path: Path) -> NoReturn:
    """Raise the DataInvalid of a file that is still being written."""
    raise DataInvalid(f"{path} changed while it was read: wait until it is complete, then start again")


def text_of(raw: bytes | None, text_field: str) -> str:
    """The text of one raw line. Raises BadLine with the reason."""
    if raw is None:
        raise BadLineError(f"longer than {MAX_LINE_BYTES >> 20} MiB")
    value = _parsed(raw)
    if not isinstance(value, dict):
        raise BadLineError(f"not a JSON object but {_kind(value)}")
    if text_field not in value:
        raise BadLineError(f"no {text_field!r} in the object{_instead(value)}")
    text = value[text_field]
    if not isinstance(text, str):
        raise BadLineError(f"{text_field!r} is not a string but {_kind(text)}")
    if not text:
        raise BadLineError(f"{text_field!r} is empty")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise BadLineError(f"{text_field!r} holds a lone surrogate, which is no text") from None
    return text


def _parsed(raw: bytes) -> Any:
    try:
        return json.loads(raw.decode(), parse_constant=_no_constant)
    except UnicodeDecodeError as error:
        raise BadLineError(f"not UTF-8 at byte {error.start + 1}") from None
    except json.JSONDecodeError as error:
        raise BadLineError(f"not JSON at character {error.pos + 1}") from None
    except RecursionError:
        raise BadLineError("nested too deep") from None
    except BadLineError:
        raise
    except ValueError:
        # Python reads no integer of more than 4,300 digits.
        raise BadLineError("holds a number with too many digits") from None


def _instead(value: dict[str, Any]) -> str:
    """The names under which the object has texts, of which one may be the one that was meant."""
    names = [repr(name) for name, text in value.items() if isinstance(text, str) and name.isprintable()]
    short = [name for name in names if len(name) <= MAX_NAME_LENGTH][:MAX_NAMES]
    return f"{TEXT_FIELD_HINTS}{', '.join(short)}" if short else ""


def _no_constant(name: str) -> NoReturn:
    raise BadLineError(f"not JSON: holds {name}")


def _kind(value: object) -> str:
    names = {type(None): "null", bool: "a boolean", str: "a string", list: "a list", dict: "an object"}
    return names.get(type(value), "a number")
