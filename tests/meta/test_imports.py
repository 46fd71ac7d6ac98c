"""Every module can be imported first: no module imports itself by way of others, and each imports."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGES = ("contract", "model", "worker", "service", "client", "mcp_tools", "migrations")


def module_files() -> dict[str, Path]:
    """Dotted name -> file. ``migrations/env.py`` and the versions are run by Alembic alone."""
    files = (file for package in PACKAGES for file in sorted((ROOT / package).rglob("*.py")))
    return {
        "trainyard." + ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): file
        for file in files
        if file.name != "env.py" and file.parent.name != "versions"
    }


def run_on_import(node: ast.AST) -> Iterator[ast.Import | ast.ImportFrom]:
    """The import statements that run when the module is imported, and not only when a function is called."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import | ast.ImportFrom):
            yield child
        elif isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            continue
        elif not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield from run_on_import(child)


def imported(statement: ast.Import | ast.ImportFrom) -> Iterator[str]:
    if isinstance(statement, ast.Import):
        yield from (alias.name for alias in statement.names)
    else:
        yield from (f"{statement.module}.{alias.name}" for alias in statement.names)
        yield statement.module or ""


def test_no_imports_go_in_a_circle() -> None:
    """Without a circle the order of imports makes no difference: each module may be the first."""
    files = module_files()
    graph = {
        name: {
            found for statement in run_on_import(ast.parse(file.read_text())) for found in imported(statement)
        } & files.keys()
        for name, file in files.items()
    }  # fmt: skip
    assert len(graph) > 200
    assert "trainyard.service.db.models" in graph["trainyard.service.jobs.repository"]
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        raise AssertionError(" imports ".join(reversed(error.args[1]))) from None


def test_every_module_is_imported_in_a_fresh_interpreter() -> None:
    names = [name for name in module_files() if not name.endswith("__main__")]
    program = "import importlib, sys\nfor name in sys.argv[1:]: importlib.import_module(name)"
    done = subprocess.run([sys.executable, "-c", program, *names], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def test_the_protocol_s_sdk_is_imported_only_when_a_tool_is_called() -> None:
    """It takes a second: too long for the start of the service, and for every other command."""
    imports = {
        name: {found for statement in run_on_import(ast.parse(file.read_text())) for found in imported(statement)}
        for name, file in module_files().items()
    }

    def importers(target: str) -> set[str]:
        return {name for name, found in imports.items() if target in found}

    assert importers("mcp.server") == {"trainyard.mcp_tools.server"}
    assert {name for name, found in imports.items() if any(part.split(".")[0] == "mcp" for part in found)} == {
        "trainyard.mcp_tools.server"
    }
    # The command's module is imported when the command runs.
    assert importers("trainyard.mcp_tools.server") == {"trainyard.client.cli.commands.mcp"}
    assert importers("trainyard.client.cli.commands.mcp") == set()
