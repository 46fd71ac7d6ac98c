"""The pages of the documentation as Markdown, and their index in the format of llms.txt."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from importlib.resources.abc import Traversable

SECTIONS = {
    "guides": "Guides",
    "agents": "Agents",
    "reference": "Reference",
    "": "Design",
    "decisions": "Decisions",
}
"""Folder -> title of its section, in the order of the index."""

INTRODUCTION = """\
# Trainyard

> Trainyard pretrains language models over REST: POST a job spec, and watch, pause and resume the run exactly.

Agents call tools: `POST /mcp` of the service (Model Context Protocol), or `trainyard mcp` over stdio.
All fields of a job spec are in [reference/spec](/docs/reference/spec.md). The OpenAPI document is at
[/openapi.json](/openapi.json)."""
MAX_DESCRIPTION = 200
MARK = r"^\*\*[^*]+\*\*$|^\*\*Decided\.\*\*\s*"


@dataclass(frozen=True)
class DocumentationPage:
    """A page. ``name``: its path without ``.md``. ``description``: the first sentence, as plain text."""

    name: str
    title: str
    description: str
    text: str


@cache
def pages() -> Mapping[str, DocumentationPage]:
    """Return all pages by their name, in the order of the index."""
    found = [_page(name, text) for name, text in _texts(files("trainyard") / "docs")]
    order = list(SECTIONS)
    return {page.name: page for page in sorted(found, key=lambda page: (order.index(_folder(page.name)), page.name))}


@cache
def index() -> str:
    """Return the index of all pages, in the format of https://llmstxt.org."""
    lines = [INTRODUCTION]
    for folder, title in SECTIONS.items():
        lines += ["", f"## {title}", ""]
        for page in pages().values():
            if _folder(page.name) == folder:
                lines.append(
                    f"- [{page.title}](/docs/{page.name}.md)" + f": {page.description}" * bool(page.description)
                )
    return "\n".join([*lines, ""])


def _texts(folder: Traversable, prefix: str = "") -> Iterable[tuple[str, str]]:
    for entry in sorted(folder.iterdir(), key=lambda entry: entry.name):
        if entry.is_dir():
            yield from _texts(entry, f"{prefix}{entry.name}/")
        elif entry.name.endswith(".md"):
            yield prefix + entry.name.removesuffix(".md"), entry.read_text(encoding="utf-8")


def _page(name: str, text: str) -> DocumentationPage:
    body = re.sub(r"\A---\n.*?\n---\n", "", text, flags=re.DOTALL)
    heading = re.search(r"^# (.+)$", body, re.MULTILINE)
    # Markdown paragraphs are separated by blank lines; one that begins with a letter is text. The bold marks of the
    # decisions, such as "Decided" and "Why", describe nothing.
    paragraphs = (re.sub(MARK, "", part.strip()) for part in re.split(r"\n\s*\n", body))
    first = next((part for part in paragraphs if re.match(r"(?!```)[A-Za-z`*]", part)), "")
    return DocumentationPage(name, _plain(heading[1]) if heading else name, _first_sentence(_plain(first)), text)


def _plain(markdown: str) -> str:
    without_links = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", " ".join(markdown.split()))
    return without_links.replace("**", "").replace("`", "")


def _first_sentence(text: str) -> str:
    sentence = re.split(r"(?<=[.!?:])\s", text, maxsplit=1)[0].rstrip(":")
    return sentence if len(sentence) <= MAX_DESCRIPTION else sentence[: MAX_DESCRIPTION - 3].rstrip() + "..."


def _folder(name: str) -> str:
    return name.rpartition("/")[0]
