"""Conventions that ruff has no rule for."""

import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
SOURCE = ("contract", "model", "worker", "service", "client", "mcp_tools")


def files(*folders: str) -> Iterator[Path]:
    for folder in folders:
        yield from sorted((ROOT / folder).rglob("*.py"))


def test_package_init_files_are_empty() -> None:
    assert [str(file) for file in files(*SOURCE) if file.name == "__init__.py" and file.read_text()] == []


def test_no_module_for_leftovers() -> None:
    names = {file.name for file in files(*SOURCE)}
    assert not names & {"utils.py", "helpers.py", "common.py", "misc.py"}


def test_a_class_name_has_one_meaning() -> None:
    """`grep "^class NAME"` gives one hit, or one on each side of the API: client beside service or contract."""
    homes: defaultdict[str, list[str]] = defaultdict(list)
    for file in files(*SOURCE):
        for name in re.findall(r"^class (\w+)", file.read_text(), re.MULTILINE):
            homes[name].append(file.relative_to(ROOT).parts[0])
    assert len(homes) > 400
    sides = (["client", "service"], ["client", "contract"])
    assert {name: found for name, found in homes.items() if len(found) > 1 and sorted(found) not in sides} == {}
