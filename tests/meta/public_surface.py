"""The routes and the commands of the project, read from the code."""

from pathlib import Path

import click

from tests.fakes.launcher import FakeLauncher
from trainyard.client.cli.parser import trainyard
from trainyard.service.app import build_state, create_app
from trainyard.service.settings import Settings


def routes(home: Path) -> set[tuple[str, str]]:
    """(method, path) of every public route, as the service's own OpenAPI document has them."""
    settings = Settings.read({}, home=home, database_url=f"sqlite:///{home}/x.db")
    app = create_app(build_state(settings, FakeLauncher()), scheduling=False)
    paths = app.openapi()["paths"]
    return {(method.upper(), path) for path, operations in paths.items() for method in operations}


def commands() -> list[str]:
    """Every command with its second word where it has one, e.g. ``tokenizer train``."""
    return [
        " ".join([name, second]).strip()
        for name, command in trainyard.commands.items()
        for second in below(command) or [""]
    ]


def below(command: click.Command) -> dict[str, click.Command]:
    """The subcommands of a command by their names."""
    return dict(command.commands) if isinstance(command, click.Group) else {}
