"""A corpus that every machine has: the docstrings of the standard library of its Python."""

import ast
import json
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

MIN_CHARACTERS = 40
SKIPPED_FOLDERS = frozenset({"site-packages", "dist-packages", "test"})
"""Folders of other packages, and of Python's own tests."""


def standard_library() -> Path:
    """Return the folder of the standard library of this Python."""
    return Path(sysconfig.get_path("stdlib"))


def docstrings(library: Path) -> Iterator[str]:
    """Yield every docstring of at least `MIN_CHARACTERS` characters, each text once, always in the same order.

    Modules are parsed, never imported. A file that cannot be parsed is skipped.
    """
    seen: set[str] = set()
    for path in sorted(library.rglob("*.py")):
        if SKIPPED_FOLDERS.isdisjoint(path.relative_to(library).parts):
            for text in _docstrings_of(path):
                if len(text) >= MIN_CHARACTERS and text not in seen:
                    seen.add(text)
                    yield text


def _docstrings_of(path: Path) -> Iterator[str]:
    try:
        with warnings.catch_warnings():
            # Old code has invalid escapes. They do not matter here.
            warnings.simplefilter("ignore")
            tree = ast.parse(path.read_bytes())
    except (OSError, SyntaxError, ValueError, RecursionError):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text:
                yield text.strip()


def write_corpus(file: Path, library: Path | None = None) -> int:
    """Write the docstrings as JSONL, one ``{"text": ...}`` a line, and return their number."""
    number = 0
    with file.open("w", encoding="utf-8") as out:
        for text in docstrings(library or standard_library()):
            out.write(json.dumps({"text": text.encode(errors="replace").decode()}, ensure_ascii=False) + "\n")
            number += 1
    return number
