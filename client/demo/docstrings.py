"""A corpus that every machine has: the docstrings of the installed Python's own standard library."""

import ast
import json
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

LEAST_CHARACTERS = 40
NOT_THE_LIBRARY = frozenset({"site-packages", "dist-packages", "test"})
"""Folders that hold other people's packages, and Python's own tests."""


def standard_library() -> Path:
    """Where the standard library of this Python is."""
    return Path(sysconfig.get_path("stdlib"))


def docstrings(library: Path) -> Iterator[str]:
    """Every docstring of at least `LEAST_CHARACTERS` characters, each text once, always in the same order.

    Modules are parsed, never imported. A file that cannot be parsed is passed over.
    """
    seen: set[str] = set()
    for path in sorted(library.rglob("*.py")):
        if NOT_THE_LIBRARY.isdisjoint(path.relative_to(library).parts):
            for text in _docstrings_of(path):
                if len(text) >= LEAST_CHARACTERS and text not in seen:
                    seen.add(text)
                    yield text


def _docstrings_of(path: Path) -> Iterator[str]:
    try:
        with warnings.catch_warnings():
            # Old code has invalid escapes; that is no concern of a reader.
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
    """Write the docstrings as JSONL, one ``{"text": ...}`` a line; the answer is their number."""
    number = 0
    with file.open("w", encoding="utf-8") as out:
        for text in docstrings(library or standard_library()):
            out.write(json.dumps({"text": text.encode(errors="replace").decode()}, ensure_ascii=False) + "\n")
            number += 1
    return number
