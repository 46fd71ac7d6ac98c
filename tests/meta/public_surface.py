"""What the project offers: its routes and its commands, asked of the code itself."""

import argparse
from pathlib import Path

from client.arguments import build_parser
from service.app import build, create_app
from service.settings import Settings
from tests.fakes.launcher import FakeLauncher


def routes(home: Path) -> set[tuple[str, str]]:
    """(method, path) of every public route, as the service's own OpenAPI document has them."""
    settings = Settings.read({}, home=home, database_url=f"sqlite:///{home}/x.db")
    app = create_app(build(settings, FakeLauncher()), scheduling=False)
    paths = app.openapi()["paths"]
    return {(method.upper(), path) for path, operations in paths.items() for method in operations}


def commands() -> list[str]:
    """Every command with its second word where it has one, e.g. ``tokenizer train``."""
    return [
        " ".join([name, second]).strip()
        for name, parser in parsers(build_parser()).items()
        for second in parsers(parser) or [""]
    ]


def parsers(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    """The subcommands of a parser by their names."""
    actions = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    return dict(actions[0].choices) if actions else {}
