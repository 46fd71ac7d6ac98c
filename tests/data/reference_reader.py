"""A second reader of corpora, with a JSON parser of its own: slow, and it shares no code with the first."""

import re
from dataclasses import dataclass, field
from typing import Any

NUMBER = re.compile(r"-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][-+]?[0-9]+)?")
ESCAPES = {'"': '"', "\\": "\\", "/": "/", "b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t"}
WORDS = {"true": True, "false": False, "null": None}
BOM, BLANK = b"\xef\xbb\xbf", b" \t\r\n"
SPACES, DIGITS, DEPTH = " \t\r\n", 4300, 900


class NoJson(Exception):
    """Not JSON, or more of it than is read."""


class Refused(Exception):
    """The whole file is no text."""


@dataclass
class Read:
    """(line, text) of each document, and what is none."""

    documents: list[tuple[int, str]] = field(default_factory=list)
    bad: list[int] = field(default_factory=list)
    lines: int = 0
    blank: int = 0


def read(data: bytes, *, plain: bool, limit: int) -> Read:
    """All of a file. A line of more than ``limit`` bytes, its end included, is bad. Raises Refused."""
    if data[:2] in (b"\xff\xfe", b"\xfe\xff") or 4 * data[:4096].count(b"\0") > len(data[:4096]):
        raise Refused
    found, split = Read(), data.split(b"\n")
    ended = [line + b"\n" for line in split[:-1]] + ([split[-1]] if split[-1] else [])
    lines = [line if len(line) < limit or (len(line) == limit and line.endswith(b"\n")) else None for line in ended]
    if lines and lines[0] is not None:
        lines[0] = lines[0].removeprefix(BOM)
    if plain and not data[:4096].removeprefix(BOM).lstrip(BLANK).startswith(b'{"'):
        _paragraphs(lines, found, limit)
    else:
        _objects(lines, found)
    return found


def _objects(lines: list[bytes | None], found: Read) -> None:
    for number, line in enumerate(lines, start=1):
        found.lines += 1
        if line is not None and not line.strip(BLANK):
            found.blank += 1
            continue
        text = _text_of(line) if line is not None else None
        if text is None:
            found.bad.append(number)
        else:
            found.documents.append((number, text))


def _text_of(line: bytes) -> str | None:
    try:
        value = parsed(line.decode("utf-8", "strict"))
        text = value.get("text") if isinstance(value, dict) else None
        if isinstance(text, str) and text and not any("\ud800" <= letter <= "\udfff" for letter in text):
            return text
    except (NoJson, UnicodeDecodeError):
        pass
    return None


def _paragraphs(lines: list[bytes | None], found: Read, limit: int) -> None:
    found.lines = len(lines)
    held: list[tuple[int, bytes]] = []
    for number, line in [*enumerate(lines, start=1), (0, b"")]:
        if line is None or line.strip(BLANK):
            held.append((number, line if line is not None else b"x" * limit))
            continue
        found.blank += number > 0
        if held:
            _add_paragraph(held[0][0], b"".join(part for _, part in held), found, limit)
        held = []


def _add_paragraph(first: int, joined: bytes, found: Read, limit: int) -> None:
    try:
        text = joined.decode("utf-8", "strict").replace("\r\n", "\n")
    except UnicodeDecodeError:
        found.bad.append(first)
        return
    if len(joined) >= limit:
        found.bad.append(first)
    else:
        found.documents.append((first, text[:-1] if text.endswith("\n") else text))


def parsed(text: str) -> Any:
    """The value of a JSON text, without recursion. Raises NoJson."""
    value, rest = _Parser(text).whole()
    if text[rest:].strip(SPACES):
        raise NoJson("more after it")
    return value


class _Parser:
    """One value at a time; open objects and arrays lie on a stack as (container, key or None)."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.at = 0

    def whole(self) -> tuple[Any, int]:
        stack: list[tuple[Any, Any]] = []
        while True:
            value, opened = self.value()
            if opened and not self.closes(value):
                stack.append((value, self.key() if isinstance(value, dict) else None))
                if len(stack) > DEPTH:
                    raise NoJson("too deep")
                continue
            while stack:
                container, key = stack.pop()
                if isinstance(container, dict):
                    container[key] = value
                else:
                    container.append(value)
                if self.take() == ",":
                    stack.append((container, self.key() if isinstance(container, dict) else None))
                    break
                if self.text[self.at - 1] != ("}" if isinstance(container, dict) else "]"):
                    raise NoJson("neither continues nor ends")
                value = container
            else:
                return value, self.at

    def take(self) -> str:
        """The next letter that is no space, which is passed."""
        while self.at < len(self.text) and self.text[self.at] in SPACES:
            self.at += 1
        if self.at == len(self.text):
            raise NoJson("ends too soon")
        self.at += 1
        return self.text[self.at - 1]

    def closes(self, container: Any) -> bool:
        """Whether it is empty; then its end is passed."""
        if self.take() == ("}" if isinstance(container, dict) else "]"):
            return True
        self.at -= 1
        return False

    def key(self) -> str:
        if self.take() != '"':
            raise NoJson("no key")
        found = self.string()
        if self.take() != ":":
            raise NoJson("no colon")
        return found

    def value(self) -> tuple[Any, bool]:
        """Return (value, whether it is a container of which only the start was read)."""
        letter = self.take()
        if letter in "{[":
            return ({} if letter == "{" else []), True
        if letter == '"':
            return self.string(), False
        self.at -= 1
        for word, meaning in WORDS.items():
            if self.text.startswith(word, self.at):
                self.at += len(word)
                return meaning, False
        return self.number(), False

    def number(self) -> float:
        match = NUMBER.match(self.text, self.at)
        if match is None:
            raise NoJson("nothing known")
        self.at = match.end()
        if match[2] is None and match[3] is None and len(match[1]) > DIGITS:
            raise NoJson("too many digits")
        return 0.0

    def string(self) -> str:
        """Behind its first quote. Halves of a surrogate pair that were escaped one after the other become one."""
        units: list[str] = []
        while (letter := self.letter()) != '"':
            if letter < " ":
                raise NoJson("a control character")
            units.append(self.escaped() if letter == "\\" else letter)
        joined = "".join(units)
        return re.sub("[\ud800-\udbff][\udc00-\udfff]", lambda pair: _joined(pair[0]), joined)

    def letter(self) -> str:
        if self.at == len(self.text):
            raise NoJson("a string without an end")
        self.at += 1
        return self.text[self.at - 1]

    def escaped(self) -> str:
        letter = self.letter()
        if letter != "u":
            if letter not in ESCAPES:
                raise NoJson("an unknown escape")
            return ESCAPES[letter]
        digits = self.text[self.at : self.at + 4]
        if not re.fullmatch("[0-9a-fA-F]{4}", digits):
            raise NoJson("no four digits")
        self.at += 4
        return chr(int(digits, 16))


def _joined(pair: str) -> str:
    return chr(0x10000 + ((ord(pair[0]) - 0xD800) << 10) + (ord(pair[1]) - 0xDC00))
