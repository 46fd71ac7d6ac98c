"""The code blocks of a page, and how each is to be run.

A comment before a block says how, where it is not the usual way: ``<!-- run: HOW -->``.
"""

import re
from dataclasses import dataclass
from pathlib import Path

DOCS = Path(__file__).parents[2] / "docs"
GUIDES = [*sorted((DOCS / "guides").glob("*.md")), DOCS / "agents" / "SKILL.md"]

BLOCK = re.compile(r"(?:<!-- run: (?P<how>[^\n]*?) -->\n)?```(?P<language>[a-z]*)\n(?P<text>.*?)\n```", re.DOTALL)

SERVED = "served"
"""A service answers. The usual way."""

STOPPED = "stopped"
"""No service has the home open; ``trainyard serve`` is run until it is ready, and ended."""

POSTGRES = "postgres"
"""As `STOPPED`, and the environment names a Postgres server."""

REFUSED = "refused"
"""The last command is refused."""

NOT_HERE = "not here"
"""Begins a reason why no test runs it."""


@dataclass(frozen=True)
class Block:
    """``how`` is one of the words above, or begins with `NOT_HERE`; ``line`` is that of the fence."""

    page: str
    line: int
    language: str
    how: str
    text: str


def blocks(page: Path) -> list[Block]:
    """Every fenced block of a page, in order."""
    content = page.read_text()
    return [
        Block(
            page=page.name,
            line=content.count("\n", 0, found.start("language")) + 1,
            language=found["language"],
            how=found["how"] or SERVED,
            text=found["text"],
        )
        for found in BLOCK.finditer(content)
    ]


def runnable(page: Path) -> list[Block]:
    """The blocks that are commands or programs."""
    return [block for block in blocks(page) if block.language in ("bash", "python")]
