"""A file is a noun, a function is one sentence: the lengths that docs/decisions/0001 promises."""

import ast
import io
import statistics
import tokenize
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
SOURCE = ("contract", "model", "worker", "service", "client")  # a migration is a list, however long
ESSAY = ("worker/train.py", 120)

NO_CODE = {
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENDMARKER,
}
FUNCTION_LIMIT = 60
FILE_LIMIT = 400


def files(*folders: str) -> Iterator[Path]:
    for folder in folders:
        yield from sorted((ROOT / folder).rglob("*.py"))


def functions(file: Path) -> Iterator[tuple[str, int]]:
    """(name, lines) of each function: from its def to its last line, without decorators and docstring."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            first = node.body[0]
            if ast.get_docstring(node) is not None:
                lines -= (first.end_lineno or first.lineno) - first.lineno + 1
            yield f"{file.relative_to(ROOT)}:{node.lineno} {node.name}", lines


def measured() -> dict[str, int]:
    return {name: lines for file in files(*SOURCE) for name, lines in functions(file)}


def test_no_function_is_longer_than_a_screen() -> None:
    essay, essay_limit = ESSAY
    too_long = {
        name: lines
        for name, lines in measured().items()
        if lines > (essay_limit if name.startswith(essay) else FUNCTION_LIMIT)
    }
    assert too_long == {}


def test_most_functions_are_short() -> None:
    lengths = sorted(measured().values())
    assert statistics.median(lengths) <= 10
    assert lengths[int(len(lengths) * 0.9)] <= 30


def test_no_file_is_longer_than_a_sitting() -> None:
    lengths = {str(file.relative_to(ROOT)): len(file.read_text().splitlines()) for file in files(*SOURCE)}
    assert {name: count for name, count in lengths.items() if count > FILE_LIMIT} == {}


def test_tests_are_as_long_as_the_source() -> None:
    source = sum(code_lines(file) for file in files(*SOURCE))
    tests = sum(code_lines(file) for file in files("tests"))
    assert tests >= 0.9 * source


def code_lines(file: Path) -> int:
    """Lines that hold code: prose is not tested, and source is asked to have more of it than tests are."""
    text = file.read_text()
    prose: set[int] = set()
    for node in ast.walk(ast.parse(text)):
        kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        if isinstance(node, kinds) and ast.get_docstring(node) is not None:
            prose.update(range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1))
    written: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in NO_CODE:
            written.update(range(token.start[0], token.end[0] + 1))
    return len(written - prose)


def test_package_init_files_are_empty() -> None:
    assert [str(file) for file in files(*SOURCE) if file.name == "__init__.py" and file.read_text()] == []


def test_no_drawer_for_leftovers() -> None:
    names = {file.name for file in files(*SOURCE)}
    assert not names & {"utils.py", "helpers.py", "common.py", "misc.py"}
