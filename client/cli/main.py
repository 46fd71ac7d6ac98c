"""`trainyard`: the command. Parses the command line, runs one subcommand, and turns errors into exit codes."""

import os
import sys
from collections.abc import Sequence
from difflib import get_close_matches

import click

from trainyard.client.cli.console import Console
from trainyard.client.cli.parser import COMPLETE_VARIABLE, trainyard
from trainyard.client.errors import ApiError, TrainyardError
from trainyard.client.exit_codes import Exit, UsageError, exit_of_error
from trainyard.contract.stdio import run_command

UNAUTHORIZED = 401
COMPLETE = "__complete"
NEXT_STEPS = {
    "job_not_found": "run `trainyard list` to see all jobs",
    "checkpoint_not_found": "`trainyard checkpoints JOB` lists the checkpoints of a job",
    "step_unavailable": "`trainyard checkpoints JOB` lists the checkpoints of a job",
}
"""What to do about an error of the API, by its code."""


def main(arguments: Sequence[str] | None = None, console: Console | None = None) -> int:
    """Run one command and return its exit code. Without arguments, use those of the process."""
    if arguments is None and console is None:
        return run_command("trainyard", lambda: main(sys.argv[1:], Console()))
    console = console or Console()
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        return _run(given, console)
    except click.exceptions.Exit as done:
        return done.exit_code
    except click.UsageError as error:
        explain_usage(error, console)
        return Exit.USAGE
    except UsageError as error:
        console.error(f"trainyard: {error}")
        return Exit.USAGE
    except TrainyardError as error:
        explain(error, console)
        return exit_of_error(error)
    except OSError as error:
        if error.filename is None:
            raise
        console.error(f"trainyard: {error.filename} cannot be read or written: {error.strerror}")
        return Exit.REJECTED
    except KeyboardInterrupt:
        return Exit.DETACHED


def _run(given: list[str], console: Console) -> int:
    if given[:1] == [COMPLETE] or COMPLETE_VARIABLE in os.environ:
        from trainyard.client.cli import completion

        return completion.answer(given[1:], console) if given[:1] == [COMPLETE] else completion.answer_shell()
    with trainyard.make_context("trainyard", given, obj=console) as context:
        return int(trainyard.invoke(context))


def explain_usage(error: click.UsageError, console: Console) -> None:
    """Print on stderr what is wrong with the command line, and the option or command that was probably meant."""
    text = error.format_message()
    if error.ctx is None or isinstance(error, click.exceptions.NoArgsIsHelpError):
        console.error(text)
        return
    if isinstance(error, click.NoSuchOption):
        known = [name for param in error.ctx.command.get_params(error.ctx) for name in param.opts]
        meant = _meant(error.option_name, known) or _field(error.option_name, known)
        text = f"there is no {error.option_name} here{meant}"
    elif isinstance(error, click.exceptions.NoSuchCommand):
        commands = error.ctx.command.list_commands(error.ctx) if isinstance(error.ctx.command, click.Group) else []
        text = f"there is no {error.command_name!r}{_meant(error.command_name, commands)}"
    console.error(error.ctx.get_usage())
    console.error(f"{error.ctx.command_path}: error: {text}")


def _meant(given: str, known: Sequence[str]) -> str:
    near = get_close_matches(given, known, n=1, cutoff=0.7)
    return f"; did you mean {near[0]}?" if near else ""


def _field(given: str, known: Sequence[str]) -> str:
    """Return how a command with --set sets the spec's field that ``given`` names."""
    leaf = given.lstrip("-").replace("-", "_")
    if "--set" not in known:
        return ""
    from trainyard.contract.spec import ResourcesSpec, TrainingSpec

    groups = {"resources": ResourcesSpec.model_fields, "training": TrainingSpec.model_fields}
    group = next((name for name, fields in groups.items() if leaf in fields), None)
    return f"; set it with --set {group}.{leaf}=VALUE" if group is not None else ""


def explain(error: TrainyardError, console: Console) -> None:
    """Print on stderr what went wrong and what to do."""
    console.error(f"trainyard: {error}")
    for note in getattr(error, "__notes__", ()):
        console.error(f"  {note}")
    if isinstance(error, ApiError):
        if error.status == UNAUTHORIZED:
            console.error("  give it with --token or TRAINYARD_TOKEN; an admin of the service can create one")
        if error.code in NEXT_STEPS:
            console.error(f"  {NEXT_STEPS[error.code]}")
        if error.request_id and error.status >= 500:
            console.error(f"  see request {error.request_id} in the service's log")
    elif exit_of_error(error) == Exit.NO_SERVICE:
        console.error("  start one with `trainyard serve`, or give its URL with --url or TRAINYARD_URL")
