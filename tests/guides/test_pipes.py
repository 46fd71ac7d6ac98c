"""Commands of the guides do not end a program that still writes."""

import re
from pathlib import Path

import pytest

from tests.guides.code_blocks import DOCS, GUIDES, blocks

READER = re.compile(r"(?<!\|)\|&?(?!\|)\s*(head|[ef]?grep)\b([^|;&\n]*)")
"""The program after a pipe, and its arguments."""

STOPS_GREP = re.compile(r"\s(-[a-zA-Z]*[qm]|--quiet|--silent|--max-count)")

WHY = (
    "the reader ends before the program that writes to it, which then fails with a broken pipe (exit code 141, or 23 of"
    " curl) whenever it is the slower of the two, and with it the block under `set -o pipefail`. Take a reader that"
    " reads all: `sed -n 1,3p` for `head -3`, `grep ... > /dev/null` for `grep -q`"
)


def early_readers(text: str) -> list[str]:
    """Return each pipe of a shell's commands into a program that stops to read before the end."""
    found = READER.finditer(text.replace("\\\n", " "))
    return [each[0].strip() for each in found if each[1] == "head" or STOPS_GREP.search(each[2])]


@pytest.mark.parametrize("page", [*GUIDES, DOCS.parent / "README.md"], ids=lambda page: page.stem)
def test_no_block_pipes_into_a_reader_that_ends_early(page: Path) -> None:
    found = {block.line: early_readers(block.text) for block in blocks(page) if block.language == "bash"}
    assert {f"{page.name}:{line}": pipes for line, pipes in found.items() if pipes} == {}, WHY


@pytest.mark.parametrize(
    ("text", "pipes"),
    [
        ("curl -sf $URL | head -3", ["| head -3"]),
        ("curl -sf $URL |head", ["|head"]),
        ("trainyard list \\\n  | grep -q running && echo yes", ["| grep -q running"]),
        ("trainyard list | grep -iq a | head -n 1", ["| grep -iq a", "| head -n 1"]),
        ("trainyard list |& grep --max-count=2 a", ["|& grep --max-count=2 a"]),
        ("trainyard list | grep -E 'a|-q' | sed -n 1,3p", []),
        ("test -e a || head -3 a; head -3 b", []),
        ("grep -q a b; trainyard list | grep -v header", []),
    ],
)
def test_which_pipes_are_found(text: str, pipes: list[str]) -> None:
    assert early_readers(text) == pipes
