"""`trainyard`: the command. Reads the command line, runs one subcommand, turns every failure into its exit code."""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from importlib import import_module

from client.arguments import COMPLETE, PLAN, SUBMIT, build_parser
from client.console import Console
from client.errors import Refused, TrainyardError
from client.exits import Exit, UsageError, exit_of_error

UNAUTHORIZED = 401


def main(arguments: Sequence[str] | None = None, console: Console | None = None) -> int:
    """Run one command; the answer is the exit code."""
    console = console or Console()
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        return _run(given, console)
    except UsageError as error:
        console.say(f"trainyard: {error}")
        return Exit.USAGE
    except TrainyardError as error:
        explain(error, console)
        return exit_of_error(error)
    except KeyboardInterrupt:
        return Exit.DETACHED
    except BrokenPipeError:
        # Whoever read our output has seen enough; without this the interpreter complains when it flushes at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return Exit.DETACHED


def _run(given: list[str], console: Console) -> int:
    if given[:1] == [COMPLETE]:
        answer: Callable[[list[str], Console], int] = import_module("client.completion").answer
        return answer(given[1:], console)
    if given[:1] in ([SUBMIT], [PLAN]):
        # Their flags are the leaves of the spec, which take pydantic to read.
        described: Callable[[list[str], Console], int] = getattr(import_module(f"client.{given[0]}"), given[0])
        return described(given[1:], console)
    parsed = build_parser().parse_args(given)
    return runner(parsed.run)(parsed, console)


def runner(name: str) -> Callable[[argparse.Namespace, Console], int]:
    """The function that "module:function" names."""
    module, _, function = name.partition(":")
    found: Callable[[argparse.Namespace, Console], int] = getattr(import_module(module), function)
    return found


def explain(error: TrainyardError, console: Console) -> None:
    """Say on stderr what went wrong and what to do."""
    console.say(f"trainyard: {error}")
    if isinstance(error, Refused):
        for problem in error.errors:
            console.say(f"  {problem.pointer or '/'}: {problem.message}")
        if error.status == UNAUTHORIZED:
            console.say("  --token or TRAINYARD_TOKEN gives it; who runs the service has it, or makes one")
        if error.code == "job_not_found":
            console.say("  `trainyard list` shows those that there are")
        if error.request_id and error.status >= 500:
            console.say(f"  request {error.request_id}: the service's log has more")
    elif exit_of_error(error) == Exit.NO_SERVICE:
        console.say("  start one with `trainyard serve`, or say where it is with --url or TRAINYARD_URL")
