"""The dashboard's translation is complete: every text of the pages has an entry, no entry is unused, placeholders agree."""

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

ENGLISH = re.compile(r"[A-Za-z]{2,}[ ,:]+[A-Za-z]|^\W*[A-Z][a-z]+\b")
"""What reads like a text: two words, or a capitalized one."""

NAMES = frozenset(
    """
    Accept Authorization Command Content-Type Idempotency-Key Last-Event-ID AbortError TypeError Error Escape Enter Delete Home End Hugging MiniMind Python
    ArrowDown ArrowUp ArrowLeft ArrowRight Trainyard
    """.split()
)
"""Capitalized words that no page shows as its own text: headers, keys, error names, products."""


def calls(source: str) -> Iterator[tuple[int, list[str], str]]:
    """Yield offset, English texts and the rest of the line of each call of a translating function. Fails if a text is not a literal."""
    for call in CALL.finditer(source):
        name, end = call.group(1), call.end()
        match = (TWO_TEXTS if name == "tn" else ONE_TEXT).match(source, end)
        assert match is not None, f"the text of a call is not a literal: {source[call.start() : end + 80]}"
        yield call.start(), [json.loads(text) for text in match.groups()], source[match.end() : match.end() + 600]


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
        if not re.search("[a-z]{2}", data) or any(tag == "noscript" for tag, _ in self._tags):
            return
        self.all.add(data.strip())
        if self._tags and self._tags[-1][1]:
            self.marked.add(data)


def english_texts() -> dict[str, str]:
    """Return every English text and the file that shows it."""
    found = {
        text: str(path.relative_to(STATIC))
        for path in SCRIPTS
        for _, texts, _ in calls(path.read_text())
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
        assert (english[0] == " ") <= (text[0] in " （，"), f"{english}: it follows another text"


SAME = frozenset({"key=value", "python"})
"""Texts that Chinese readers write in the same way."""


def test_every_placeholder_gets_a_value() -> None:
    for path in SCRIPTS:
        for _, texts, rest in calls(path.read_text()):
            for name in {name for text in texts for name in PLACEHOLDER.findall(text)}:
                # `n` of tn() is the number; values kept in a variable are not followed.
                given = re.search(rf"\b{name}\b", rest) or (len(texts) == 2 and name == "n") or re.match(r"\s*[a-z]\w*\)", rest)
                assert given, f"{path.name}: {texts} needs {name}"


def strip_comments(source: str) -> str:
    """Replace comments by spaces; a `//` inside a text stays."""
    pattern = re.compile(rf"{STRING}|/\*.*?\*/|(?<![:\\\"'`])//[^\n]*", re.DOTALL)
    return pattern.sub(lambda match: match.group() if match.group().startswith('"') else " " * len(match.group()), source)


def untranslated(source: str) -> list[str]:
    """Return the literals that read like English and are in no call of a translating function."""
    source = strip_comments(source)
    translated = {text for _, texts, _ in calls(source) for text in texts}
    bare = [match.group(1) for match in re.finditer(r'(?<!class: )"((?:[^"\\\n]|\\.)*)"', CALL_TEXTS.sub("", source))]
    templates = [re.sub(r"\$\{[^}]*\}", "…", text) for text in re.findall(r"(?<!class: )`([^`]*)`", source)]
    found = [text for text in (*bare, *templates) if ENGLISH.search(text) and text not in translated]
    return [text for text in found if not set(re.findall(r"[A-Z][a-z]+(?:-[A-Z][a-z]+)*|[a-z]{3,}", text)) <= NAMES]


CALL_TEXTS = re.compile(rf"(?<![\w.$])(?:t|tNodes)\(\s*{STRING}|(?<![\w.$])tn\([^\"`']*?,\s*{STRING},\s*{STRING}")
