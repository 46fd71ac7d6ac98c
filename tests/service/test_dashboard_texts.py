"""The dashboard's translation: every text of the pages has an entry, no entry is unused, placeholders agree."""

import json
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import pytest

from trainyard.service.dashboard.assets import STATIC

ZH = STATIC / "i18n" / "zh.json"
SCRIPTS = [path for path in sorted(STATIC.rglob("*.js")) if path.name != "i18n.js"]

STRING = r'"(?:[^"\\\n]|\\.)*"'
CALL = re.compile(r"(?<![\w.$])(t|tn|tNodes)\(")
ONE_TEXT = re.compile(rf"\s*({STRING})\s*[,)]")
TWO_TEXTS = re.compile(rf"[^\"`']*?,\s*({STRING}),\s*({STRING})\s*[,)]")
PLACEHOLDER = re.compile(r"\{(\w+)\}")
CHINESE = re.compile(r"[\u4e00-\u9fff]")

ENGLISH = re.compile(r"[A-Za-z]{2,}[,:]? [A-Za-z]|^\W*[A-Z][a-z]+\b")
"""What reads like a text: two words, or a capitalized one."""


def calls(source: str) -> Iterator[tuple[str, list[int], list[str], str]]:
    """Yield each call of a translating function: its name, offsets of the literals, their texts, and the code after.

    Fails if a text is not a literal.
    """
    for call in CALL.finditer(source):
        name, end = call.group(1), call.end()
        match = (TWO_TEXTS if name == "tn" else ONE_TEXT).match(source, end)
        assert match is not None, f"the text of a call is not a literal: {source[call.start() : end + 80]}"
        places = range(1, 1 + len(match.groups()))
        texts = [json.loads(match[i]) for i in places]
        yield name, [match.start(i) for i in places], texts, source[match.end() - 1 : match.end() + 600]


