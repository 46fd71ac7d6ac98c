"""Conventions that ruff has no rule for."""

from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
SOURCE = ("contract", "model", "worker", "service", "client")


def files(*folders: str) -> Iterator[Path]:
    for folder in folders:
        yield from sorted((ROOT / folder).rglob("*.py"))


def test_package_init_files_are_empty() -> None:
    assert [str(file) for file in files(*SOURCE) if file.name == "__init__.py" and file.read_text()] == []


def test_no_module_for_leftovers() -> None:
    names = {file.name for file in files(*SOURCE)}
    assert not names & {"utils.py", "helpers.py", "common.py", "misc.py"}
