"""The hints in the source: texts that tell a user what to do after a failure, and the commands in any message."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("contract", "worker", "service", "client")
HINT_ARGUMENT = {"TrainingError": 2, "LaunchRefused": 1}
"""Exception -> the position of its hint."""

TABLES = {"HINTS": 1, "KNOWN_ERRORS": 2}
"""Table of tuples -> the position of the hint in each."""

COMMAND = re.compile(r"`(trainyard [^`]+)`|(?<!python -m )\b(trainyard [a-z]+ [A-Z<{-][^;.,`]*)")


def trees() -> Iterator[tuple[str, ast.Module]]:
    for folder in FOLDERS:
        for file in sorted((ROOT / folder).rglob("*.py")):
            yield str(file.relative_to(ROOT)), ast.parse(file.read_text())


def texts(node: ast.expr | None) -> Iterator[str]:
    """The texts that an expression may have; what is computed is ``{}``."""
    match node:
        case ast.Constant(value=str(text)):
            yield text
        case ast.JoinedStr(values=values):
            yield "".join(str(part.value) if isinstance(part, ast.Constant) else "{}" for part in values)
        case ast.IfExp(body=body, orelse=orelse):
            yield from texts(body)
            yield from texts(orelse)


def hints() -> set[tuple[str, str]]:
    """(file, text) of every hint in the source."""
    return {(file, text) for file, tree in trees() for node in ast.walk(tree) for text in _hints_at(node)}


def _hints_at(node: ast.AST) -> Iterator[str]:
    match node:
        case ast.Call(func=ast.Name(id=name), args=args, keywords=keywords):
            place = HINT_ARGUMENT.get(name)
            if place is not None and len(args) > place:
                yield from texts(args[place])
            yield from (text for keyword in keywords if keyword.arg == "hint" for text in texts(keyword.value))
        case ast.Assign(targets=[ast.Name(id=name)], value=value) if name == "hint" or name.endswith("_HINT"):
            yield from texts(value)
        case ast.FunctionDef(name=name) if name.endswith("_hint"):
            returned = (below.value for below in ast.walk(node) if isinstance(below, ast.Return))
            yield from (text for value in returned for text in texts(value))
        case ast.AnnAssign(target=ast.Name(id=name), value=ast.Tuple(elts=rows)) if name in TABLES:
            yield from (text for row in rows if isinstance(row, ast.Tuple) for text in texts(row.elts[TABLES[name]]))


def commands() -> set[tuple[str, str]]:
    """(file, command) of every ``trainyard`` command in a message of the source, docstrings excluded."""
    found = set()
    for file, tree in trees():
        documented = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        inside = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant | ast.JoinedStr) and id(node) not in documented | inside:
                for text in texts(node):
                    found |= {(file, (one or two).strip()) for one, two in COMMAND.findall(text)}
    return found