class Texts(HTMLParser):
    """Collects the texts of index.html: those that are translated, and all."""

    def __init__(self) -> None:
        super().__init__()
        self.marked: set[str] = set()
        self.all: set[str] = set()
        self._tags: list[tuple[str, bool]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        names = dict(attrs)
        for name in ("aria-label", "title", "placeholder"):
            if names.get(name):
                self.all.add(str(names[name]))
        if "data-i18n-label" in names:
            self.marked.add(str(names["aria-label"]))
        if tag not in ("meta", "link"):
            self._tags.append((tag, "data-i18n" in names))

    def handle_endtag(self, tag: str) -> None:
        while self._tags and self._tags.pop()[0] != tag:
            pass

    def handle_data(self, data: str) -> None:
        if not re.search("[a-z]{2}", data) or "{{" in data or any(tag == "noscript" for tag, _ in self._tags):
            return
        self.all.add(data.strip())
        if self._tags and self._tags[-1][1]:
            self.marked.add(data)


def english_texts() -> dict[str, str]:
    """Return every English text and the file that shows it."""
    found = {
        text: str(path.relative_to(STATIC))
        for path in SCRIPTS
        for _, _, texts, _ in calls(path.read_text())
        for text in texts
    }
    page = Texts()
    page.feed((STATIC / "index.html").read_text())
    return found | dict.fromkeys(page.marked, "index.html")


@pytest.fixture(scope="module")
def chinese() -> dict[str, str]:
    def no_duplicates(pairs: list[tuple[str, str]]) -> dict[str, str]:
        names = [name for name, _ in pairs]
        assert len(names) == len(set(names)), sorted(name for name in names if names.count(name) > 1)
        return dict(pairs)

    made: dict[str, str] = json.loads(ZH.read_text(), object_pairs_hook=no_duplicates)
    return made


def test_every_text_has_a_translation_and_no_translation_is_unused(chinese: dict[str, str]) -> None:
    texts = english_texts()
    assert len(texts) > 300
    missing = {text: file for text, file in texts.items() if text not in chinese}
    assert missing == {}, f"add these to {ZH.name}"
    assert sorted(set(chinese) - set(texts)) == [], f"no page shows these any more: remove them from {ZH.name}"


def test_translations_are_chinese_and_have_the_same_placeholders(chinese: dict[str, str]) -> None:
    for english, text in chinese.items():
        assert sorted(PLACEHOLDER.findall(english)) == sorted(PLACEHOLDER.findall(text)), english
        assert text, english
        # Words without a Chinese form, such as MFU, have none.
        if re.search("[a-z]{4}", PLACEHOLDER.sub("", english)) and english == text:
            assert english in SAME, f"{english}: not translated"


SAME = frozenset({"key=value", "python"})
"""Texts that Chinese readers write in the same way."""


def test_every_placeholder_gets_a_value() -> None:
    for path in SCRIPTS:
        for function, _, texts, rest in calls(path.read_text()):
            needed = {name for text in texts for name in PLACEHOLDER.findall(text)} - (
                {"n"} if function == "tn" else set()
            )
            if needed and not re.match(r",\s*\w+\)", rest):  # Values in a variable are not followed.
                assert rest.startswith(", {"), f"{path.name}: {texts} has no values"
                missing = {name for name in needed if not re.search(rf"[{{,]\s*(\.\.\.\w+, )?{name}\b", rest)}
                assert not missing or "..." in rest[:20], f"{path.name}: {texts} has no value for {missing}"


TOKEN = re.compile(
    rf"(?P<space>\s+|//[^\n]*|/\*.*?\*/)|(?P<text>{STRING}|'(?:[^'\\\n]|\\.)*')|(?P<template>`)|(?P<word>[\w$]+)|(?P<sign>.)",
    re.DOTALL,
)
REGEX = re.compile(r"/(?:[^/\\\[\n]|\\.|\[(?:[^\]\\\n]|\\.)*\])+/[a-z]*")
BEFORE_REGEX = frozenset("(,=:[!&|?{};>") | {"return"}
"""After one of these, a slash begins a regular expression; after all others, it divides."""


class Literals:
    """The strings and templates of a script by their offset; `…` is for a value in a template."""

    def __init__(self, source: str) -> None:
        self.source = source
        self.found: dict[int, str] = {}
        assert self._code(0) == len(source)

    def _code(self, start: int) -> int:
        """Read to the brace that closes, or to the end; return the offset after it."""
        depth, before, at = 0, "(", start
        while at < len(self.source):
            match = TOKEN.match(self.source, at)
            assert match is not None
            token, kind = match.group(), match.lastgroup
            at = self._end(match, token, before)
            depth += {"{": 1, "}": -1}.get(token, 0)
            if depth < 0:
                return at
            before = before if kind == "space" else token
        return at

    def _end(self, match: re.Match[str], token: str, before: str) -> int:
        """Keep a text; return where the token ends."""
        if match["text"]:
            self.found[match.start()] = token[1:-1]
        if match["template"]:
            return self._template(match.start())
        if token == "/" and before in BEFORE_REGEX:
            whole = REGEX.match(self.source, match.start())
            assert whole is not None, self.source[match.start() : match.end() + 60]
            return whole.end()
        return match.end()

    def _template(self, start: int) -> int:
        text, at = "", start + 1
        while self.source[at] != "`":
            if self.source.startswith("${", at):
                text, at = text + "…", self._code(at + 2)
            else:
                step = 2 if self.source[at] == "\\" else 1
                text, at = text + self.source[at : at + step], at + step
        self.found[start] = text
        return at + 1


def bare_texts(source: str) -> list[str]:
    """Return the literals that read like English and are in no call of a translating function."""
    translated = {at for _, starts, _, _ in calls(source) for at in starts}
    return [
        text
        for at, text in Literals(source).found.items()
        if ENGLISH.search(text)
        and at not in translated
        and not source[:at].endswith(NOT_SHOWN)
        and text not in NOT_TEXTS
    ]


NOT_SHOWN = ("class: ", "from ")
NOT_TEXTS = frozenset(
    {
        *("Escape", "Enter", "Delete"),
        *("Content-Type", "Idempotency-Key", "Last-Event-ID", "Authorization: Bearer $TRAINYARD_TOKEN", "Bearer …"),
        *("Error", "Notification", "no value", "resume with", "data:image/svg+xml;charset=utf-8,…"),
        *("num narrow", "sentence error", "line highlighted", "editable long", "top center", "system-ui, sans-serif"),
        *("#nav a", "#main input[type=search]", "textarea, select, [contenteditable]", "(prefers-color-scheme: dark)"),
        *("Hugging Face", "… · Trainyard", "True", "False", "None"),
        *("trainyard demo", "trainyard submit --data_path corpus.jsonl --watch", "trainyard corpus build PATH"),
        *('-H "Authorization: Bearer $TRAINYARD_TOKEN" ', r"trainyard submit - <<'…'\n…\n…"),
        (
            r"from trainyard import Client\n\nspec = …\n\n"
            r'with Client("…") as client:\n    job = client.submit(spec)\n    print(job["id"])'
        ),
    }
)
"""Keys, headers, styles, selectors, products, commands and code: the same in every language."""


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_no_text_is_left_out_of_the_translation(script: Path) -> None:
    """A new text that is not in a call of `t` fails here. Add it to the call, and its translation to zh.json."""
    assert bare_texts(script.read_text()) == []


def test_the_texts_of_the_html_page_are_marked() -> None:
    page = Texts()
    page.feed((STATIC / "index.html").read_text())
    assert page.all - page.marked == {"Trainyard"}


def test_the_search_for_texts_finds_them() -> None:
    source = """
      // "A comment" says nothing.
      const shown = t("Known text {n}", { n: `${count(n)}` });
      const other = h("p", { class: "a b c" }, "A bare text", /"[^/"]+"/.test(x) ? "two words" : `Of ${t("Inside")}`);
      tn(a.b(c), "one", "several", { n });
    """
    assert [texts for _, _, texts, _ in calls(source)] == [["Known text {n}"], ["Inside"], ["one", "several"]]
    assert bare_texts(source) == ["A bare text", "two words", "Of …"]
