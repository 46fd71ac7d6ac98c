"""Corpora for tests: the docstrings of the standard library, and lines written by hand."""

import ast
import json
import sysconfig
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path


@cache
def docstrings(files: int = 40) -> tuple[str, ...]:
    """The docstrings of some modules of the installed Python, in order."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    return tuple(text for file in sorted(folder.glob("*.py"))[:files] for text in _docstrings_of(file))


def _docstrings_of(file: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(file.read_bytes())):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text:
                yield text


def write_jsonl(path: Path, texts: Iterable[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path
